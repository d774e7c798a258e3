"""How long a run will take and how much memory it needs, said before its first step.

The estimate runs the first batch forward and backward on the model itself, throws the gradients away and puts the
buffers back; parameters, optimizer and EMA are only read, and every random draw of training is keyed, so a run is
the same bit for bit with or without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reverie.train import precision as formats
from reverie.train.log import duration

if TYPE_CHECKING:
    from reverie.train.loop import Player


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Seconds and bytes; `bytes` is the peak of the whole process on a CPU, of the device elsewhere."""

    parameters: int
    step_seconds: float
    seconds: float
    weights: int
    optimizer: int
    ema: int
    activations: int
    bytes: int
    available: int | None
    steps: int

    def __str__(self) -> str:
        text = (
            f"{self.parameters / 1e6:.1f} M parameters · {self.steps:,} steps of {self.step_seconds:.2g} s: about "
            f"{duration(self.seconds)}, evaluation not counted · about {_size(self.bytes)} of memory (weights "
            f"{_size(self.weights)}, gradients and optimizer {_size(self.optimizer)}, EMA {_size(self.ema)}, "
            f"activations {_size(self.activations)}, the rest Python, libraries and data)"
        )
        if self.available is not None and self.bytes > self.available:
            text += f"; only {_size(self.available)} can be had: take a smaller batch with more accumulation"
        return text


def estimate(
    players: list[Player],
    batch: Mapping[str, Any],
    *,
    steps: int,
    accumulate: int = 1,
    precision: str = "fp32",
    device: torch.device | None = None,
    loss: Callable[[Player, Mapping[str, Any]], Mapping[str, Tensor]] | None = None,
) -> Plan:
    """Times `batch` (already on `device`) through every player, and adds up what will be allocated.

    The first pass warms up and measures activations (every tensor that backward keeps); the second is timed, unless
    the first took over five seconds, and then that counts.
    """
    device = device or next(players[0].model.parameters()).device
    precision = formats.resolve(precision, device)
    loss = loss or (lambda player, batch: player.loss(batch))
    resident, seconds, activations = _resident(device), 0.0, 0
    for player in players:
        buffers = [(buffer, buffer.clone()) for buffer in player.model.buffers()]
        for attempt in (0, 1):
            torch.manual_seed(0)
            begin = time.perf_counter()
            with _Kept(player.model) if attempt == 0 else _Nothing() as kept:
                with formats.autocast(precision, device):
                    total = loss(player, dict(batch))["loss"]
                total.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            once = time.perf_counter() - begin
            activations = max(activations, kept.bytes)
            for other in players:
                other.optimizer.zero_grad(set_to_none=True)
                other.model.zero_grad(set_to_none=True)
            if once > 5:
                break
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        seconds += once * accumulate + _update_seconds(player, device)
    peak = max(_resident(device), resident)
    trainable = [p for player in players for group in player.optimizer.param_groups for p in group["params"]]
    held = sum(_bytes(v) for player in players for s in player.optimizer.state.values() for v in s.values())
    moments = 2 * sum(_bytes(p) for p in trainable)  # the usual two; an upper bound for plain SGD
    everything = {id(p): p for player in players for p in player.model.parameters()}
    return Plan(
        parameters=sum(p.numel() for p in everything.values()),
        step_seconds=seconds,
        seconds=seconds * steps,
        weights=sum(_bytes(p) for p in everything.values()),
        optimizer=moments + sum(_bytes(p) for p in trainable),
        ema=sum(_bytes(v) for player in players if player.ema for v in player.ema.average.values()),
        activations=activations,
        bytes=peak + max(0, moments - held),
        available=_available(device),
        steps=steps,
    )


class _Nothing:
    bytes = 0

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Adds up the storages that autograd keeps for backward, without the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.bytes = 0
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> _Kept:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _update_seconds(player: Player, device: torch.device) -> float:
    """The time of an AdamW update and an EMA update, measured on a million numbers and scaled."""
    numel = sum(p.numel() for group in player.optimizer.param_groups for p in group["params"])
    sample = torch.zeros(min(numel, 1_000_000), device=device, requires_grad=True)
    sample.grad = torch.zeros_like(sample)
    optimizer = torch.optim.AdamW([sample], fused=True)
    optimizer.step()
    begin = time.perf_counter()
    optimizer.step()
    if player.ema:
        sample.detach().lerp_(sample.grad, 0.5)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * numel / max(1, sample.numel())


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _size(count: float) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _resident(device: torch.device) -> int:
    """The most memory this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _available(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    statm = Path("/proc/self/statm").read_text().split()
    import os

    return int(fields["MemAvailable"].split()[0]) * 1024 + int(statm[1]) * os.sysconf("SC_PAGE_SIZE")
