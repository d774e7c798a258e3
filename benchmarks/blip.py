"""BLIP and BLIP-2 beside transformers: captions, and the Q-Former, in one run.

    python benchmarks/blip.py [--case caption qformer] [--batch 1 8] [--threads 1] [--rounds 3] [--json]

caption     BLIP of the base size, 384 pixels: greedy and by 3 beams, 20 new tokens of every picture, from pixels to
            tokens; theirs by `generate`, as its users call it, ours by the parts that `caption` is made of
qformer     BLIP-2's Q-Former, 32 queries to 257 x 1408 features: forward, and train, which is forward, backward and
            AdamW (fused on both sides) of a squared error; transformers has none of the losses of the first stage

Both sides have equal weights, which the parent draws and transformers saves. Words must be equal, features within 1e-4,
before anything is timed. Then each side has a process of its own, and a round is each action of each side in turn
(turns.py). The table has the medians and the most memory above the libraries, weights among it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from turns import Action, by_processor, running, serve

import reverie
from reverie.samplers.autoregressive import beam, greedy

SIDES = ("reverie", "transformers")
NEW, BEAMS = 20, 3
OURS = "ours.safetensors"
ACTIONS = {"caption": ("greedy", "beam"), "qformer": ("forward", "train")}


def transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from peers import torchvision_loads

    torchvision_loads()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@dataclass(frozen=True, kw_only=True)
class Case:
    what: str
    batch: int
    folder: str
    device: str


def saved(what: str, folder: str) -> None:
    """A model of transformers with random weights, away from initialisation, where much is zero."""
    t = transformers()
    torch.manual_seed(0)
    if what == "caption":
        model = t.BlipForConditionalGeneration(t.BlipConfig())
        t.BlipImageProcessorPil().save_pretrained(folder)
    else:
        config = t.Blip2QFormerConfig(use_qformer_text_input=False)
        model = t.Blip2QFormerModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)
    if what == "qformer":  # under our names too, so that a side holds its own model alone
        from reverie.weights.blip2_transformers import qformer_rules
        from reverie.weights.remap import Rule, apply

        depth, every = config.num_hidden_layers, config.cross_attention_frequency
        rules = qformer_rules("encoder", "own", depth=depth, every=every, reads=False)
        made = apply((*rules, Rule("layernorm.{p}", "own.norm.{p}")), model.state_dict())
        save_file({name.removeprefix("own."): value for name, value in made.items()}, Path(folder) / OURS)


def pictures(case: Case) -> Tensor:
    side = 384
    x = torch.randn(case.batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x.clamp(-1, 1).to(case.device)


# Captions -------------------------------------------------------------------------------------------------------------


def caption(case: Case, side: str) -> dict[str, Callable[[], list[list[int]]]]:
    images = pictures(case)
    if side == "reverie":
        ours = reverie.load(case.folder).to(case.device)
        config = ours.config.text
        start = torch.full((case.batch, 1), config.decode, device=case.device)

        @torch.inference_mode()
        def write(search: Callable[..., list[list[int]]], **more: int) -> list[list[int]]:
            decoder = ours.text.writer(ours.see(images), most=NEW + 1)
            return search(decoder, start, end=config.end, most=NEW, least=NEW, **more)

        return {"greedy": lambda: write(greedy), "beam": lambda: write(beam, beams=BEAMS)}
    theirs = transformers().BlipForConditionalGeneration.from_pretrained(case.folder).eval().to(case.device)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073), device=case.device)[:, None, None]
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711), device=case.device)[:, None, None]
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}

    def generate(beams: int) -> list[list[int]]:
        pixels = ((images + 1) / 2 - mean) / std
        return theirs.generate(pixel_values=pixels, num_beams=beams, **how)[:, 1:].tolist()

    return {"greedy": lambda: generate(1), "beam": lambda: generate(BEAMS)}


# The Q-Former ---------------------------------------------------------------------------------------------------------


def qformer(case: Case, side: str) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """The network, and its forward pass."""
    from reverie.bridges.qformer import Qformer, QformerConfig

    config = QformerConfig(reads=False, writes=False)
    draw = torch.Generator().manual_seed(1)
    queries = torch.randn(1, config.queries, config.width, generator=draw)
    context = torch.randn(case.batch, 257, config.context_width, generator=draw).to(case.device)
    if side == "transformers":
        theirs = transformers().Blip2QFormerModel.from_pretrained(case.folder).eval()
        asks = torch.nn.Parameter(queries.to(case.device))
        theirs.register_parameter("queries", asks)
        theirs.to(case.device)
        return (
            theirs,
            lambda: (
                theirs(
                    query_embeds=asks.expand(case.batch, -1, -1), encoder_hidden_states=context
                ).last_hidden_state
            ),
        )
    ours = Qformer(config).eval()
    with torch.no_grad(), safe_open(Path(case.folder) / OURS, "pt") as file:
        for name, parameter in ours.named_parameters():
            parameter.copy_(queries[0] if name == "queries" else file.get_tensor(name))
    ours.to(case.device)
    return ours, lambda: ours.look(context)


def training(model: torch.nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def train() -> None:
        forward().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def actions(case: Case, side: str) -> dict[str, Action]:
    if case.what == "caption":
        written = caption(case, side)
        return {name: (lambda one=one: one() and None) for name, one in written.items()}
    model, look = qformer(case, side)

    def once() -> None:
        with torch.inference_mode():
            look()

    return {"forward": once, "train": training(model, look)}


def check(case: Case) -> None:
    """SystemExit: the two sides do not give the same."""
    if case.what == "caption":
        ours, theirs = ({name: one() for name, one in caption(case, side).items()} for side in SIDES)
        for name in ours:
            if ours[name] != theirs[name]:
                raise SystemExit(f"caption, {name}: our words differ from transformers'; nothing was timed.")
        return
    with torch.inference_mode():
        ours, theirs = (qformer(case, side)[1]() for side in SIDES)
    apart = float((ours - theirs).norm() / theirs.norm())
    if not apart < 1e-4:
        raise SystemExit(f"qformer: our features differ by {apart:.1e}; nothing was timed.")


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    taken: dict[tuple[str, str], list[dict[str, float]]] = {}
    memory: dict[str, float] = {}
    groups = [[side] for side in SIDES] if case.device == "cuda" else [list(SIDES)]
    for group in groups:  # a GPU belongs to one side at a time
        with running(__file__, group, json.dumps(asdict(case)), threads=torch.get_num_threads()) as sides:
            for _ in range(rounds):
                for word in ACTIONS[case.what]:
                    for one in sides:
                        taken.setdefault((one.name, word), []).append(one.ask(word))
                print(".", end="", file=sys.stderr, flush=True)
            memory |= {one.name: one.ask("memory")["mib"] for one in sides}
    clock = "cpu" if by_processor(case.device) else "wall"
    rows = []
    for word in ACTIONS[case.what]:
        row: dict[str, Any] = {
            "case": case.what,
            "batch": case.batch,
            "action": word,
            "clock": clock,
            "rounds": rounds,
        }
        for side in SIDES:
            found = taken[side, word]
            row[side] = {
                "seconds": statistics.median(one[clock] for one in found),
                "mib": memory[side],
                "others": statistics.fmean(one["others"] for one in found),
            }
        row["ratio"] = row["transformers"]["seconds"] / row["reverie"]["seconds"]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], threads: int, device: str) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
    clock = "processor time" if rows[0]["clock"] == "cpu" else "wall time"
    load = statistics.fmean(row[side]["others"] for row in rows for side in SIDES)
    lines = [
        f"Seconds (peak memory of both actions), {where}, {clock}, fp32, torch {torch.__version__}, transformers"
        f" {transformers().__version__}; others used {load:.1f} cores meanwhile.",
        "",
        "| | reverie | transformers | transformers' time over ours |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"{row[side]['seconds']:.3f} ({row[side]['mib']:,} MiB)" for side in SIDES]
        lines.append(
            f"| {row['case']}, batch {row['batch']}, {row['action']} | {' | '.join(cells)} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--case", nargs="+", choices=ACTIONS, default=list(ACTIONS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="the numbers to the screen, not the table")
    parser.add_argument("--out", type=Path, default=Path("runs/blip-speed"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.worker:
        side, case = asked.worker[0], Case(**json.loads(asked.worker[1]))
        serve(transformers, lambda: actions(case, side), device=case.device)
        return
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for what in asked.case:
        with tempfile.TemporaryDirectory() as folder:
            saved(what, folder)
            check(Case(what=what, batch=2, folder=folder, device=device))
            for batch in asked.batch:
                rows += measure(Case(what=what, batch=batch, folder=folder, device=device), asked.rounds)
                text = table(rows, asked.threads, device)
                asked.out.mkdir(parents=True, exist_ok=True)  # after every case: the next may take long
                (asked.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
                (asked.out / "table.md").write_text(text + "\n")
    print(file=sys.stderr)
    print(json.dumps(rows, indent=1) if asked.json else text)


if __name__ == "__main__":
    main()
