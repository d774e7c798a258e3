"""Low-rank adaptation of any `nn.Linear`, from outside: "LoRA" (Hu et al. 2021, 2106.09685, section 4.1).

    y = W x + b + alpha / rank * up (down x)

W and b stay as they are; `down`, `rank x inputs`, starts random and `up`, `outputs x rank`, at zero, so a new adapter
changes nothing. It is a child of the layer that a hook adds to what the layer gives: no class is replaced, and every
other name of the state dict stays. Names: `LAYER.lora.down`, `LAYER.lora.up`, `LAYER.lora.alpha`. A layer whose
weight is read without calling it (`nn.MultiheadAttention`, which Reverie does not use) cannot be adapted so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from reverie import rng
from reverie.errors import InputError
from reverie.nn.linear import linear

PARTS = {"down", "up", "alpha"}


class Lora(nn.Module):
    """What is added to a linear layer: `... inputs -> ... outputs`."""

    def __init__(self, layer: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        like = layer.weight
        down = torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5
        self.down = nn.Parameter(down.to(like))
        self.up = nn.Parameter(like.new_zeros(layer.out_features, rank))
        self.alpha: Tensor
        self.register_buffer("alpha", torch.tensor(float(alpha), device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.down), self.up) * (self.alpha / len(self.down))

    def change(self) -> Tensor:
        """What it adds to the weight, `outputs inputs`, in double precision."""
        return self.up.double() @ self.down.double() * (self.alpha.double() / len(self.down))


def add_lora(
    model: nn.Module, patterns: Sequence[str], *, rank: int, alpha: float | None = None, seed: int = 0
) -> list[str]:
    """Adapt the linear layers of `model` whose names fit a pattern ("image.blocks.*"), and freeze all else.

    `alpha` is `rank` if not given, so that the factor is one. Draws are keyed by the layer's name. Returns the names
    of the layers. InputError: no layer fits, one is adapted already, or the rank is no rank.
    """
    if rank < 1:
        raise InputError(f"rank is {rank}: give 1 or more.")
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not layers:
        raise InputError(f"no linear layer of {type(model).__name__} has a name like {', '.join(patterns)}.")
    if twice := layers.keys() & dict(adapted(model)).keys():
        raise InputError(f"{min(twice)} is adapted already: merge its adapter first.")
    model.requires_grad_(False)
    for name, layer in layers.items():
        layer.lora = Lora(
            layer,
            rank=rank,
            alpha=rank if alpha is None else alpha,
            generator=rng.generator(seed, "lora", name),
        )
        layer.register_forward_hook(_add)
    return list(layers)


def adapted(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The names and layers that have an adapter."""
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "lora", None), Lora):
            assert isinstance(layer, nn.Linear), f"{name} is no linear layer, but has an adapter"
            yield name, layer


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its layer's weight and remove it; the sum is rounded once."""
    for _, layer in list(adapted(model)):
        assert isinstance(layer.lora, Lora)
        layer.weight.copy_(layer.weight.double() + layer.lora.change())
        del layer.lora
        for key in [key for key, hook in layer._forward_hooks.items() if hook is _add]:
            del layer._forward_hooks[key]


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors alone, by their names in the state dict of `model`."""
    prefixes = tuple(f"{name}.lora." for name, _ in adapted(model))
    return {name: value for name, value in model.state_dict().items() if name.startswith(prefixes)}


def load_lora(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Adapt `model` by what `lora_state` gave, of any rank, and freeze all else; returns the names of the layers.

    InputError: a tensor is none of an adapter, or belongs to no layer of this model or to one of another size.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, dot, part = key.rpartition(".lora.")
        if not dot or name not in layers or part not in PARTS:
            raise InputError(f"{key} is no adapter of a linear layer of this {type(model).__name__}.")
        found.setdefault(name, {})[part] = value
    for name, parts in found.items():
        layer = layers[name]
        if parts.keys() != PARTS:
            raise InputError(f"the adapter of {name} lacks {', '.join(sorted(PARTS - parts.keys()))}.")
        down, up = parts["down"], parts["up"]
        fits = down.ndim == up.ndim == 2 and len(down) == up.shape[-1] and not parts["alpha"].ndim
        if not fits or (len(up), down.shape[-1]) != layer.weight.shape:
            raise InputError(
                f"the adapter of {name} is {tuple(up.shape)} by {tuple(down.shape)}, which does not fit its weight,"
                f" {tuple(layer.weight.shape)}."
            )
    for name, parts in found.items():
        add_lora(model, [name], rank=len(parts["down"]))
    model.load_state_dict(tensors, strict=False)
    for _, layer in adapted(model):  # each call above froze those before
        assert isinstance(layer.lora, Lora)
        layer.lora.requires_grad_(True)
    return list(found)


def _add(layer: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
    assert isinstance(layer.lora, Lora)
    return out + layer.lora(args[0])
