"""Our video autoencoder beside diffusers' AutoencoderKLWan at equal weights: time and peak memory, in one run.

    python benchmarks/autoencoders.py [--model wan] [--work decode-picture decode-clip] [--threads 1] [--json]

wan     Wan 2.1's shape: 96 channels wide, 126.9 M parameters
small   the same, 32 channels wide

A picture has 256 x 256 pixels, a clip 17 frames of 128 x 128; `--size` and `--frames` give others. First it is checked
that both libraries give equal frames and latents from equal weights. Then each side has a process of its own, and a
round is one call of each in turn. The table has the medians. On a CPU with one thread the clock is the process's
processor time, which other work disturbs least; otherwise it is the time on the wall, and the machine must be quiet.
Memory is the most that the process held above what it held with the model loaded, its input made and nothing computed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from clip import busy, others
from torch import Tensor, nn
from training import held

from reverie.codecs.video_vae import WAN, VideoVae, VideoVaeConfig
from reverie.weights import remap, video_vae_wan

SIDES = ("reverie", "diffusers")
MODELS = {
    "wan": WAN,
    "small": VideoVaeConfig(widths=(32, 64, 128, 128), temporal=(False, True, True), blocks=2, patch=1),
}
WORK = ("decode-picture", "decode-clip", "encode-picture", "encode-clip")


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    work: str
    frames: int
    size: int

    def input(self) -> Tensor:
        """Frames in [-1, 1] or latents of unit variance: the same in every process."""
        generator = torch.Generator().manual_seed(0)
        time, space = MODELS[self.model].stride
        if self.work.startswith("encode"):
            return torch.rand(1, 3, self.frames, self.size, self.size, generator=generator) * 2 - 1
        shape = MODELS[self.model].channels, 1 + (self.frames - 1) // time, *[self.size // space] * 2
        return torch.randn(1, *shape, generator=generator)


def ours(model: str) -> VideoVae:
    torch.manual_seed(0)
    vae = VideoVae(MODELS[model]).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("weight"):  # no zeros, and no numbers that grow from layer to layer
            parameter.normal_(std=parameter[-1].numel() ** -0.5 * len(parameter) ** 0.5 if parameter.ndim < 3 else
                              (parameter.numel() / parameter.shape[1]) ** -0.5)  # fmt: skip
    return vae


def theirs(model: str, *, alone: bool) -> nn.Module:
    """diffusers' of the same weights; `alone`: of its own, so that nothing else ever lay in memory."""
    from diffusers import AutoencoderKLWan

    config = MODELS[model]
    constants = {"mean": [0.0] * config.channels, "std": [1.0] * config.channels}
    record, table = video_vae_wan.write(asdict(config), constants)
    made = AutoencoderKLWan.from_config(record).eval().requires_grad_(False)
    if alone:
        return made
    vae = ours(model)
    tensors = remap.apply(remap.invert(table), vae.state_dict())
    made.load_state_dict(tensors)
    return made


def call(side: str, case: Case, *, alone: bool = False) -> Callable[[], Tensor]:
    x = case.input()
    if side == "reverie":
        vae = ours(case.model)
        if case.work.startswith("encode"):
            return lambda: vae.posterior(x)[0]
        return lambda: vae.draw(x).clamp_(-1, 1)
    other: Any = theirs(case.model, alone=alone)
    if case.work.startswith("encode"):
        return lambda: other.encode(x).latent_dist.mode()
    return lambda: other.decode(x).sample


@torch.inference_mode()
def check(model: str) -> float:
    """The largest difference of frames and latents of a small clip, over the largest of them."""
    worst = 0.0
    for work in ("decode-clip", "encode-clip"):
        case = Case(model=model, work=work, frames=5, size=32)
        first, second = (call(side, case)() for side in SIDES)
        worst = max(worst, float((first - second).abs().max() / second.abs().max()))
    if not worst <= 1e-4:
        raise SystemExit(f"{model}: diffusers' numbers differ from ours by {worst:.1e}; nothing was timed.")
    return worst


# A process for each side ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def worker(side: str, case: Case) -> None:
    """Says "ready", then for each line of standard input does the work and says its times as JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries may print
    run = call(side, case, alone=True)
    torch.nn.functional.conv2d(
        torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3)
    )  # libraries load at the first
    resets = Path("/proc/self/clear_refs")
    if resets.exists():
        resets.write_text("5")  # the most that was held is counted from here on
    before = held()[0]
    print(json.dumps({"before": before}), file=answers)
    for _ in sys.stdin:
        whole, own, at = busy(), time.process_time(), time.perf_counter()
        run()
        wall, own = time.perf_counter() - at, time.process_time() - own
        mib = (held()[1] - before) / 2**20
        print(
            json.dumps({"wall": wall, "cpu": own, "others": others(wall, own, whole), "mib": mib}),
            file=answers,
        )


class Worker:
    def __init__(self, side: str, case: Case, threads: int):
        command = [
            sys.executable,
            __file__,
            "--worker",
            side,
            json.dumps(asdict(case)),
            "--threads",
            str(threads),
        ]
        self.side = side
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> dict[str, float]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(
                f"{self.side} stopped with code {self.process.wait()}; a smaller --size may fit."
            )
        return json.loads(line)

    def ask(self) -> dict[str, float]:
        self.process.stdin.write("go\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self.hear()


@contextlib.contextmanager
def workers(sides: list[str], case: Case, threads: int) -> Iterator[list[Worker]]:
    found: list[Worker] = []
    try:
        for side in sides:
            found.append(Worker(side, case, threads))
            found[-1].hear()
        yield found
    finally:
        for one in found:
            one.process.stdin.close()  # type: ignore[union-attr]
            one.process.wait()


def measure(case: Case, sides: list[str], *, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each side: seconds (median, least, most), peak memory in MiB."""
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with workers(sides, case, threads) as running:
        for _ in range(rounds + 1):  # the first warms up
            for one in running:
                taken[one.side].append(one.ask())
            print(".", end="", file=sys.stderr, flush=True)
    clock = "cpu" if threads == 1 else "wall"
    rows = []
    for side, calls in taken.items():
        times = [one[clock] for one in calls[1:]]
        rows.append(
            asdict(case)
            | {"side": side, "threads": threads, "clock": clock, "rounds": rounds}
            | {"seconds": statistics.median(times), "least": min(times), "most": max(times)}
            | {
                "mib": round(calls[-1]["mib"]),
                "others": statistics.median(one["others"] for one in calls[1:]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["wan"], choices=MODELS)
    parser.add_argument("--work", nargs="+", default=list(WORK[:2]), choices=WORK)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--size", type=int, help="pixels of a side (256 for a picture, 128 for a clip)")
    parser.add_argument("--frames", type=int, default=17, help="of a clip")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.worker:
        worker(asked.worker[0], Case(**json.loads(asked.worker[1])))
        return
    rows = []
    for model in asked.model:
        if len(asked.sides) > 1:
            print(f"{model}: frames and latents differ by {check(model):.1e} of the largest", file=sys.stderr)
        for work in asked.work:
            picture = work.endswith("picture")
            size = asked.size or (256 if picture else 128)
            case = Case(model=model, work=work, frames=1 if picture else asked.frames, size=size)
            rows += measure(case, asked.sides, rounds=asked.rounds, threads=asked.threads)
    print(file=sys.stderr)
    if asked.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        f"{'model':7}{'work':16}{'frames':>7}{'size':>6}  {'side':10}{'seconds':>9}{'least':>8}{'most':>8}{'MiB':>7}"
    )
    for row in rows:
        print(
            f"{row['model']:7}{row['work']:16}{row['frames']:7}{row['size']:6}  {row['side']:10}{row['seconds']:9.2f}"
            f"{row['least']:8.2f}{row['most']:8.2f}{row['mib']:7}"
        )


if __name__ == "__main__":
    main()
