"""AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) with weight decay on matrices only.

Gains, biases, temperatures (fewer than two dimensions) and the weights of `nn.Embedding` never decay. A
module that owns further exceptions (position tables, class tokens) names them, relative to itself, in a set
`no_decay`; a name there may be a parameter or a submodule.

For fine-tuning the learning rate may fall with depth (ULMFiT's discriminative rates, 1801.06146; as in BEiT,
2106.08254, a factor for each block).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from reverie.errors import InputError


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
    factors: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters of `model`; the schedule's factor multiplies `lr`.

    `factors` by name, such as those of `layer_factors`, multiply a parameter's learning rate; 1 where there is none.
    The first group has the largest, and its rate is what a run logs.
    """
    if not 0 <= lr < math.inf:
        raise InputError(f"lr is {lr}: give a learning rate, such as 1e-3.")
    exempt = no_decay_names(model)
    factors = factors or {}
    sorts: dict[tuple[float, bool], list[nn.Parameter]] = {}  # by factor, and whether they decay
    for name, p in model.named_parameters():
        if p.requires_grad:
            sorts.setdefault((factors.get(name, 1.0), name not in exempt), []).append(p)
    assert sorts, f"{type(model).__name__} has no trainable parameter"
    groups = [
        {"params": sorts[factor, decays], "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0}
        for factor, decays in sorted(sorts, reverse=True)
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """The factor on each parameter's learning rate when it falls by `decay` from block to block, from top to bottom.

    Of a stack of n `blocks` the last has `decay`, the first decay^n, and what its module registers before the blocks
    (embeddings, positions, a stem) decay^(n + 1); what comes after them has 1, as everything outside of stacks.
    InputError: the decay is none, or the model has no blocks.
    """
    if not 0 < decay <= 1:
        raise InputError(f"layer decay is {decay}: give a factor above 0, up to 1 for equal rates.")
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        blocks = getattr(module, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            continue
        dot = f"{name}." if name else ""
        own = [key for key, _ in module.named_parameters()]
        places = [int(key.split(".")[1]) if key.startswith("blocks.") else None for key in own]
        first = next((i for i, place in enumerate(places) if place is not None), 0)
        for i, (key, place) in enumerate(zip(own, places, strict=True)):
            below = len(blocks) + 1 if i < first else 0 if place is None else len(blocks) - place
            found[dot + key] = decay**below
    if not found:
        raise InputError(f"{type(model).__name__} has no blocks that learning rates could fall along.")
    return found
