"""A small run with everything that could break a resume; the tests kill it in a child process."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

STEPS, EVERY = 60, 6


def run(
    folder: Path,
    *,
    kill: str | None = None,
    prefetch: int = 0,
    estimate: bool = False,
    precision: str = "fp32",
    hold: int | None = None,
    pace: float = 0.0,
    points: Path | None = None,
) -> None:
    """Trains in `folder`; `kill`: the sub-step of a save to die at; `hold`: a step to sleep at."""
    import torch
    from torch import Tensor, nn

    from reverie import rng
    from reverie.train import Ema, Player, Run, adamw, checkpoint, schedule, train

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(32, 16)
            self.body = nn.Sequential(
                nn.Linear(16, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 16)
            )
            self.tied = self.words.weight

        def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            x0 = self.words(batch["ids"]).detach()
            x_t = x0 + batch["noise"]
            fit = (self.body(x_t) - x0).square().mean()
            stray = torch.rand(())  # a draw from the global generator, which the loop must make harmless
            return {"loss": fit + stray * self.tied.square().mean(), "fit": fit}

    def batches(step: int, micro: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 32, (24,), generator=rng.generator(3, "ids", step, micro))
        noise = torch.stack(
            [torch.randn(16, generator=rng.generator(3, "noise", step, micro, i)) for i in range(24)]
        )
        return {"ids": ids, "noise": noise}

    def reached(point: str) -> None:
        if points is not None:
            with points.open("a") as file:
                file.write(point + "\n")
        if point == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._reached = reached
    Run.curves = lambda self: None  # a second per run; tests/train/test_log.py draws them
    torch.manual_seed(0)
    model = Net()
    player = Player(
        model,
        optimizer=adamw(model, lr=1e-2, weight_decay=0.1),
        schedule=partial(schedule.cosine, steps=STEPS, warmup=5),
        ema=Ema(model, decay=0.99),
        clip=0.5,
    )
    log = Run(folder, {"lr": 1e-2, "steps": STEPS}, progress=False)
    settings = {"accumulate": 2, "save_every": EVERY, "keep": 2, "seed": 5}
    settings |= {"prefetch": prefetch, "estimate": estimate, "precision": precision}
    for step in train([player], batches, run=log, steps=STEPS, **settings):
        log.log(step.number, step.metrics)
        if step.every(10):
            with player.ema.applied(model), torch.no_grad():
                model.eval()
                log.log(step.number, {"val_loss": float(model.loss(batches(1000, 0))["fit"])})
                torch.rand(step.number)
        if step.number == hold:
            time.sleep(20)
        time.sleep(pace)
