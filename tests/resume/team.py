"""A small CLIP that several processes train together; the tests compare, kill, stop and re-form the group."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import tuner

from reverie.errors import InputError

STEPS, BATCH, SAMPLES = 20, 12, 40


def member(rank: int, count: int, port: int, folder: Path, *, place: Path | None = None, **how) -> None:
    """Process `rank` of `count`; `how` is that of `run`, or, with a `place`, of a recipe in tuner.py."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    try:
        if place is None:
            run(folder, **how)
        else:
            tuner.run(place, folder, **how)
    except InputError as error:
        (folder / f"error-{rank}.txt").write_text(str(error))
        raise SystemExit(2) from None


def run(
    folder: Path,
    *,
    steps: int = STEPS,
    shard: bool = False,
    recompute: bool = False,
    background: bool = False,
    accumulate: int = 1,
    non_finite: str = "stop",
    poison: tuple[str, int, int] | None = None,
    ill: tuple[int, int, bool] | None = None,
    pace: float = 0.0,
    kill: tuple[str, int] | None = None,
    replay: int | None = None,
) -> None:
    """Trains in `folder`.

    poison: what ("loss", "gradient", "spike") at which step on which rank. ill: a step and a rank with a sample that
    cannot be read then, and whether none can. kill: a sub-step of a save and the rank to die there.
    """
    import torch
    from torch import Tensor

    from reverie import rng
    from reverie.data.order import batch_ids
    from reverie.encoders.text import TextConfig
    from reverie.encoders.vit import VitConfig
    from reverie.systems.clip import Clip, ClipConfig
    from reverie.train import Ema, Player, Run, adamw, checkpoint, schedule, train
    from reverie.train.engine import Engine
    from reverie.train.parallel import peers, processes, team, whole

    torch.set_num_threads(1)
    image = VitConfig(size=16, patch=8, width=16, depth=2, heads=2)
    text = TextConfig(vocab=32, length=6, width=16, depth=2, heads=2, end=31)

    def sample(epoch: int, i: int) -> tuple[Tensor, Tensor]:
        generator = rng.generator(1, "sample", epoch, i)
        tokens = torch.randint(0, 31, (6,), generator=generator)
        tokens[i % 4 + 2] = 31
        return torch.rand(3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1, tokens

    with processes():
        us = team()

        def batches(step: int, micro: int) -> dict:
            places = batch_ids(
                step * accumulate + micro, BATCH // accumulate, SAMPLES, 7, rank=us.rank, world=us.count
            )
            images, tokens = zip(*(sample(*place) for place in places), strict=True)
            with (folder / f"order-{us.rank}.jsonl").open("a") as file:
                file.write(json.dumps([step, micro, us.count, places]) + "\n")
            ill_now = ill and us.rank == ill[1] and (step == ill[0] or (ill[2] and step > ill[0]))
            bad = (
                [(f"{step}-{us.rank}.png", "torn")] * (len(places) if ill and ill[2] else 1)
                if ill_now
                else []
            )
            return {
                "image": torch.stack(images),
                "tokens": torch.stack(tokens),
                "ids": [f"{e}/{i}" for e, i in places],
                "poison": float(poison is not None and poison[1:] == (step, us.rank)),
                "bad": bad,
            }

        torch.manual_seed(0)
        model = Clip(ClipConfig(image=image, text=text, width=8)).double()  # Adam makes much of rounding
        model.text.embedding.requires_grad_(False)  # frozen parts stay whole
        model = Engine(device="cpu", shard=shard, recompute=recompute).place(model)

        def loss(batch: dict) -> dict[str, Tensor]:
            found = model.compare(*model.embed(batch), peers=peers())
            if batch["poison"]:
                assert poison is not None
                bad = {"loss": torch.tensor(float("nan")), "spike": torch.tensor(90.0)}
                if poison[0] == "gradient":
                    zero = sum(p.sum() for p in [model.image.positions]) * 0
                    return found | {"loss": found["loss"] + (zero.square() + 0.0).sqrt()}
                return found | {"loss": found["loss"] * 1 + bad[poison[0]]}
            return found

        def reached(point: str) -> None:
            if kill is not None and (point, us.rank) == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint._reached = reached
        Run.curves = lambda self: None
        player = Player(
            model,
            loss=loss,
            optimizer=adamw(model, lr=1e-2, weight_decay=0.1),
            schedule=partial(schedule.cosine, steps=STEPS, warmup=3),
            ema=Ema(model, decay=0.9),
            clip=0.5,
        )
        log = Run(folder, {"lr": 1e-2, "steps": steps}, progress=False)
        for step in train(
            [player], batches, run=log, steps=steps, accumulate=accumulate, seed=5, save_every=4, keep=2,
            precision="fp32", non_finite=non_finite, background=background, estimate=False, replay=replay,
        ):  # fmt: skip
            log.log(step.number, step.metrics)
            with (folder / f"seen-{us.rank}.jsonl").open("a") as file:
                file.write(
                    json.dumps([step.number, step.loss, step.grad_norm, step.items, step.asked]) + "\n"
                )
            time.sleep(pace)
        with player.ema.applied(model), torch.no_grad():
            state = {name: value.flatten().tolist() for name, value in whole(model).state_dict().items()}
        if us.first:
            (folder / "weights.json").write_text(json.dumps(state))
