import copy
import itertools
import json
import math
import threading
import time

import pytest
import torch
from torch import nn

from reverie import rng
from reverie.errors import InputError
from reverie.train import Ema, NonFiniteError, Player, Run, adamw, checkpoint, train


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr(Run, "curves", lambda self: None)  # half a second each; test_log.py draws them


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 4))

    def loss(self, batch):
        fit = (self.body(batch["x"]) - batch["x"]).square().mean()
        return {"loss": fit * batch["scale"].mean(), "fit": fit}


def clean(step, micro):
    x = torch.randn(6, 4, generator=rng.generator(0, "x", step, micro))
    return {"x": x, "scale": torch.ones(6), "ids": [f"{step}-{micro}-{i}" for i in range(6)]}


def poisoned(*steps, value=math.nan):
    def batches(step, micro):
        batch = clean(step, micro)
        if step in steps and micro == 0:
            batch["scale"] = torch.full((6,), value)
        return batch

    return batches


def make(seed=0, **arguments):
    torch.manual_seed(seed)
    model = Net()
    return Player(model, optimizer=adamw(model, lr=1e-2), ema=Ema(model, decay=0.9), **arguments)


def go(folder, batches=clean, player=None, config=None, **arguments):
    """Runs to the end and gives the player and the steps."""
    player = player or make()
    run = Run(folder, config, progress=False)
    arguments = {"steps": 8, "save_every": 3, "estimate": False} | arguments
    steps = []
    for step in train([player], batches, run=run, **arguments):
        run.log(step.number, step.metrics)
        steps.append(step)
    return player, steps


def state(player):
    values = {f"model.{k}": v for k, v in player.model.state_dict().items()}
    values |= {f"ema.{k}": v for k, v in player.ema.average.items()}
    values |= checkpoint.optimizer_state(player.model, player.optimizer)[0]
    return {name: value.clone() for name, value in values.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- the plain loop


def test_the_loop_does_what_a_plain_loop_does(tmp_path):
    def lr(step):
        return 1 / (step + 1)

    player, steps = go(tmp_path, player=make(schedule=lr, clip=0.01), steps=4, accumulate=2, seed=9)
    model = make().model
    optimizer, ema = adamw(model, lr=1e-2), Ema(model, decay=0.9)
    for at in range(4):
        losses = []
        for micro in range(2):
            torch.manual_seed(rng.integer(9, "step", at, "", micro))
            loss = model.loss(clean(at, micro))["loss"]
            (loss / 2).backward()
            losses.append(loss.item())
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2 * lr(at)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        step = steps[at]
        assert (step.number, step.loss, step.grad_norm) == (at + 1, sum(losses) / 2, norm.item())
        assert (step.lr, step.items, step.skipped) == (1e-2 * lr(at), 12, False)
        assert step.metrics.keys() == {"loss", "fit", "grad_norm", "lr"}
    assert same(state(player), state(Player(model, optimizer=optimizer, ema=ema)))
    assert [s.last for s in steps] == [False, False, False, True]
    assert [s.every(2) for s in steps] == [False, True, False, True]
    assert [s.every(3) for s in steps] == [False, False, True, True]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_must_not_change_the_result_does_not(tmp_path, precision):
    plain, _ = go(tmp_path / "plain", accumulate=2, precision=precision, steps=4)
    for i, arguments in enumerate([{"prefetch": 1}, {"prefetch": 5}, {"estimate": True}, {"save_every": 1}]):
        other, _ = go(
            tmp_path / str(i), **({"accumulate": 2, "precision": precision, "steps": 4} | arguments)
        )
        assert same(state(plain), state(other)), arguments


def test_the_seed_reaches_the_dropout(tmp_path):
    assert not same(state(go(tmp_path / "a", seed=1)[0]), state(go(tmp_path / "b", seed=2)[0]))


def test_what_the_recipe_does_between_steps_leaves_no_trace(tmp_path):
    plain, _ = go(tmp_path / "a")
    player, run = make(), Run(tmp_path / "b", progress=False)
    for step in train([player], clean, run=run, steps=8, save_every=3, estimate=False):
        player.model.eval()
        with player.ema.applied(player.model), torch.no_grad():
            player.model.loss(clean(99, 0))
        torch.rand(step.number)
    assert same(state(plain), state(player))


def test_frozen_parts_stay_in_evaluation_mode(tmp_path):
    player = make()
    player.model.tower = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).requires_grad_(False)
    go(tmp_path, player=player, steps=1)
    assert player.model.body.training
    assert player.model.body[2].training
    assert not any(module.training for module in player.model.tower.modules())


def test_the_process_is_left_as_it_was(tmp_path):
    import signal

    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    threads = threading.active_count()
    steps = train([make()], clean, run=Run(tmp_path, progress=False), steps=5, estimate=False)
    next(steps)
    assert torch.are_deterministic_algorithms_enabled()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    steps.close()
    assert not torch.are_deterministic_algorithms_enabled()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    assert threading.active_count() == threads


# ---------------------------------------------------------------- several players


class Maker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)


def test_two_players_step_in_turn_and_leave_each_other_alone(tmp_path):
    torch.manual_seed(0)
    maker, critic = Maker(), nn.Linear(2, 1)
    seen = []

    def maker_loss(batch):
        seen.append(("maker", critic.weight.grad is None, batch["x"].sum().item()))
        return {"loss": -critic(maker.body(batch["x"])).mean()}

    def critic_loss(batch):
        seen.append(("critic", critic.weight.grad is None, batch["x"].sum().item()))
        fake = maker.body(batch["x"]).detach()
        return {"loss": critic(fake).mean() - critic(batch["x"]).mean(), "real": critic(batch["x"]).mean()}

    def players():
        return [
            Player(maker, optimizer=torch.optim.SGD(maker.parameters(), 0.1), loss=maker_loss, name="maker"),
            Player(
                critic, optimizer=torch.optim.SGD(critic.parameters(), 0.1), loss=critic_loss, name="critic"
            ),
        ]

    def batches(step, micro):
        return {"x": torch.randn(3, 2, generator=rng.generator(1, step))}

    run = Run(tmp_path, progress=False)
    before = critic.weight.detach().clone()
    steps = train(players(), batches, run=run, steps=2, estimate=False)
    step = next(steps)
    assert [name for name, *_ in seen] == ["maker", "critic"]
    assert seen[1][1], "the maker's loss left a gradient in the critic"
    assert seen[0][2] == seen[1][2]
    x = batches(0, 0)["x"]
    moved = before - 0.1 * ((maker.body(x) - x).mean(0))  # the critic sees the maker after its update
    torch.testing.assert_close(critic.weight.detach(), moved)
    assert step.metrics.keys() == {
        f"{name}/{key}" for name in ("maker", "critic") for key in ("loss", "grad_norm", "lr")
    } | {"critic/real"}
    assert step.loss == step.losses["maker/loss"]
    list(steps)
    names = {p.name for p in checkpoint.latest(run.checkpoints).iterdir()}
    assert {"maker-model.safetensors", "critic-model.safetensors", "critic-optimizer.safetensors"} < names
    with pytest.raises(InputError, match="different names"):
        train([make(), make()], batches, run=run, steps=1)


def test_a_player_sits_out_the_steps_that_are_not_its_own(tmp_path):
    def pair():
        first, second = make(0), make(1, name="second", plays=lambda step: step % 3 == 2)
        return first, second

    def run(folder, steps, players):
        log, found = Run(folder, progress=False), []
        for step in train(players, clean, run=log, steps=steps, save_every=2, estimate=False):
            log.log(step.number, step.metrics)
            found.append((step.metrics, state(players[1])))
        return found

    found = run(tmp_path / "whole", 7, pair())
    played = ["second/loss" in metrics for metrics, _ in found]
    assert played == [False, False, True, False, False, True, False]
    for before, after, moves in zip(found, found[1:], played[1:], strict=False):
        assert same(before[1], after[1]) is not moves  # weights, optimizer and average
    assert all("loss" in metrics for metrics, _ in found)
    run(tmp_path / "parts", 4, pair())
    again = run(tmp_path / "parts", 7, pair())
    assert again[-1][0] == found[-1][0]
    assert same(again[-1][1], found[-1][1])


# ---------------------------------------------------------------- resume


def test_resume_goes_on_exactly_and_longer(tmp_path):
    whole, steps = go(tmp_path / "a", accumulate=2)
    _, first = go(tmp_path / "b", accumulate=2, steps=5)
    resumed, rest = go(tmp_path / "b", accumulate=2, player=make(seed=77), prefetch=2)
    assert [s.number for s in rest] == [6, 7, 8]
    assert [s.metrics for s in first + rest] == [s.metrics for s in steps]
    assert same(state(whole), state(resumed))
    again, nothing = go(tmp_path / "b", accumulate=2, player=make(seed=78))
    assert nothing == []
    assert same(state(whole), state(again))


def test_a_damaged_checkpoint_costs_only_its_steps(tmp_path):
    whole, _ = go(tmp_path / "a", keep=3)
    newest = checkpoint.steps(tmp_path / "a/checkpoints")[0]
    (newest / "ema.safetensors").write_bytes(b"torn")
    resumed, rest = go(tmp_path / "a", player=make(seed=77))
    assert [s.number for s in rest] == [7, 8]
    assert same(state(whole), state(resumed))
    for path in checkpoint.steps(tmp_path / "a/checkpoints"):
        (path / "MANIFEST.json").unlink()
    with pytest.raises(InputError, match=r"Every checkpoint .* is damaged"):
        go(tmp_path / "a")


def test_another_configuration_is_refused_before_anything_is_written(tmp_path):
    go(tmp_path, config={"lr": 1, "steps": 8}, steps=5)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    cases = [
        (r"lr \(was 1, is 2\)", {"config": {"lr": 2, "steps": 8}}),
        (r"seed \(was 0, is 1\)", {"config": {"lr": 1, "steps": 8}, "seed": 1}),
        (r"accumulate \(was 1, is 2\)", {"config": {"lr": 1, "steps": 8}, "accumulate": 2}),
        (r"clip \(was None, is 0.5\)", {"config": {"lr": 1, "steps": 8}, "player": make(clip=0.5)}),
    ]
    for reason, arguments in cases:
        with pytest.raises(InputError, match=reason):
            go(tmp_path, **arguments)
    slower = make()
    slower.optimizer = adamw(slower.model, lr=1e-2, weight_decay=0.5)
    with pytest.raises(InputError, match=r"optimizer\.0\.weight_decay \(was 0.01, is 0.5\)"):
        go(tmp_path, config={"lr": 1, "steps": 8}, player=slower)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    _, rest = go(tmp_path, config={"lr": 1, "steps": 9}, steps=9)
    assert [s.number for s in rest] == [6, 7, 8, 9]


def test_resume_must_and_never(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        go(tmp_path, resume="must")
    go(tmp_path, resume="never", steps=4)
    assert [s.number for s in go(tmp_path, resume="must", steps=5)[1]] == [5]
    with pytest.raises(InputError, match="already holds a run"):
        go(tmp_path, resume="never")


def test_two_processes_do_not_share_a_folder(tmp_path):
    first = train([make()], clean, run=Run(tmp_path, progress=False), steps=5, estimate=False)
    next(first)
    with pytest.raises(InputError, match="in use by another"):
        go(tmp_path)
    first.close()
    go(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"non_finite": "hope"}, r"non_finite is 'hope'; choose stop, skip, rollback"),
        ({"resume": "maybe"}, "resume is 'maybe'"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"device": "meta"}, "A model is on cpu and training on meta"),
    ],
)
def test_wrong_arguments_are_told_at_once(tmp_path, arguments, reason):
    with pytest.raises(InputError, match=reason):
        train([make()], clean, run=Run(tmp_path, progress=False), **({"steps": 1} | arguments))


# ---------------------------------------------------------------- what is not finite


class Burst(torch.autograd.Function):
    """Forward the identity, backward a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def bursting(player, *steps):
    """Makes the gradient infinite, and only it, at the given calls."""
    calls = itertools.count()

    def loss(batch):
        parts = player.model.loss(batch)
        return parts | {"loss": Burst.apply(parts["loss"])} if next(calls) in steps else parts

    player.loss = loss
    return player


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_and_never_reaches_the_weights(tmp_path, value):
    before, _ = go(tmp_path / "a", steps=4)
    player = make()
    with pytest.raises(NonFiniteError, match=rf"loss is {value} at step 5 on samples 4-0-0, 4-0-1, .*4-0-5;"):
        go(tmp_path / "b", poisoned(4, value=value), player=player)
    assert same(state(player), state(before))
    assert checkpoint.latest(tmp_path / "b/checkpoints").name == "step-00000003"


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    before, _ = go(tmp_path / "a", steps=4)
    player = bursting(make(), 4)
    with pytest.raises(NonFiniteError, match=r"gradient has norm (inf|nan) at step 5 on samples 4-0-0"):
        go(tmp_path / "b", player=player)
    assert same(state(player), state(before))


def test_a_skipped_step_leaves_no_trace_and_is_recorded(tmp_path):
    player, run = make(), Run(tmp_path, progress=False)
    arguments = {"steps": 8, "save_every": 3, "estimate": False, "non_finite": "skip"}
    states = {}
    for step in train([player], poisoned(4, 5), run=run, **arguments):
        states[step.number] = state(player)
        assert step.skipped == (step.number in (5, 6))
    assert same(states[4], states[5])
    assert same(states[4], states[6])
    assert not same(states[6], states[7])
    assert all(value.isfinite().all() for value in states[8].values())
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["event"], e["ids"][0]) for e in events] == [
        (5, "skipped", "4-0-0"),
        (6, "skipped", "5-0-0"),
    ]
    assert checkpoint.read_state(checkpoint.latest(run.checkpoints))["counts"]["skipped"] == [5, 6]
    go(tmp_path / "b", poisoned(4, 5), steps=6, non_finite="skip")
    resumed, _ = go(tmp_path / "b", poisoned(4, 5), player=make(seed=3), non_finite="skip")
    assert same(state(resumed), states[8])


def test_skipping_too_often_in_a_row_stops(tmp_path):
    go(tmp_path / "a", poisoned(1, 2, 4, 5), non_finite="skip", max_skips=2)
    player = make()
    with pytest.raises(NonFiniteError, match=r"at step 4.*3 such steps in a row are more than the 2 allowed"):
        go(tmp_path / "b", poisoned(1, 2, 3), player=player, non_finite="skip", max_skips=2)
    assert all(value.isfinite().all() for value in state(player).values())


def test_rollback_goes_back_and_leaves_the_batch_out(tmp_path):
    player, steps = go(tmp_path / "a", poisoned(4), non_finite="rollback")
    assert [s.number for s in steps] == [1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert [s.number for s in steps if s.skipped] == [5]
    rows = [json.loads(line)["step"] for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 6, 7, 8]
    skipping, _ = go(tmp_path / "b", poisoned(4), non_finite="skip")
    assert same(state(player), state(skipping))


def test_rollback_before_the_first_checkpoint_and_its_budget(tmp_path):
    _, steps = go(tmp_path / "a", poisoned(1), non_finite="rollback")
    assert [s.number for s in steps] == [1, 1, 2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(NonFiniteError, match="2 rollbacks to one checkpoint are more than the 1 allowed"):
        go(tmp_path / "b", poisoned(4, 5), non_finite="rollback", max_skips=1)
    player, _ = go(tmp_path / "c", poisoned(4, 7), non_finite="rollback", max_skips=1, prefetch=2)
    assert all(value.isfinite().all() for value in state(player).values())


def test_weights_that_an_update_made_infinite_are_never_saved(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    player = Player(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e38),
        loss=lambda batch: {"loss": 1e3 * model(batch["x"]).mean()},
    )
    with pytest.raises(NonFiniteError, match=r"weight is not finite after step 1, so no checkpoint"):
        go(tmp_path, player=player, save_every=1)
    assert checkpoint.steps(tmp_path / "checkpoints") == []


# ---------------------------------------------------------------- batches


def test_prefetched_batches_come_from_one_thread_in_order_and_only_those_needed(tmp_path):
    calls = []

    def batches(step, micro):
        calls.append((step, micro, threading.current_thread() is threading.main_thread()))
        return clean(step, micro)

    go(tmp_path, batches, accumulate=2, steps=3, prefetch=3)
    assert [call[:2] for call in calls] == [(s, m) for s in range(3) for m in range(2)]
    assert [call[2] for call in calls] == [True] + [False] * 5


def test_an_error_in_the_thread_surfaces_at_its_step(tmp_path):
    def batches(step, micro):
        if step == 2:
            raise OSError("the disk went away")
        return clean(step, micro)

    run = Run(tmp_path, progress=False)
    steps = train([make()], batches, run=run, steps=8, estimate=False, prefetch=4)
    assert [next(steps).number, next(steps).number] == [1, 2]
    with pytest.raises(OSError, match="the disk went away"):
        next(steps)


def test_batches_that_draw_from_the_global_generator_are_not_prefetched(tmp_path):
    with pytest.raises(InputError, match="draws from torch's global generator"):
        go(tmp_path, lambda step, micro: clean(step, micro) | {"x": torch.randn(6, 4)}, prefetch=1)


def with_bad(share):
    def batches(step, micro):
        broken = round(6 * share)
        return clean(step, micro) | {"bad": [(f"{step}-{i}.png", "truncated") for i in range(broken)]}

    return batches


def test_bad_samples_are_listed(tmp_path):
    go(tmp_path, with_bad(1 / 6), steps=12)
    rows = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert rows[3] == {"step": 4, "path": "3-0.png", "reason": "truncated"}
    assert len(rows) == 12
    (checkpoint.steps(tmp_path / "checkpoints")[0] / "state.json").unlink()
    go(tmp_path, with_bad(1 / 6), steps=12)  # goes on from step 9: nothing is listed twice
    assert len((tmp_path / "bad_samples.jsonl").read_text().splitlines()) == 12


def test_too_many_bad_samples_stop_the_run(tmp_path):
    with pytest.raises(
        InputError, match=r"44 of 66 samples could not be read, more than the 20% allowed; see .*bad"
    ):
        go(tmp_path, with_bad(4 / 6), steps=12)
    go(tmp_path / "b", with_bad(4 / 6), steps=12, max_bad=0.7)


# ---------------------------------------------------------------- saves in the background


def test_a_background_save_never_sees_later_weights(tmp_path, monkeypatch):
    """The writer is held back until training has gone on; the file has the weights of its step."""
    save, saved, gate = checkpoint.save, [], threading.Event()

    def late(folder, step, **named):
        assert gate.wait(30)
        saved.append(step)
        return save(folder, step, **named)

    plain, _ = go(tmp_path / "plain", steps=6)
    monkeypatch.setattr(checkpoint, "save", late)
    run, player = Run(tmp_path / "late", progress=False), make()
    for step in train([player], clean, run=run, steps=6, save_every=3, estimate=False, background=True):
        run.log(step.number, step.metrics)
        if step.number == 5:
            assert saved == []  # two steps after the save began
            gate.set()
    assert saved == [3, 6]
    assert same(state(plain), state(player))
    for name in ("step-00000003", "step-00000006"):
        manifests = [(tmp_path / way / "checkpoints" / name / "MANIFEST.json") for way in ("plain", "late")]
        assert manifests[0].read_text() == manifests[1].read_text()


def test_at_most_one_background_save_is_under_way(tmp_path, monkeypatch):
    save, under_way, most = checkpoint.save, [], []

    def watched(folder, step, **named):
        under_way.append(step)
        most.append(len(under_way))
        time.sleep(0.05)
        path = save(folder, step, **named)
        under_way.remove(step)
        return path

    monkeypatch.setattr(checkpoint, "save", watched)
    go(tmp_path, background=True, save_every=1)
    assert len(most) == 8
    assert max(most) == 1


def test_a_background_save_that_fails_stops_the_next_step(tmp_path, monkeypatch):
    save = checkpoint.save

    def failing(folder, step, **named):
        if step == 6:
            raise InputError("the disk is full")
        return save(folder, step, **named)

    monkeypatch.setattr(checkpoint, "save", failing)
    seen = []

    def slow(step, micro):
        seen.append(step)
        time.sleep(0.05)
        return clean(step, micro)

    with pytest.raises(InputError, match="the disk is full"):
        go(tmp_path, slow, background=True, steps=20)
    assert max(seen) in (6, 7)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000003"


# ---------------------------------------------------------------- how a run is carried out


@pytest.mark.parametrize(
    "how", [{"recompute": True}, pytest.param({"compile": True}, marks=pytest.mark.slow)]
)
def test_how_blocks_are_computed_changes_nothing_but_rounding(tmp_path, how):
    from reverie.encoders.vit import Vit, VitConfig
    from reverie.train.engine import Engine

    def trained(folder, engine):
        torch.manual_seed(0)
        model = engine.place(Vit(VitConfig(size=16, patch=8, width=16, depth=2, heads=2)))
        kept: list[int] = []
        image = torch.randn(8, 3, 16, 16, generator=rng.generator(0, "image"))

        def loss(batch):
            def count(tensor):
                kept.append(tensor.untyped_storage().data_ptr())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                return {"loss": model.embed(image).square().mean()}

        player = Player(model, loss=loss, optimizer=adamw(model, lr=1e-2))
        run = Run(folder, progress=False)
        losses = [step.loss for step in train([player], clean, run=run, steps=4, estimate=False)]
        return losses, len(set(kept)), copy.deepcopy(model).state_dict()

    plain, held, weights = trained(tmp_path / "plain", Engine(device="cpu"))
    losses, less, others = trained(tmp_path / "other", Engine(device="cpu", **how))
    tolerance = 1e-3 if "compile" in how else 1e-6  # Adam makes much of the rounding of fused kernels
    torch.testing.assert_close(losses, plain, rtol=tolerance, atol=0)
    assert weights.keys() == others.keys()
    if "recompute" in how:
        assert less < held / 2
