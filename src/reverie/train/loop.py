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

Under torchrun (train/parallel.py) every process runs the loop. `batches` then gives this process's part of each batch;
losses, norms and decisions are those of all of them. Between the steps the recipe does the same everywhere, and the
run folder takes only what the first process writes.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reverie import rng
from reverie.errors import InputError
from reverie.train import checkpoint, evidence, parallel, plan
from reverie.train import precision as formats
from reverie.train.allocator import kept_memory
from reverie.train.batches import Batch, Batches, moved
from reverie.train.ema import Ema
from reverie.train.log import Run, refuse_difference
from reverie.train.machine import described, deterministic
from reverie.train.parallel import Losses, Quiet, local, mean, team
from reverie.train.schedule import constant
from reverie.train.signals import Asked, listening
from reverie.train.watch import Watch


class NonFiniteError(InputError):
    """A loss or gradient was not finite and the policy gave up; the weights never saw it."""


class Stopped(SystemExit):
    """Stopped by a signal, with a checkpoint. Exit code 85 (start me again), or 130 after Ctrl-C."""


class Replayed(SystemExit):
    """A step was computed again, and nothing else was done. Exit code 0 if it gave the same to the bit, else 1."""


def _always(step: int) -> bool:
    return True


@dataclass
class Player:
    """A model, its loss and its optimizer.

    `loss` takes a batch and gives {"loss": scalar, named scalar parts}; by default `model.loss`. `schedule`
    gives the factor on the optimizer's lr by the step from 0. `clip` bounds the norm of the gradient. With
    several players each needs a `name`, which prefixes its files and metrics. A player sits out the steps of which
    `plays` says no: its weights, its optimizer and its average stay as they are, and it has no metrics.
    """

    model: nn.Module
    _: KW_ONLY
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float] = constant
    ema: Ema | None = None
    clip: float | None = None
    loss: Callable[[Batch], Losses] = None  # type: ignore[assignment]  # None: model.loss
    name: str = ""
    plays: Callable[[int], bool] = _always

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
    `loss`, `grad_norm` and `lr` are the first player's, who plays always. What a skipped step left out is nan."""

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
    asked: bool = False  # by SIGUSR2

    @property
    def metrics(self) -> dict[str, float]:
        """Losses, gradient norms and learning rates, ready for `run.log`."""
        return self.losses | self.norms | self.rates

    @property
    def last(self) -> bool:
        """Whether this is the final step."""
        return self.number == self.steps

    def every(self, n: int) -> bool:
        """Whether what is done every `n` steps and at the end is due; SIGUSR2 asks for all of it now."""
        return self.number % n == 0 or self.last or self.asked


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
    background: bool = False,
    spikes: float = 8.0,
    replay: int | None = None,
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
    background     copy what a checkpoint holds, and write it while training goes on; at most one at a time
    spikes         a loss so many standard deviations above the last ones leaves evidence (train/evidence.py), as one
                   that is not finite does; 0: no loss does
    replay         train nothing, compute this step again from its evidence (0: the newest), and raise Replayed

    SIGTERM, SIGINT and SIGUSR1 write a checkpoint after the current step and raise Stopped; a second one acts
    at once. SIGUSR2 makes all that is done between steps due after this one, and saves. Raises InputError when
    the run folder holds a run with another configuration, seed, precision or optimizer.
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
    assert players[0].plays is _always, "the first player's loss is the step's"
    home = torch.device(device) if device is not None else next(players[0].model.parameters()).device
    for player in players:
        places = {p.device.type for p in player.model.parameters()}
        if places != {home.type}:
            raise InputError(
                f"A model is on {'/'.join(sorted(places))} and training on {home}; move the model first."
            )
    return _Loop(
        players=players,
        batches=Batches(
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
        background=background,
        spikes=spikes,
        replay=replay,
    ).run_through()


@dataclass(kw_only=True)
class _Counts:
    """What a checkpoint remembers besides tensors."""

    step: int = 0
    skipped: list[int] = field(default_factory=list)
    in_a_row: int = 0
    items: int = 0
    bad: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)  # of each player, the last ones


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
    batches: Batches
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
    background: bool
    spikes: float
    replay: int | None
    quiet: dict[str, Quiet] = field(default_factory=dict)
    saver: ThreadPoolExecutor | None = None
    saving: Future[Path] | None = None
    counts: _Counts = field(default_factory=_Counts)
    left_out: dict[int, _Trouble] = field(default_factory=dict)
    rollbacks: int = 0
    drawn: float = field(default_factory=time.monotonic)

    def run_through(self) -> Iterator[Step]:
        run = self.run
        run.open()
        try:
            with (
                listening() as asked,
                deterministic(self.deterministic),
                kept_memory(self.device),
                Watch(run, device=self.device, steps=self.steps) as watch,
            ):
                if self.replay is not None:
                    raise Replayed(0 if self._replay(self.replay or None) else 1)
                self._begin()
                watch.begin(self.counts.step)
                self._join()
                modes = [_modes(player.model) for player in self.players]
                if self.estimate and self.counts.step < self.steps:
                    watch.said = self._say_plan()
                while self.counts.step < self.steps:
                    watch.start()
                    step = self._step(modes, asked)
                    if step is None:  # rolled back
                        continue
                    watch.done(step)
                    yield step
                    stop = self._agreed(asked)
                    if step.every(self.save_every) or stop is not None:
                        self._save(draw=step.last or step.asked or stop is not None)
                    if stop is not None:
                        self._settle()
                        run.say(f"{stop.name}: stopped after step {step.number}; the same command goes on.")
                        raise Stopped(130 if stop == signal.SIGINT else 85)
                self._settle()
        finally:
            self.batches.close()
            if self.saver is not None:
                self.saver.shutdown()
            run.close()

    def _join(self) -> None:
        """From here on each player's loss is that of all processes."""
        for player in self.players:
            player.loss, self.quiet[player.name] = parallel.together(player.model, player.loss)

    def _agreed(self, asked: Asked) -> signal.Signals | None:
        """Whether the processes stop here. A background save that failed in one of them fails in all."""
        failed = self.saving is not None and self.saving.done() and self.saving.exception() is not None
        heard = team().hear([asked.stop and int(asked.stop), failed])
        if any(failed for _, failed in heard):
            self._settle()
        return next((signal.Signals(number) for number, _ in heard if number), None)

    # ------------------------------------------------------------ one step

    def _step(self, modes: list[dict[nn.Module, bool]], asked: Asked) -> Step | None:
        """Does the next step; None when it rolled back instead."""
        at, begun = self.counts.step, time.perf_counter()
        playing = [(p, mode) for p, mode in zip(self.players, modes, strict=True) if p.plays(at)]
        losses = {p._key("loss"): math.nan for p, _ in playing}
        norms = {p._key("grad_norm"): math.nan for p, _ in playing}
        rates = {p._key("lr"): p.schedule(at) * p.optimizer.param_groups[0]["initial_lr"] for p, _ in playing}
        items, trouble = 0, self.left_out.get(at)
        if trouble is None:
            for player, mode in playing:
                trouble = self._update(player, mode, at, losses, norms)
                if trouble is not None:
                    break
            if trouble is not None and self.non_finite == "rollback":
                self._roll_back(at, trouble)
                return None
        items, now = self._count_samples(at, asked)
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
            asked=now,
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
        buffers = [(buffer, buffer.clone()) for buffer in player.model.buffers()]
        values, norm, own = self._gradients(player, mode, at)
        total = values[-1][1]
        means: dict[str, float] = {}
        for name, value in values[:-1]:
            key = player._key(name)
            means[key] = means.get(key, 0.0) + value / self.accumulate
        losses.update(means)
        norms[player._key("grad_norm")] = total
        finite = all(math.isfinite(value) for name, value in values if name in ("loss", "grad_norm"))
        trouble = None if finite else self._trouble(player, at, own, total)
        self._keep_evidence(player, at, values, means[player._key("loss")], trouble, buffers)
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

    def _gradients(
        self, player: Player, mode: dict[nn.Module, bool], at: int
    ) -> tuple[list[tuple[str, float]], Tensor, list[float]]:
        """Leaves a step's gradients in the weights. The named numbers of every batch in turn and last the norm, means
        over the processes; the norm again as a tensor; this process's own losses."""
        for module, training in mode.items():
            module.training = training
        self._clear_gradients()
        parts: list[Losses] = []
        others = (team().rank,) if team().rank else ()  # the first process draws what a single one does
        for micro in range(self.accumulate):
            batch = self.batches(at, micro)
            torch.manual_seed(rng.integer(self.seed, "step", at, player.name, micro, *others))
            with self.quiet[player.name](micro + 1 == self.accumulate):
                with formats.autocast(self.precision, self.device):
                    found = player.loss(batch)
                assert all(v.numel() == 1 for v in found.values()), "loss(batch) must give scalars"
                (found["loss"] / self.accumulate).backward()
            parts.append(
                {
                    name: value.detach().to(self.device, torch.float32).reshape(())
                    for name, value in found.items()
                }
            )
        gradients = [p.grad for g in player.optimizer.param_groups for p in g["params"] if p.grad is not None]
        assert gradients, "the loss depends on no parameter that the optimizer trains"
        norm = parallel.full(nn.utils.get_total_norm(gradients))
        names = [name for part in parts for name in part]
        own = torch.stack([value for part in parts for value in part.values()] + [norm.float()])
        values = [*zip([*names, "grad_norm"], mean(own).tolist(), strict=True)]
        return (
            values,
            norm,
            [value for name, value in zip(names, own.tolist(), strict=False) if name == "loss"],
        )

    def _trouble(self, player: Player, at: int, own: list[float], norm: float) -> _Trouble:
        """What was not finite, by the processes that had it: the loss of a batch, or else the gradient."""
        wrong = [micro for micro, value in enumerate(own) if not math.isfinite(value)][:1]
        heard = team().hear([[f"{own[micro]}", self.batches.info[at, micro].ids] for micro in wrong])
        if losses := [told for said in heard for told in said]:
            ids = [i for _, some in losses for i in some]
            return _Trouble(what=f"{player._key('loss')} is {losses[0][0]} at step {at + 1}", ids=ids)
        ids = [i for some in team().hear(self.batches.ids(at)) for i in some]
        return _Trouble(what=f"{player._key('gradient')} has norm {norm} at step {at + 1}", ids=ids)

    def _clear_gradients(self) -> None:
        for player in self.players:  # a generator's loss also leaves gradients in its discriminator
            player.model.zero_grad(set_to_none=True)

    def _count_samples(self, at: int, asked: Asked) -> tuple[int, bool]:
        """How many items the step had, and whether one of the processes was asked to save and sample now."""
        info = [entry for (step, _), entry in self.batches.info.items() if step == at]
        bad = [sample for entry in info for sample in entry.bad]
        now, asked.now = asked.now, False
        heard = team().hear([sum(entry.items for entry in info), bad, now])
        items, now = sum(count for count, _, _ in heard), any(here for _, _, here in heard)
        bad = [(path, reason) for _, some, _ in heard for path, reason in some]
        self.run.bad(at + 1, bad)
        counts = self.counts
        counts.items, counts.bad = counts.items + items, counts.bad + len(bad)
        enough = counts.items >= 64 or at + 1 == self.steps
        if enough and counts.bad > self.max_bad * counts.items:
            raise InputError(
                f"{counts.bad} of {counts.items} samples could not be read, more than the {self.max_bad:.0%} "
                f"allowed; see {self.run.folder / 'bad_samples.jsonl'}, mend or remove them, and start again."
            )
        return items, now

    # ------------------------------------------------------------ evidence

    def _keep_evidence(
        self,
        player: Player,
        at: int,
        values: list[tuple[str, float]],
        loss: float,
        trouble: _Trouble | None,
        buffers: list[tuple[Tensor, Tensor]],
    ) -> None:
        """Of a step that stands out: its weights, which have not moved yet, and what it computed."""
        before = self.counts.losses.setdefault(player.name, [])
        reason = trouble.what if trouble else evidence.spike(loss, before, sigmas=self.spikes)
        if math.isfinite(loss):
            before.append(loss)
            del before[: -evidence.WINDOW]
        if not reason or not self.spikes:
            return
        ids = [i for said in team().hear(self.batches.ids(at)) for i in said]
        if not trouble:
            self.run.event(at + 1, event="spike", reason=reason, ids=ids)
        kept = {id(buffer): clone for buffer, clone in buffers}
        tensors = {
            other._file("model"): {
                name: kept.get(id(value), value.detach())
                for name, value in checkpoint.model_tensors(other.model, detach=False).items()
            }
            for other in self.players
        }
        state = evidence.about(
            reason=reason, player=player.name, step=at, values=evidence.exact(values), ids=ids
        ) | {"settings": self._settings(), "machine": described(self.device)}
        try:
            where = self.run.evidence / player.name
            path = checkpoint.save(where, at + 1, tensors=tensors, state=state, keep=3, team=team())
        except InputError as error:  # a full disk stops a run at its next checkpoint, not here
            self.run.say(f"step {at + 1}: {reason}; there is no evidence of it: {error}")
            return
        if not trouble:
            self.run.say(f"step {at + 1}: {reason}; its evidence is in {path}")

    def _replay(self, step: int | None) -> bool:
        """Computes a step again from its evidence and says what came out; whether it is the same to the bit."""
        paths = evidence.find(self.run.evidence, step)
        self.run.check()
        self._join()
        modes = {player.name: _modes(player.model) for player in self.players}
        same = [self._compute_again(path, modes) for path in paths]
        return all(same)

    def _compute_again(self, path: Path, modes: dict[str, dict[nn.Module, bool]]) -> bool:
        state = checkpoint.read_state(path)
        refuse_difference(state["settings"], self._settings(), where=str(path))
        for player in self.players:
            checkpoint.restore(checkpoint.model_tensors(player.model), path, player._file("model"))
        (player,) = [player for player in self.players if player.name == state["player"]]
        values, _, _ = self._gradients(player, modes[player.name], state["step"])
        same, lines = evidence.compare(state["values"], evidence.exact(values))
        ids = [i for said in team().hear(self.batches.ids(state["step"])) for i in said]
        lines.append(f"samples: {', '.join(map(str, ids)) or 'without names'}")
        if ids != state["ids"]:
            lines.append(f"these are not the samples of that time: {', '.join(map(str, state['ids']))}")
        if not same and state["machine"] != described(self.device):
            lines.append(f"that was on {state['machine']}, this is {described(self.device)}")
        self.run.say("\n".join([f"step {state['step'] + 1} again, since {state['reason']}", *lines]))
        return same

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
        self._settle()
        path = self._latest()
        assert path is not None, "rollback keeps a checkpoint from the first step on"
        self._restore(path)
        self.run.rewind(self.counts.step)
        self.run.say(f"{trouble}; back to step {self.counts.step}, and that batch is left out")

    # ------------------------------------------------------------ checkpoints

    def _begin(self) -> None:
        folder = self.run.checkpoints
        if team().first:
            checkpoint.clean(folder)
            for player in self.players:
                checkpoint.clean(self.run.evidence / player.name)
        path = self._latest()
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
        team().hear()  # the others have read it all
        if team().first:
            checkpoint.set_aside(folder, after=path)
        self.run.start(self.counts.step)
        self.run.say(f"going on after step {self.counts.step}, from {path}")
        here = described(self.device)
        then = state["machine"]
        changed = [
            f"{key} {then.get(key)}, now {value}" for key, value in here.items() if then.get(key) != value
        ]
        if changed and self.counts.step < self.steps:
            self.run.say(
                f"the checkpoint was made with {'; '.join(changed)}: the run goes on, but not bit for bit as it would "
                "have there"
            )

    def _latest(self) -> Path | None:
        """The newest whole checkpoint, which the first process looks for."""
        found = checkpoint.latest(self.run.checkpoints, report=self.run.say) if team().first else None
        name = team().hear(found and found.name)[0]
        return name and self.run.checkpoints / name

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
        self._settle()
        tensors: dict[str, Mapping[str, Tensor]] = {}
        scalars: dict[str, Any] = {}
        for player in self.players:
            wrong = [n for n, p in player.model.named_parameters() if not torch.isfinite(local(p)).all()]
            if wrong := [name for names in team().hear(wrong[:1]) for name in names]:
                raise NonFiniteError(
                    f"{wrong[0]} is not finite after step {self.counts.step}, so no checkpoint is written; "
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
            "machine": described(self.device),
        }
        where, at, keep = self.run.checkpoints, self.counts.step, self.keep
        if self.background:
            copies = {
                file: {k: parallel.copied(v) for k, v in group.items()} for file, group in tensors.items()
            }
            self.saver = self.saver or ThreadPoolExecutor(1, thread_name_prefix="saves")
            self.saving = self.saver.submit(
                checkpoint.save, where, at, tensors=copies, state=about, keep=keep, team=team("saves")
            )
        else:
            checkpoint.save(where, at, tensors=tensors, state=about, keep=keep, team=team())
        self.rollbacks = 0
        if draw or time.monotonic() - self.drawn > 120:
            self.run.curves()
            self.drawn = time.monotonic()

    def _settle(self) -> None:
        """Waits for the background save, and raises what it raised."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def _restore(self, path: Path) -> None:
        state = checkpoint.read_state(path)
        for player in self.players:
            checkpoint.restore(checkpoint.model_tensors(player.model), path, player._file("model"))
            scalars = state["players"][player.name]
            checkpoint.restore_optimizer(
                player.model, player.optimizer, path, player._file("optimizer"), scalars["optimizer"]
            )
            if player.ema is not None:
                checkpoint.restore(player.ema.average, path, player._file("ema"))
                player.ema.updates = scalars["ema_updates"]
        self.counts = _Counts(**state["counts"])

    def _say_plan(self) -> plan.Plan:
        first = self.batches(self.counts.step, 0)
        begun = time.perf_counter()
        # again: the first call may open files and fill caches; and a second batch may be of another kind
        last = dict(self.batches.function(self.counts.step, min(1, self.accumulate - 1)))
        last.pop("bad", None)
        loading = 0.0 if self.batches.ahead else time.perf_counter() - begun
        told = plan.estimate(
            self.players,
            [first] if self.accumulate == 1 else [first, moved(last, self.device)],
            steps=self.steps - self.counts.step,
            loading=loading,
            accumulate=self.accumulate,
            precision=self.precision,
            settings=self.run.config,
        )
        self.run.say(str(told))
        return told


def _modes(model: nn.Module) -> dict[nn.Module, bool]:
    """Puts `model` in training mode, its frozen parts in evaluation mode, and says which is which."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
    return {module: module.training for module in model.modules()}
