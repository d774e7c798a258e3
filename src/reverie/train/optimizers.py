"""AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) with weight decay on matrices only.

Gains, biases, temperatures (fewer than two dimensions) and the weights of `nn.Embedding` never decay. A
module that owns further exceptions (position tables, class tokens) names them, relative to itself, in a set
`no_decay`; a name there may be a parameter or a submodule.
"""

from __future__ import annotations

import torch
from torch import nn


def no_decay_names(model: nn.Module) -> set[str]:
    """The names of the trainable parameters of `model` that weight decay leaves alone."""
    exempt: set[int] = set()
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied weights go by any of their names
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            exempt.add(id(module.weight))
        for name in getattr(module, "no_decay", ()):
            matches = {key for key in parameters if key == dot + name or key.startswith(f"{dot}{name}.")}
            assert matches, (
                f"{type(module).__name__}.no_decay names {name!r}, which is no parameter or submodule"
            )
            exempt |= {id(parameters[key]) for key in matches}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name for name, p in trainable if p.ndim < 2 or id(p) in exempt}


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters of `model`; the schedule's factor multiplies `lr`."""
    exempt = no_decay_names(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name not in exempt], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name in exempt], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    assert groups, f"{type(model).__name__} has no trainable parameter"
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
