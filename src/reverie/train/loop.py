"""The loop: a generator over training steps. One player is the usual case, two are a GAN.

    run = Run(folder, config)
    player = Player(model, optimizer=adamw(model, lr=1e-3), schedule=..., ema=Ema(model), clip=1.0)
    for step in train([player], batches, run=run, steps=1000):
        run.log(step.number, step.metrics)          # log, evaluate, sample: in plain sight, between the steps

Convention: `batches(step, micro)` and `schedule(step)` count from 0 and are pure functions; `Step.number` and
the names of checkpoints count the steps done, so the first is 1. A checkpoint is written when the recipe asks
for the next step, hence after what it did with this one. In one step every player in turn sees the same
batches.

Resume equals the uninterrupted run bit for bit on a CPU with the same number of threads: batches are
functions of the step, torch's global generator is seeded from (seed, step, player, micro) before every
forward pass, and models, optimizers and averages are restored exactly.
"""

from __future__ import annotations

import math
import os
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reverie import rng
from reverie.errors import InputError
from reverie.train import checkpoint, plan
from reverie.train import precision as formats
from reverie.train.allocator import kept_memory
from reverie.train.ema import Ema
from reverie.train.log import Run, refuse_difference
from reverie.train.schedule import constant

Batch = Mapping[str, Any]
Losses = Mapping[str, Tensor]


class NonFiniteError(InputError):
    """A loss or gradient was not finite and the policy gave up; the weights never saw it."""


class Stopped(SystemExit):
    """Stopped by a signal, with a checkpoint. Exit code 85 (start me again), or 130 after Ctrl-C."""


@dataclass
class Player:
    """A model, its loss and its optimizer.

    `loss` takes a batch and gives {"loss": scalar, named scalar parts}; by default `model.loss`. `schedule`
    gives the factor on the optimizer's lr by the step from 0. `clip` bounds the norm of the gradient. With
    several players each needs a `name`, which prefixes its files and metrics.
    """

    model: nn.Module
    _: KW_ONLY
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float] = constant
    ema: Ema | None = None
    clip: float | None = None
    loss: Callable[[Batch], Losses] = None  # type: ignore[assignment]  # None: model.loss
    name: str = ""

    def __post_init__(self) -> None:
        if self.loss is None:
            self.loss = self.model.loss
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def _file(self, kind: str) -> str:
        return f"{self.name}-{kind}" if self.name else kind

    def _key(self, metric: str) -> str:
        return f"{self.name}/{metric}" if self.name else metric


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step, done or skipped. With several players `losses`, `norms`, `rates` have keys "name/loss";
    `loss`, `grad_norm` and `lr` are the first player's. What a skipped step did not compute is nan."""

    number: int
    steps: int
    losses: dict[str, float]
    norms: dict[str, float]
    rates: dict[str, float]
    loss: float
    grad_norm: float
    lr: float
    items: int
    seconds: float
    skipped: bool

    @property
    def metrics(self) -> dict[str, float]:
        """Losses, gradient norms and learning rates, ready for `run.log`."""
        return self.losses | self.norms | self.rates

    @property
    def last(self) -> bool:
        """Whether this is the final step."""
        return self.number == self.steps

    def every(self, n: int) -> bool:
        """Whether what is done every `n` steps and at the end is due."""
        return self.number % n == 0 or self.last


def train(
    players: Sequence[Player],
    batches: Callable[[int, int], Batch],
    *,
    run: Run,
    steps: int,
    seed: int = 0,
    accumulate: int = 1,
    precision: str = "auto",
    non_finite: str = "stop",
    max_skips: int = 10,
    max_bad: float = 0.2,
    save_every: int = 500,
    keep: int | None = 3,
    resume: str = "auto",
    device: torch.device | str | None = None,
    prefetch: int = 0,
    estimate: bool = True,
    deterministic: bool | None = None,
) -> Iterator[Step]:
    """Trains until `steps` steps are done, going on from the newest whole checkpoint in `run` if there is
    one.

    batches        dict of tensors by (step, micro); may carry "ids" (named when a step fails) and "bad",
                   pairs (path, reason) that were replaced: these are listed in bad_samples.jsonl, and a share
                   above `max_bad` stops the run
    accumulate     how many batches make one step
    precision      auto, fp32 or bf16 (autocast)
    non_finite     what follows a loss or gradient that is nan or inf, before the weights see it: "stop"
                   raises NonFiniteError; "skip" leaves no trace of the step (with several players: of this
                   one's and the later ones'), at most `max_skips` in a row; "rollback" goes back to the last
                   checkpoint and leaves that step's batch out, at most `max_skips` times from there
    save_every     steps between checkpoints, the newest `keep` of which stay (None: all); so is the end
    resume         auto, must (InputError without a checkpoint) or never (InputError with one)
    prefetch       how many batches a thread prepares ahead; they must not draw from global generators then
    estimate       say time and memory before the first step
    deterministic  ask torch for deterministic kernels; by default on a CPU

    SIGTERM, SIGINT and SIGUSR1 write a checkpoint after the current step and raise Stopped; a second one acts
    at once. Raises InputError when the run folder holds a run with another configuration, seed, precision or
    optimizer.
    """
    players = list(players)
    if len({player.name for player in players}) != len(players):
        raise InputError(
            "Several players need different names, for their files and metrics; give each its `name`."
        )
    for name, choice, allowed in (
        ("non_finite", non_finite, ("stop", "skip", "rollback")),
        ("resume", resume, ("auto", "must", "never")),
    ):
        if choice not in allowed:
            raise InputError(f"{name} is {choice!r}; choose {', '.join(allowed)}.")
    for name, value in (
        ("steps", steps),
        ("accumulate", accumulate),
        ("save_every", save_every),
        ("keep", keep),
    ):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1.")
    home = torch.device(device) if device is not None else next(players[0].model.parameters()).device
    for player in players:
        places = {p.device.type for p in player.model.parameters()}
        if places != {home.type}:
            raise InputError(
                f"A model is on {'/'.join(sorted(places))} and training on {home}; move the model first."
            )
    return _Loop(
        players=players,
        batches=_Batches(
            batches, steps=steps, accumulate=accumulate, ahead=prefetch, keep=len(players) > 1, device=home
        ),
        run=run,
        steps=steps,
        seed=seed,
        accumulate=accumulate,
        precision=formats.resolve(precision, home),
        non_finite=non_finite,
        max_skips=max_skips,
        max_bad=max_bad,
        save_every=save_every,
        keep=keep,
        resume=resume,
        device=home,
        estimate=estimate,
        deterministic=home.type == "cpu" if deterministic is None else deterministic,
    ).run_through()


@dataclass(kw_only=True)
class _Counts:
    """What a checkpoint remembers besides tensors."""

    step: int = 0
    skipped: list[int] = field(default_factory=list)
    in_a_row: int = 0
    items: int = 0
    bad: int = 0


@dataclass(frozen=True, kw_only=True)
class _Trouble:
    what: str
    ids: list[Any]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.ids[:32])) + (", ..." if len(self.ids) > 32 else "")
        return self.what + (f" on samples {shown}" if self.ids else "")


@dataclass(kw_only=True)
class _Loop:
    players: list[Player]
    batches: _Batches
    run: Run
    steps: int
    seed: int
    accumulate: int
    precision: str
    non_finite: str
    max_skips: int
    max_bad: float
    save_every: int
    keep: int | None
    resume: str
    device: torch.device
    estimate: bool
    deterministic: bool
    counts: _Counts = field(default_factory=_Counts)
    left_out: dict[int, _Trouble] = field(default_factory=dict)
    rollbacks: int = 0
    drawn: float = field(default_factory=time.monotonic)

    def run_through(self) -> Iterator[Step]:
        run = self.run
        run.open()
        try:
            with _signals() as caught, _deterministic(self.deterministic), kept_memory(self.device):
                self._begin()
                modes = [_modes(player.model) for player in self.players]
                if self.estimate and self.counts.step < self.steps:
                    self._say_plan()
                while self.counts.step < self.steps:
                    step = self._step(modes)
                    if step is None:  # rolled back
                        continue
                    run.progress(step.number, self.steps, loss=step.loss, items=step.items)
                    yield step
                    if step.every(self.save_every) or caught:
                        self._save(draw=step.last or bool(caught))
                    if caught:
                        run.say(
                            f"{caught[0].name}: stopped after step {step.number}; the same command goes on."
                        )
                        raise Stopped(130 if caught[0] == signal.SIGINT else 85)
        finally:
            self.batches.close()
            run.close()

    # ------------------------------------------------------------ one step

    def _step(self, modes: list[dict[nn.Module, bool]]) -> Step | None:
        """Does the next step; None when it rolled back instead."""
        at, begun = self.counts.step, time.perf_counter()
        losses = {p._key("loss"): math.nan for p in self.players}
        norms = {p._key("grad_norm"): math.nan for p in self.players}
        rates = {
            p._key("lr"): p.schedule(at) * p.optimizer.param_groups[0]["initial_lr"] for p in self.players
        }
        items, trouble = 0, self.left_out.get(at)
        if trouble is None:
            for player, mode in zip(self.players, modes, strict=True):
                trouble = self._update(player, mode, at, losses, norms)
                if trouble is not None:
                    break
            if trouble is not None and self.non_finite == "rollback":
                self._roll_back(at, trouble)
                return None
            items = self._count_samples(at)
        self.counts.step += 1
        if trouble is None:
            self.counts.in_a_row = 0
        else:
            self._skip(trouble)
        first = self.players[0]
        return Step(
            number=self.counts.step,
            steps=self.steps,
            losses=losses,
            norms=norms,
            rates=rates,
            loss=losses[first._key("loss")],
            grad_norm=norms[first._key("grad_norm")],
            lr=rates[first._key("lr")],
            items=items,
            seconds=time.perf_counter() - begun,
            skipped=trouble is not None,
        )

    def _update(
        self,
        player: Player,
        mode: dict[nn.Module, bool],
        at: int,
        losses: dict[str, float],
        norms: dict[str, float],
    ) -> _Trouble | None:
        """Moves one player's weights, unless a loss or gradient is not finite: then nothing of it stays."""
        for module, training in mode.items():
            module.training = training
        self._clear_gradients()
        buffers = [(buffer, buffer.clone()) for buffer in player.model.buffers()]
        parts: list[Losses] = []
        for micro in range(self.accumulate):
            batch = self.batches(at, micro)
            torch.manual_seed(rng.integer(self.seed, "step", at, player.name, micro))
            with formats.autocast(self.precision, self.device):
                parts.append(player.loss(batch))
            assert all(v.numel() == 1 for v in parts[-1].values()), "loss(batch) must give scalars"
            (parts[-1]["loss"] / self.accumulate).backward()
            parts[-1] = {
                name: value.detach().to(self.device, torch.float32).reshape(())
                for name, value in parts[-1].items()
            }
        gradients = [p.grad for g in player.optimizer.param_groups for p in g["params"] if p.grad is not None]
        assert gradients, "the loss depends on no parameter that the optimizer trains"
        norm = nn.utils.get_total_norm(gradients)
        *values, total = torch.stack(
            [value for part in parts for value in part.values()] + [norm.float()]
        ).tolist()
        names = [name for part in parts for name in part]
        means: dict[str, float] = {}
        for name, value in zip(names, values, strict=True):
            key = player._key(name)
            means[key] = means.get(key, 0.0) + value / self.accumulate
        losses.update(means)
        norms[player._key("grad_norm")] = total
        trouble = self._trouble(
            player, at, [v for n, v in zip(names, values, strict=True) if n == "loss"], total
        )
        if trouble is None:
            if player.clip is not None:
                parameters = [p for group in player.optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grads_with_norm_(parameters, player.clip, norm)
            for group in player.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * player.schedule(at)
            player.optimizer.step()
            if player.ema is not None:
                player.ema.update(player.model)
        else:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        self._clear_gradients()
        return trouble

    def _trouble(self, player: Player, at: int, values: list[float], norm: float) -> _Trouble | None:
        for micro, value in enumerate(values):
            if not math.isfinite(value):
                ids = self.batches.info[at, micro].ids
                return _Trouble(what=f"{player._key('loss')} is {value} at step {at + 1}", ids=ids)
        if not math.isfinite(norm):
            ids = [i for micro in range(self.accumulate) for i in self.batches.info[at, micro].ids]
            return _Trouble(what=f"{player._key('gradient')} has norm {norm} at step {at + 1}", ids=ids)
        return None

    def _clear_gradients(self) -> None:
        for player in self.players:  # a generator's loss also leaves gradients in its discriminator
            player.model.zero_grad(set_to_none=True)

    def _count_samples(self, at: int) -> int:
        info = [self.batches.info[at, micro] for micro in range(self.accumulate)]
        items = sum(entry.items for entry in info)
        bad = [sample for entry in info for sample in entry.bad]
        self.run.bad(at + 1, bad)
        counts = self.counts
        counts.items, counts.bad = counts.items + items, counts.bad + len(bad)
        enough = counts.items >= 64 or at + 1 == self.steps
        if enough and counts.bad > self.max_bad * counts.items:
            raise InputError(
                f"{counts.bad} of {counts.items} samples could not be read, more than the {self.max_bad:.0%} "
                f"allowed; see {self.run.folder / 'bad_samples.jsonl'}, mend or remove them, and start again."
            )
        return items

    # ------------------------------------------------------------ steps that fail

    def _skip(self, trouble: _Trouble) -> None:
        counts = self.counts
        if self.non_finite == "stop":
            raise NonFiniteError(
                f"{trouble}; the weights did not see it. Lower the learning rate, look at these samples, or "
                "choose non_finite='skip' or 'rollback'; the run goes on from its last checkpoint."
            )
        counts.in_a_row += 1
        if counts.in_a_row > self.max_skips:
            raise NonFiniteError(
                f"{trouble}; {counts.in_a_row} such steps in a row are more than the {self.max_skips} "
                "allowed. Lower the learning rate, or go on from an earlier checkpoint."
            )
        counts.skipped.append(counts.step)
        self.run.event(counts.step, event="skipped", reason=trouble.what, ids=trouble.ids)
        self.run.say(f"{trouble}; the step is skipped")

    def _roll_back(self, at: int, trouble: _Trouble) -> None:
        self.rollbacks += 1
        if self.rollbacks > self.max_skips:
            raise NonFiniteError(
                f"{trouble}; {self.rollbacks} rollbacks to one checkpoint are more than the {self.max_skips} "
                "allowed. Lower the learning rate, or go on from an earlier checkpoint."
            )
        self.left_out[at] = trouble
        path = checkpoint.latest(self.run.checkpoints, report=self.run.say)
        assert path is not None, "rollback keeps a checkpoint from the first step on"
        self._restore(path)
        self.run.rewind(self.counts.step)
        self.run.say(f"{trouble}; back to step {self.counts.step}, and that batch is left out")

    # ------------------------------------------------------------ checkpoints

    def _begin(self) -> None:
        folder = self.run.checkpoints
        checkpoint.clean(folder)
        path = checkpoint.latest(folder, report=self.run.say)
        if path is None and checkpoint.steps(folder):
            raise InputError(
                f"Every checkpoint in {folder} is damaged; move the folder away to start afresh."
            )
        if path is None and self.resume == "must":
            raise InputError(
                f"{folder} holds no checkpoint to go on from; check the folder, or choose resume='auto'."
            )
        if path is not None and self.resume == "never":
            raise InputError(
                f"{self.run.folder} already holds a run; name a new folder, or choose resume='auto'."
            )
        if path is None:
            self.run.start(0)
            if self.non_finite == "rollback":
                self._save(draw=False)
            return
        state = checkpoint.read_state(path)
        self.run.check()
        refuse_difference(state["settings"], self._settings(), where=str(self.run.folder))
        self._restore(path)
        checkpoint.set_aside(folder, after=path)
        self.run.start(self.counts.step)
        self.run.say(f"going on after step {self.counts.step}, from {path}")
        if state["machine"] != _machine(self.device):
            self.run.say(
                f"the checkpoint was made on {state['machine']}, this is {_machine(self.device)}: "
                "the run goes on, but not bit for bit as it would have there"
            )

    def _settings(self) -> dict[str, Any]:
        """What the results depend on besides the recipe's configuration."""
        return {
            "seed": self.seed,
            "accumulate": self.accumulate,
            "precision": self.precision,
            "players": {
                player.name: {
                    "clip": player.clip,
                    "ema": None
                    if player.ema is None
                    else {"decay": player.ema.decay, "warmup": player.ema.warmup},
                    "optimizer": {
                        str(i): group for i, group in enumerate(checkpoint.groups(player.optimizer))
                    },
                }
                for player in self.players
            },
        }

    def _save(self, *, draw: bool) -> None:
        tensors: dict[str, Mapping[str, Tensor]] = {}
        scalars: dict[str, Any] = {}
        for player in self.players:
            for name, parameter in player.model.named_parameters():
                if not torch.isfinite(parameter).all():
                    raise NonFiniteError(
                        f"{name} is not finite after step {self.counts.step}, so no checkpoint is written; "
                        "lower the learning rate and go on from the last checkpoint."
                    )
            state, rest = checkpoint.optimizer_state(player.model, player.optimizer)
            tensors[player._file("model")] = checkpoint.model_tensors(player.model)
            tensors[player._file("optimizer")] = state
            scalars[player.name] = {"optimizer": rest, "ema_updates": player.ema.updates if player.ema else 0}
            if player.ema is not None:
                tensors[player._file("ema")] = player.ema.average
        self.run.sync()
        about = {
            "counts": asdict(self.counts),
            "settings": self._settings(),
            "players": scalars,
            "machine": _machine(self.device),
        }
        checkpoint.save(self.run.checkpoints, self.counts.step, tensors=tensors, state=about, keep=self.keep)
        self.rollbacks = 0
        if draw or time.monotonic() - self.drawn > 120:
            self.run.curves()
            self.drawn = time.monotonic()

    def _restore(self, path: Any) -> None:
        state = checkpoint.read_state(path)
        for player in self.players:
            checkpoint.restore(
                checkpoint.model_tensors(player.model), path / f"{player._file('model')}.safetensors"
            )
            scalars = state["players"][player.name]
            checkpoint.restore_optimizer(
                player.model,
                player.optimizer,
                path / f"{player._file('optimizer')}.safetensors",
                scalars["optimizer"],
            )
            if player.ema is not None:
                checkpoint.restore(player.ema.average, path / f"{player._file('ema')}.safetensors")
                player.ema.updates = scalars["ema_updates"]
        self.counts = _Counts(**state["counts"])

    def _say_plan(self) -> None:
        batch = self.batches(self.counts.step, 0)
        begun = time.perf_counter()
        self.batches.function(self.counts.step, 0)  # again: the first call may open files and fill caches
        loading = 0.0 if self.batches.ahead else time.perf_counter() - begun
        told = plan.estimate(
            self.players,
            batch,
            steps=self.steps - self.counts.step,
            loading=loading,
            accumulate=self.accumulate,
            precision=self.precision,
        )
        self.run.say(str(told))


# ---------------------------------------------------------------- batches


@dataclass(frozen=True, kw_only=True)
class _Info:
    items: int
    ids: list[Any]
    bad: list[tuple[str, str]]


class _Batches:
    """Calls the pure function of (step, micro), keeps what the step fetched, and may work ahead."""

    def __init__(
        self,
        function: Callable[[int, int], Batch],
        *,
        steps: int,
        accumulate: int,
        ahead: int,
        keep: bool,
        device: torch.device,
    ) -> None:
        self.function, self.steps, self.accumulate, self.ahead = function, steps, accumulate, ahead
        self.keep, self.device = keep, device
        self.info: dict[tuple[int, int], _Info] = {}
        self._cache: dict[tuple[int, int], Batch] = {}
        self._queue: deque[tuple[tuple[int, int], Future[Batch]]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, step: int, micro: int) -> Batch:
        key = (step, micro)
        if key not in self._cache:
            if any(old[0] != step for old in self.info):
                self.info.clear()
                self._cache.clear()
            if not self.keep:  # with one player, no micro-batch is needed twice
                self._cache.clear()
            batch = dict(self._get(key))
            bad = list(batch.pop("bad", ()))
            ids = batch.get("ids", ())
            ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
            sizes = [value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim]
            self.info[key] = _Info(items=len(ids) or (sizes[0] if sizes else 1), ids=ids, bad=bad)
            self._cache[key] = _moved(batch, self.device)
        return dict(self._cache[key])

    def _get(self, key: tuple[int, int]) -> Batch:
        if self.ahead < 1:
            return self.function(*key)
        if self._pool is None:  # the first one here, to see whether it is pure
            before = torch.get_rng_state()
            batch = self.function(*key)
            if not torch.equal(before, torch.get_rng_state()):
                raise InputError(
                    "batches() draws from torch's global generator; draw from rng.generator, or prefetch=0."
                )
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
            self._fill(key)
            return batch
        while self._queue and self._queue[0][0] != key:
            self._queue.popleft()[1].cancel()
        future = self._queue.popleft()[1] if self._queue else self._pool.submit(self.function, *key)
        self._fill(key)
        return future.result()

    def _fill(self, key: tuple[int, int]) -> None:
        assert self._pool is not None
        at = self._queue[-1][0] if self._queue else key
        while len(self._queue) < self.ahead:
            at = (at[0], at[1] + 1) if at[1] + 1 < self.accumulate else (at[0] + 1, 0)
            if at[0] >= self.steps:
                return
            self._queue.append((at, self._pool.submit(self.function, *at)))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _moved(inner, device) for key, inner in value.items()}
    return value


# ---------------------------------------------------------------- the process


def _modes(model: nn.Module) -> dict[nn.Module, bool]:
    """Puts `model` in training mode, its frozen parts in evaluation mode, and says which is which."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
    return {module: module.training for module in model.modules()}


def _machine(device: torch.device) -> dict[str, Any]:
    """What bits depend on."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return {
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "arch": platform.machine(),
    }


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects the first request to stop, after which the signals mean what they meant before."""
    caught: list[signal.Signals] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def on_signal(number: int, _: Any) -> None:
        caught.append(signal.Signals(number))
        restore()
        os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                number = getattr(signal, name)
                before[number] = signal.signal(number, on_signal)
    try:
        yield caught
    finally:
        restore()


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    memory: Any = torch.utils.deterministic  # a module with properties, which type checkers miss
    mode, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill
