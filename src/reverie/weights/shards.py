"""Weights into a built system, tensor by tensor, so that the files may be larger than the memory beside the system.

Each tensor is read, brought under our name and into its precision, and put in its place before the next: the peak is
the system in the precision asked for and the tensors of one rule. The memory that a system was built with is never
written, so it was never taken.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from reverie.errors import InputError
from reverie.nn import quantised
from reverie.nn.linear import Linear
from reverie.weights import files, remap
from reverie.weights.files import ModelFileError

QUANTISED = ("int8",)


@torch.no_grad()
def fill(
    system: nn.Module,
    shards: files.Shards,
    *,
    table: remap.Table | None = None,
    ignored: Collection[str] = (),
    dtype: torch.dtype | None = None,
    quantise: str | None = None,
) -> None:
    """Fill a system from the files that are open; their names -> ours by `table`.

    `ignored` are names in the files that are no weights. `dtype` (torch.bfloat16, torch.float16) is what the weights of
    linear layers are kept in, `quantise` ("int8") what those of repeated blocks are; all else keeps the system's own
    precision. The files' names and shapes have been checked.
    """
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype {dtype} is none that weights are kept in: use torch.bfloat16, or none.")
    if quantise not in (None, *QUANTISED):
        raise InputError(f"quantise {quantise!r:.40} is unknown: use {' or '.join(QUANTISED)}, or none.")
    small = quantised.repeated(system) if quantise == "int8" else {}
    narrow = (
        {name for name, module in system.named_modules() if isinstance(module, Linear)} if dtype else set()
    )
    places = dict(system.state_dict(keep_vars=True))
    todo = set(places)

    def put(name: str, tensor: Tensor) -> None:
        layer, _, leaf = name.rpartition(".")
        place = places[name]
        if place.shape != tensor.shape:
            raise ModelFileError(f"{name} is {tuple(tensor.shape)} and should be {tuple(place.shape)}.")
        todo.discard(name)
        if leaf == "weight" and layer in small:
            bias = small[layer].bias
            made = quantised.Int8Linear(
                *quantised.to_int8(tensor), None if bias is None else bias.detach().clone()
            )
            quantised.replace(system, layer, made)
            if bias is not None:
                places[f"{layer}.bias"] = made.bias
            small.pop(layer)
            return
        wanted = dtype if leaf == "weight" and layer in narrow else place.dtype
        if tensor.dtype == wanted and tensor.data_ptr() % 64 == 0:
            place.data = tensor
        elif wanted == place.dtype:
            place.copy_(tensor)
        else:
            place.data = tensor.to(wanted)

    give_back = _give_back()
    names = [name for name in shards.entries if name not in ignored]
    if table is None:
        for name in names:
            put(name, shards.read(name))
            give_back()
    else:
        groups, unclaimed = remap.grouped(table, names)
        assert not unclaimed, f"{unclaimed[:5]} passed the check and no rule claims them"
        for group in groups:
            _put_all(put, group.convert({name: shards.read(name) for name in group.sources}))
            give_back()
        _put_all(put, remap.computed(table))
    assert not todo, f"{sorted(todo)[:5]} were not filled"


def _put_all(put: Callable[[str, Tensor], None], tensors: Mapping[str, Tensor]) -> None:
    """In a function, so that no name holds a tensor beyond it."""
    for name, tensor in tensors.items():
        put(name, tensor)


def _give_back() -> Callable[[], object]:
    """What gives freed memory back to the system: glibc keeps blocks of these sizes, and none fits what comes next."""
    if platform.libc_ver()[0] != "glibc":
        return lambda: None
    libc = ctypes.CDLL(None)
    return lambda: libc.malloc_trim(0)
