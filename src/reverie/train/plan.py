"""How long a run will take and how much memory it needs, said before its first step and checked at its end.

The estimate first runs two and four items of a batch, which tells what one item keeps for the way back: where all of
them would not fit, the run is refused before it is tried, since a CPU's system would kill it without a word. Then it
runs the batch forward and backward on the model itself, throws the gradients away and puts the buffers back;
parameters, optimizer and EMA are only read, and every random draw of training is keyed, so a run is the same bit for
bit with or without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reverie.errors import InputError, out_of_memory
from reverie.progress import duration, size
from reverie.train import memory as machine
from reverie.train import precision as formats
from reverie.train.batches import Batch
from reverie.train.memory import TIGHT, budget
from reverie.train.parallel import local, team
from reverie.train.runs import read_json

if TYPE_CHECKING:
    from reverie.train.loop import Player

BARE = 256e6  # beside a chunk: a contrastive loss over many items, and what allocators keep
PASSING = (
    1.25  # what a pass holds at its height, over what autograd keeps of it; both measured, see docs/engine.md
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Times in seconds, sizes in bytes.

    `memory` is the peak of the whole process on a CPU and of the device elsewhere, once the optimizer has its
    state; `activations` is what autograd keeps between forward and backward, `per_item` of one item (0: unknown) of a
    batch of `items`; `available` is None where the system does not say, `swap` is what it could put on its disk.
    `settings` are those of the run, by the names of the flags.
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
    swap: int = 0
    items: int = 0
    per_item: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """All the steps, without evaluation, sampling and checkpoints."""
        return self.steps * self.step_seconds

    @property
    def at_once(self) -> int:
        """How many items are embedded at a time."""
        chunk = self.settings.get("chunk") or 0
        return chunk if 0 < chunk < self.items else self.items

    def __str__(self) -> str:
        text = (
            f"{_count(self.parameters)} parameters · {self.steps:,} steps of {self.step_seconds:.2g} s, "
            f"about {duration(self.seconds)} without evaluation · needs about {size(self.memory)} of memory "
            f"(weights {size(self.weights)}, gradients and optimizer {size(self.optimizer)}, "
            f"EMA {size(self.ema)}, activations {size(self.activations)}, the rest Python, libraries, data)"
        )
        if self.available is not None and self.memory > TIGHT * self.available:
            text += f"; {size(self.available)} are free, which is tight: {self.remedy()}"
        return text

    def check(self) -> None:
        """Raises InputError when it would not fit, with what to change."""
        if self.available is not None and self.memory > self.available + self.swap:
            raise InputError(
                f"This would need about {size(self.memory)} of memory, and {size(self.available)} are free: "
                f"{self.remedy()}."
            )

    def remedy(self) -> str:
        """What to change so that it fits, from what one item was measured to keep."""
        batch = next((name for name in ("batch", "clips") if self.settings.get(name) == self.items), "batch")
        if not self.per_item or self.available is None:
            return f"take a smaller --{batch}"
        rest = self.memory - self.per_item * self.at_once
        fits = int((TIGHT * self.available - rest) // self.per_item)
        fits = min(fits, self.at_once - 1)  # it was too much
        if fits < 1:
            return "not even one item at a time does, so take a smaller model or smaller pictures"
        fits = 1 << (fits.bit_length() - 1)
        if "chunk" in self.settings:
            return (
                f"give --chunk {fits}, the same result by a second forward pass, "
                f"or --{batch} {fits}, another result"
            )
        return f"give --{batch} {fits}, which learns from fewer items a step"


def estimate(
    players: Sequence[Player],
    batches: Sequence[Batch],
    *,
    steps: int,
    accumulate: int = 1,
    precision: str = "auto",
    loading: float = 0.0,
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """Times `batches`, some of the `accumulate` of a step, through every player, and adds up what they need.

    They lie on the model's device. One pass warms up and measures the activations; up to three more are timed, as long
    as they take a second together, and the fastest counts. `loading` is the time that one batch takes to make;
    `settings` are the run's, for the remedy. InputError: it would not fit, or did not.
    """
    device = next(players[0].model.parameters()).device
    precision = formats.resolve(precision, device)
    trained = sum(_bytes(p) for player in players for g in player.optimizer.param_groups for p in g["params"])
    states = [state for player in players for state in player.optimizer.state.values()]
    held = sum(_bytes(value) for state in states for value in state.values())
    moments = 2 * trained  # Adam's two; more than enough for plain SGD
    parameters = {id(p): p for player in players for p in player.model.parameters()}.values()
    available = machine.available(device)
    plan = Plan(
        steps=steps,
        step_seconds=math.nan,
        parameters=sum(p.numel() for p in parameters),
        weights=sum(_bytes(p) for p in parameters),
        optimizer=trained + moments,
        ema=sum(_bytes(value) for player in players if player.ema for value in player.ema.average.values()),
        activations=0,
        memory=0,
        available=available,
        swap=0 if available is None else (machine.available(device, swap=True) or available) - available,
        settings=settings or {},
    )
    try:
        ahead = [_ahead(plan, player, batch, precision) for player in players for batch in batches]
        plan = max(ahead, key=lambda each: each.activations)
        to_come = max(0, moments - held)
        plan = replace(plan, memory=machine.held(device) + trained + to_come + plan.activations)
        plan.check()
        before, seconds, activations = machine.peak(device), accumulate * loading, plan.activations
        for player in players:
            for batch in batches:
                time_of, kept = _timed(players, player, batch, precision)
                seconds += accumulate / len(batches) * time_of
                if plan.at_once == plan.items:  # nobody sees what chunks keep
                    activations = max(activations, kept)
            seconds += _update_seconds(player, device)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"The memory did not suffice for one batch: {plan.remedy()}.") from error
    needs, most = plan.memory - plan.activations + activations, machine.peak(device)
    if most > before:  # otherwise something before the training took more, and nobody knows what this took
        needs = max(needs, most + to_come)
    plan = replace(plan, step_seconds=seconds, activations=activations, memory=needs)
    plan.check()
    return plan


def chunk_within(memory: str, player: Player, batch: Batch, *, folder: Path, precision: str = "auto") -> int:
    """How many items may be embedded at a time within `memory` (as in `budget`); 0: all of the batch.

    A power of two, from what few items of `batch` were measured to keep, with the player's loss as it embeds few. The
    batch and so the result stay as they are, save for rounding; a run in `folder` that goes on keeps the chunk that it
    began with, bit for bit. InputError: not even two items fit.
    """
    if any((folder / "checkpoints").glob("step-*")):
        return int(read_json(folder / "config.json").get("chunk", 0))
    device = next(player.model.parameters()).device
    limit = budget(memory, device)
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "bad"}
    few = _few(player, batch, formats.resolve(precision, device))
    assert few is not None, "a contrastive loss takes any number of items"
    base, each = few[0], few[1] * PASSING
    trained = sum(_bytes(p) for group in player.optimizer.param_groups for p in group["params"])
    rest = machine.held(device) + 3 * trained + BARE + base
    fits = int((limit - rest) // each)
    if fits < 2:
        raise InputError(
            f"Two items at a time need {size(rest + 2 * each)}, more than the {size(limit)} of memory "
            f"{memory!r}: take a smaller model, smaller pictures, or more memory."
        )
    return 0 if fits >= _items(batch) else 1 << (fits.bit_length() - 1)


def _ahead(plan: Plan, player: Player, batch: Batch, precision: str) -> Plan:
    """The plan with the activations of the whole batch, from those of few of its items; 0 if few cannot be tried."""
    plan = replace(plan, items=_items(batch))
    few = (
        _few(player, batch, precision) if team().count == 1 else None
    )  # several processes would have to try together
    if few is None:
        return plan
    return replace(plan, per_item=few[1], activations=few[0] + few[1] * plan.at_once)


def _few(player: Player, batch: Batch, precision: str) -> tuple[int, int] | None:
    """What a batch keeps for the way back, in bytes: so much, and so much for each item. None: few cannot be tried."""
    items = _items(batch)
    counts = (2, 4) if items >= 8 else (1, 2) if items >= 4 else (0, 1)
    kept = []
    try:
        with _untouched(player):
            for count in filter(None, counts):
                part = {
                    name: value[: len(value) // items * count] if _has_rows(value, items) else value
                    for name, value in batch.items()
                }
                kept.append(_activations(player, part, precision))
    except Exception as error:
        if out_of_memory(error):
            raise
        return None  # such as batch norm, for which one item is too few
    kept = kept if counts[0] else [0, *kept]
    each = max(1, (kept[1] - kept[0]) // (counts[1] - counts[0]))
    return kept[0] - each * counts[0], each


def _items(batch: Batch) -> int:
    """How many a batch has; an entry may have several rows for each."""
    return min((len(value) for value in batch.values() if _has_rows(value)), default=1)


def _has_rows(value: Any, items: int = 1) -> bool:
    rows = value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, list)
    return rows and len(value) > 0 and len(value) % items == 0


def _compiled(player: Player) -> bool:
    return any(module._compiled_call_impl is not None for module in player.model.modules())


def _timed(players: Sequence[Player], player: Player, batch: Batch, precision: str) -> tuple[float, int]:
    """The seconds of one pass, and the bytes that it keeps for the way back."""
    with _untouched(player):
        begun = time.perf_counter()
        kept = _activations(player, batch, precision)
        times = [] if _compiled(player) else [time.perf_counter() - begun]  # the first pass compiles
        while not times or (len(times) < 4 and team().any(sum(times) < 1)):
            times.append(_pass(player, batch, precision))
    for other in players:
        other.model.zero_grad(set_to_none=True)
    return min(times), kept


@contextmanager
def _untouched(player: Player) -> Iterator[None]:
    """Afterwards the player's buffers are as before, and there are no gradients."""
    buffers = [(buffer, buffer.clone()) for buffer in player.model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        player.model.zero_grad(set_to_none=True)


def _activations(player: Player, batch: Batch, precision: str) -> int:
    """The bytes that autograd keeps between forward and backward, each storage counted once."""
    kept: dict[int, int] = {}
    weights = {local(p).untyped_storage().data_ptr() for p in player.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _pass(player, batch, precision)
    return sum(kept.values())


def _pass(player: Player, batch: Batch, precision: str) -> float:
    device = next(player.model.parameters()).device
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
    """Of the part that this process holds."""
    return local(value).numel() * value.element_size() if isinstance(value, Tensor) else 0


def _count(count: int) -> str:
    if count < 1e5:
        return f"{count:,}"
    return f"{count / 1e6:.1f} M" if count < 1e9 else f"{count / 1e9:.2f} B"
