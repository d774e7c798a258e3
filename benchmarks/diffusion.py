"""Diffusion transformers beside diffusers: a step, a training step and whole sampling, in one run.

    python benchmarks/diffusion.py [--model dit-s wan-small] [--threads 1] [--rounds 5] [--json]
    python benchmarks/diffusion.py --device cuda --precision bf16 --compile                       # on a GPU

dit-s       DiT-S/2 on latents 4 x 32 x 32 (256 tokens), 1,000 classes, learned variance; batches of 1 and 8
wan-small   Wan 2.1's transformer, 384 x 12, on latents 16 x 4 x 32 x 32 (1,024 tokens), 512 places of text of which 20
            are words; batches of 1 and 2

forward     one evaluation without gradients
train       forward, backward and AdamW (fused on both sides) of a squared error
sample      20 steps with guidance, ours by the system, theirs by `DiTPipeline` (DDIM, and a codec too small to count)
            or `WanPipeline` (UniPC, down to latents), as their users call them

Both sides have equal weights; outputs, gradients and samples are compared first, and nothing is timed that differs by
more than 1e-4. Then each side has a process of its own, and a round is each action of each side in turn (turns.py). The
table has the medians, the share of the measured matmul peak (operations are counted on shapes of diffusers' model, for
both) and the most memory above the libraries. The codecs are in benchmarks/autoencoders.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from turns import Action, by_processor, peak, running, serve

import reverie
from reverie.train.precision import autocast

SIDES = ("reverie", "diffusers")
STEPS, GUIDANCE = 20, 4.0
WORDS = 20  # of the 512 places of a text


def diffusers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from peers import torchvision_loads

    torchvision_loads()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    return diffusers


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    batch: int
    precision: str
    device: str
    compile: bool


# The two models, from equal weights -------------------------------------------------------------------------------


def shaken(model: nn.Module) -> nn.Module:
    """Away from initialisation, where modulations are zero and hide differences."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def their_dit() -> nn.Module:
    torch.manual_seed(0)
    model = shaken(
        diffusers().DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12,
            sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
        )
    )  # fmt: skip
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


def their_wan() -> nn.Module:
    torch.manual_seed(0)
    return shaken(
        diffusers().WanTransformer3DModel(
            num_attention_heads=3, attention_head_dim=128, ffn_dim=1536, num_layers=12, text_dim=512
        )
    )


def ours(theirs: Any) -> nn.Module:
    """Our network with their weights, by the way that a user's weights come."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return reverie.load(folder, trainable=True).backbone


def given(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if case.model == "dit-s":
        found = {
            "x": torch.randn(case.batch, 4, 32, 32, generator=generator),
            "t": torch.randint(0, 1000, (case.batch,), generator=generator),
            "classes": torch.randint(0, 1000, (case.batch,), generator=generator),
        }
    else:
        context = torch.randn(case.batch, 512, 512, generator=generator)
        context[:, WORDS:] = 0
        found = {
            "x": torch.randn(case.batch, 16, 4, 32, 32, generator=generator),
            "t": torch.rand(case.batch, generator=generator),
            "context": context,
        }
    found["noise"] = torch.randn(found["x"].shape, generator=generator)
    return {name: tensor.to(case.device) for name, tensor in found.items()}


def forward(case: Case, side: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
    x, t = batch["x"], batch["t"]
    if case.model == "dit-s":
        if side == "reverie":
            return model(x, t, batch["classes"])
        return model(x, timestep=t, class_labels=batch["classes"], return_dict=False)[0]
    if side == "reverie":
        return model(x, t, batch["context"])
    return model(x, timestep=1000 * t, encoder_hidden_states=batch["context"], return_dict=False)[0]


def models(case: Case, side: str) -> nn.Module:
    theirs = their_dit() if case.model == "dit-s" else their_wan()
    return (ours(theirs) if side == "reverie" else theirs).to(case.device)


# Whole sampling: a pipeline as diffusers saves it, loaded by either side --------------------------------------------


def saved(case: Case, folder: str) -> None:
    """A pipeline of diffusers: the transformer, a codec too small to count, and a scheduler."""
    d = diffusers()
    if case.model == "dit-s":
        codec = d.AutoencoderKL(
            block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
            norm_num_groups=4,
        )  # fmt: skip
        schedule = d.DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=True)
        d.DiTPipeline(their_dit(), codec, schedule).save_pretrained(folder)
    else:
        codec = d.AutoencoderKLWan(base_dim=4, num_res_blocks=1)
        schedule = d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        )
        d.WanPipeline(None, None, codec, schedule, their_wan()).save_pretrained(folder)


def sampled(case: Case, side: str, folder: str, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """What draws latents or pictures from the batch's noise, as the users of a side would."""
    d = diffusers()
    noise = batch["noise"]
    if side == "reverie":
        system = reverie.load(folder).to(case.device)
        if case.model == "dit-s":
            return lambda: system.decode(
                system.sample(batch["classes"], noise, steps=STEPS, guidance=GUIDANCE, sampler="ddim")
            )
        none = torch.zeros_like(batch["context"][:1])
        return lambda: system.generate_latents(
            batch["context"],
            negative=none,
            noise=noise,
            frames=13,
            size=(256, 256),
            steps=STEPS,
            guidance=GUIDANCE,
        )
    if case.model == "dit-s":
        pipe = d.DiTPipeline.from_pretrained(folder).to(case.device)
        pipe.set_progress_bar_config(disable=True)
        classes = batch["classes"].tolist()

        def draw() -> Tensor:
            with given_noise(d.pipelines.dit.pipeline_dit, noise):
                pictures = pipe(
                    classes, guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="pt"
                ).images
            return 2 * pictures - 1

        return draw
    parts = {  # piece by piece: their whole loader needs accelerate for this transformer
        "vae": d.AutoencoderKLWan.from_pretrained(folder, subfolder="vae"),
        "scheduler": d.UniPCMultistepScheduler.from_pretrained(folder, subfolder="scheduler"),
        "transformer": their_wan(),
    }
    pipe = d.WanPipeline(None, None, **parts).to(case.device)
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(
        prompt_embeds=batch["context"], negative_prompt_embeds=torch.zeros_like(batch["context"]), latents=noise,
        height=256, width=256, num_frames=13, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
    ).frames  # fmt: skip


@contextlib.contextmanager
def given_noise(module: Any, noise: Tensor) -> Iterator[None]:
    """The pipeline of a module draws this noise."""
    own, module.randn_tensor = module.randn_tensor, lambda *_, **__: noise.clone()
    try:
        yield
    finally:
        module.randn_tensor = own


# The sides ------------------------------------------------------------------------------------------------------------


def actions(case: Case, side: str) -> dict[str, Action]:
    folder = tempfile.TemporaryDirectory()
    saved(case, folder.name)
    model, batch = models(case, side), given(case)
    called: Callable[..., Any] = torch.compile(model) if case.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def once() -> None:
        with torch.no_grad(), autocast(case.precision, torch.device(case.device)):
            forward(case, side, called, batch)

    def train() -> None:
        with autocast(case.precision, torch.device(case.device)):
            out = forward(case, side, called, batch)
        (out[:, : batch["noise"].shape[1]].float() - batch["noise"]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    draw = sampled(case, side, folder.name, batch)

    def sample() -> None:
        assert folder  # which lives as long as the side
        draw()

    return {"forward": once, "train": train, "sample": sample}


def worker(side: str, case: Case) -> None:
    serve(diffusers, lambda: actions(case, side), device=case.device)


# Equal before anything is timed -----------------------------------------------------------------------------------


def check(case: Case) -> dict[str, float]:
    """How far outputs, gradients and what is sampled lie apart, in fp32 on the processor."""
    case = dataclasses.replace(case, device="cpu", batch=2, compile=False, precision="fp32")
    batch = given(case)
    outs, drawn = [], []
    with tempfile.TemporaryDirectory() as folder:
        saved(case, folder)
        for side in SIDES:
            x = batch["x"].clone().requires_grad_()
            out = forward(case, side, models(case, side), {**batch, "x": x})
            out.square().sum().backward()
            outs.append((out.detach(), x.grad))
            drawn.append(sampled(case, side, folder, batch)())
    pairs = {
        "output": (outs[0][0], outs[1][0]),
        "gradient of the input": (outs[0][1], outs[1][1]),
        "sample": tuple(drawn),
    }
    found = {what: float((ours - theirs).norm() / theirs.norm()) for what, (ours, theirs) in pairs.items()}
    for what, apart in found.items():
        if not apart < 1e-4:
            raise SystemExit(
                f"{case.model}: our {what} differs from diffusers' by {apart:.1e}; nothing was timed."
            )
    return found


# The report -----------------------------------------------------------------------------------------------------------


def operations(case: Case) -> float:
    """Of one forward pass, on shapes alone."""
    from torch.utils.flop_counter import FlopCounterMode

    model = models(dataclasses.replace(case, device="meta"), "diffusers")
    batch = {
        name: tensor.to("meta") for name, tensor in given(dataclasses.replace(case, device="cpu")).items()
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(case, "diffusers", model, batch)
    return float(counter.get_total_flops())


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    words = ("forward", "train", "sample")
    taken: dict[tuple[str, str], list[dict[str, float]]] = {}
    memory, peaks = {}, []
    groups = [[side] for side in SIDES] if case.device == "cuda" else [list(SIDES)]
    for group in groups:  # a GPU belongs to one side at a time
        with running(__file__, group, json.dumps(asdict(case)), threads=torch.get_num_threads()) as sides:
            for _ in range(rounds):
                peaks.append(peak(case.device, case.precision))
                for word in words:
                    for one in sides:
                        taken.setdefault((one.name, word), []).append(one.ask(word))
                print(".", end="", file=sys.stderr, flush=True)
            memory |= {one.name: one.ask("memory")["mib"] for one in sides}
    clock, work = ("cpu" if by_processor(case.device) else "wall"), operations(case)
    passes = {"forward": 1, "train": 3, "sample": 2 * STEPS}
    rows = []
    for word in words:
        row: dict[str, Any] = asdict(case) | {"action": word, "clock": clock, "rounds": rounds}
        for side in SIDES:
            found = taken[side, word]
            seconds = statistics.median(one[clock] for one in found)
            row[side] = {
                "seconds": seconds,
                "share": passes[word] * work / seconds / statistics.median(peaks),
                "mib": memory[side],
                "others": statistics.fmean(one["others"] for one in found),
            }
        row["ratio"] = row["diffusers"]["seconds"] / row["reverie"]["seconds"]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], threads: int, device: str) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
    clock = "processor time" if rows[0]["clock"] == "cpu" else "wall time"
    load = statistics.fmean(row[side]["others"] for row in rows for side in SIDES)
    lines = [
        f"Seconds (share of the matmul peak; peak memory of all three), {where}, {clock}, torch {torch.__version__}; "
        f"others used {load:.1f} cores meanwhile.",
        "",
        "| | reverie | diffusers | diffusers' time over ours |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            f"{row[side]['seconds']:.3f} ({row[side]['share']:.0%}; {row[side]['mib']:,} MiB)"
            for side in SIDES
        ]
        name = f"{row['model']}, {row['precision']}, batch {row['batch']}, {row['action']}"
        lines.append(f"| {name} | {' | '.join(cells)} | {row['ratio']:.2f} |")
    return "\n".join(lines)


BATCHES = {"dit-s": (1, 8), "wan-small": (1, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", nargs="+", type=int, help="of every model")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile, for both sides")
    parser.add_argument("--json", action="store_true", help="the numbers to the screen, not the table")
    parser.add_argument("--out", type=Path, default=Path("runs/diffusion-speed"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.worker:
        worker(asked.worker[0], Case(**json.loads(asked.worker[1])))
        return
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    equal: dict[str, Any] = {}
    for model in asked.model:
        for batch in asked.batch or BATCHES[model]:
            case = Case(
                model=model, batch=batch, precision=asked.precision, device=device, compile=asked.compile
            )
            if model not in equal:
                equal[model] = check(case)
            rows += measure(case, asked.rounds)
            text = table(rows, asked.threads, device)
            found = {"torch": torch.__version__, "threads": asked.threads, "rows": rows, "equal": equal}
            asked.out.mkdir(parents=True, exist_ok=True)  # after every case: the next may take long
            (asked.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
            (asked.out / "table.md").write_text(text + "\n")
    print(file=sys.stderr)
    print(json.dumps(found, indent=1) if asked.json else text)


if __name__ == "__main__":
    main()
