"""How long a run will take and how much memory it needs, said before its first step.

The estimate runs the first batch forward and backward on the model itself, throws the gradients away and
puts the buffers back; parameters, optimizer and EMA are only read, and every random draw of training is
keyed, so a run is the same bit for bit with or without it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reverie.progress import duration
from reverie.train import precision as formats
from reverie.train.parallel import local, team

if TYPE_CHECKING:
    from reverie.train.loop import Player


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Times in seconds, sizes in bytes.

    `memory` is the peak of the whole process on a CPU and of the device elsewhere, once the optimizer has its
    state; `activations` is what autograd keeps between forward and backward; `available` is None where the
    system does not say.
    """

    steps: int
    step_seconds: float
    parameters: int
    weights: int
    optimizer: int
    ema: int
    activations: int
    memory: int
    available: int | None

    @property
    def seconds(self) -> float:
        """All the steps, without evaluation, sampling and checkpoints."""
        return self.steps * self.step_seconds

    def __str__(self) -> str:
        text = (
            f"{_count(self.parameters)} parameters · {self.steps:,} steps of {self.step_seconds:.2g} s, "
            f"about {duration(self.seconds)} without evaluation · needs about {_size(self.memory)} of memory "
            f"(weights {_size(self.weights)}, gradients and optimizer {_size(self.optimizer)}, "
            f"EMA {_size(self.ema)}, activations {_size(self.activations)}, the rest Python, libraries, data)"
        )
        if self.available is not None and self.memory > self.available:
            text += f" but only {_size(self.available)} are free: take smaller batches and accumulate more"
        return text


def estimate(
    players: Sequence[Player],
    batch: Mapping[str, Any],
    *,
    steps: int,
    accumulate: int = 1,
    precision: str = "auto",
    loading: float = 0.0,
) -> Plan:
    """Times `batch`, which lies on the model's device, through every player, and adds up what it needs.

    One pass warms up and measures the activations; up to three more are timed, as long as they take a second
    together, and the fastest counts. `loading` is the time that one batch takes to make.
    """
    device = next(players[0].model.parameters()).device
    precision = formats.resolve(precision, device)
    seconds, activations = accumulate * loading, 0
    for player in players:
        buffers = [(buffer, buffer.clone()) for buffer in player.model.buffers()]
        kept: dict[int, int] = {}
        weights = {local(p).untyped_storage().data_ptr() for p in player.model.parameters()}

        def keep(tensor: Tensor, kept: dict[int, int] = kept, weights: set[int] = weights) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            times = [_pass(player, batch, precision, device)]
        activations = max(activations, sum(kept.values()))
        while len(times) < 4 and team().any(sum(times) < 1):
            times.append(_pass(player, batch, precision, device))
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for other in players:
            other.model.zero_grad(set_to_none=True)
        seconds += accumulate * min(times) + _update_seconds(player, device)
    trained = sum(_bytes(p) for player in players for g in player.optimizer.param_groups for p in g["params"])
    states = [state for player in players for state in player.optimizer.state.values()]
    held = sum(_bytes(value) for state in states for value in state.values())
    moments = 2 * trained  # Adam's two; more than enough for plain SGD
    parameters = {id(p): p for player in players for p in player.model.parameters()}.values()
    return Plan(
        steps=steps,
        step_seconds=seconds,
        parameters=sum(p.numel() for p in parameters),
        weights=sum(_bytes(p) for p in parameters),
        optimizer=trained + moments,
        ema=sum(_bytes(value) for player in players if player.ema for value in player.ema.average.values()),
        activations=activations,
        memory=_peak(device) + max(0, moments - held),
        available=_available(device),
    )


def _pass(player: Player, batch: Mapping[str, Any], precision: str, device: torch.device) -> float:
    torch.manual_seed(0)
    begun = time.perf_counter()
    with formats.autocast(precision, device):
        loss = player.loss(dict(batch))["loss"]
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _update_seconds(player: Player, device: torch.device) -> float:
    """The time of an AdamW and an EMA update, measured on at most a million numbers and scaled."""
    numel = sum(p.numel() for group in player.optimizer.param_groups for p in group["params"])
    sample = torch.zeros(min(numel, 1_000_000), device=device, requires_grad=True)
    sample.grad = torch.zeros_like(sample)
    optimizer = torch.optim.AdamW([sample], fused=True)
    for _ in range(2):  # the first allocates
        begun = time.perf_counter()
        optimizer.step()
        if player.ema is not None:
            sample.detach().lerp_(sample.grad, 0.5)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begun
    return seconds * numel / sample.numel()


def _bytes(value: Any) -> int:
    return local(value).numel() * value.element_size() if isinstance(value, Tensor) else 0


def _size(count: float) -> str:
    if count < 1e9:
        return f"{count / 1e6:.{1 if count < 1e7 else 0}f} MB"
    return f"{count / 1e9:.1f} GB"


def _count(count: int) -> str:
    if count < 1e5:
        return f"{count:,}"
    return f"{count / 1e6:.1f} M" if count < 1e9 else f"{count / 1e9:.2f} B"


def _peak(device: torch.device) -> int:
    """The most memory this process has held so far, on the device or, on a CPU, altogether."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _available(device: torch.device) -> int | None:
    """What this process could hold: what is free and what it holds already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    meminfo, statm = Path("/proc/meminfo"), Path("/proc/self/statm")
    if not (meminfo.exists() and statm.exists()):
        return None
    free = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(free.split()[1]) * 1024 + int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
