"""Codes written one by one: ours beside transformers' `generate`, in turn: `python benchmarks/autoregressive.py`.

12 blocks of width 512 with 8 heads, 32 tokens of text, then 256 codes of 8,192 (transformers': one vocabulary of
24,576), at batch 1 and 8: tokens a second, and as a share of what reading the weights once for each step takes at the
memory's rate, which is measured beside. With --sparse: rows, columns and a convolution against all codes, a training
step and writing, at 256 to 4,096 codes. With --int8 MODEL DATA: what eight bits cost in the loss of held-out codes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from turns import running, serve

WIDTH, DEPTH, HEADS, WORDS, CODES, TEXT, SIDE = 512, 12, 8, 16_384, 8192, 32, 16
SIDES = (
    "ours fp32",
    "ours bf16",
    "ours int8",
    "generate fp32",
    "generate bf16 autocast",
    "generate bf16 weights",
)


def ours(kind: str, *, side: int = SIDE, attention: str = "full"):
    """The network, its weights kept as `kind` says."""
    from reverie.backbones.code_transformer import CausalCodes, CodeTransformerConfig
    from reverie.nn.linear import Linear
    from reverie.nn.quantised import Int8Linear, repeated, replace

    network = CausalCodes(
        CodeTransformerConfig(
            words=WORDS, length=TEXT, vocab=CODES, rows=side, columns=side, width=WIDTH, depth=DEPTH, heads=HEADS,
            attention=attention,
        )
    ).eval()  # fmt: skip
    network.requires_grad_(False)
    if kind == "int8":
        for name, layer in repeated(network).items():
            replace(network, name, Int8Linear.of(layer))
    if kind != "fp32":
        for layer in network.modules():
            if isinstance(layer, Linear):
                layer.to(torch.bfloat16)
    return network


@torch.inference_mode()
def write(network, batch: int, count: int) -> None:
    from reverie import rng
    from reverie.samplers.autoregressive import draw_codes

    writing = network.begin(torch.zeros(1, TEXT, dtype=torch.long))
    writing.select(torch.zeros(batch, dtype=torch.long))
    generators = [rng.generator(i, "codes") for i in range(batch)]
    draw_codes(writing, torch.zeros(batch, 0, dtype=torch.long), count=count, generators=generators)


def worker(name: str, batch: int, count: int) -> None:
    def libraries() -> None:
        import transformers  # noqa: F401

        import reverie  # noqa: F401

    def make():
        who, _, kind = name.partition(" ")
        if who == "ours":
            network = ours(kind)
            return {"go": lambda: write(network, batch, count)}
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(
            GPT2Config(n_layer=DEPTH, n_embd=WIDTH, n_head=HEADS, vocab_size=WORDS + CODES, n_positions=512,
                       bos_token_id=0, eos_token_id=WORDS + CODES - 1)
        ).eval()  # fmt: skip
        model.generation_config.pad_token_id = 0
        if kind == "bf16 weights":
            model = model.bfloat16()
        ids = torch.randint(0, WORDS, (batch, TEXT))

        def go() -> None:
            with (
                torch.inference_mode(),
                torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16 autocast"),
            ):
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                    do_sample=True, top_k=0,
                )  # fmt: skip

        return {"go": go}

    serve(libraries, make)


def memory_rate() -> float:
    """Bytes a second that are read of much memory."""
    x = torch.ones(2**26)
    x.sum()
    found = []
    for _ in range(5):
        at = time.perf_counter()
        x.sum()
        found.append(4 * len(x) / (time.perf_counter() - at))
    return max(found)


def beside(args: argparse.Namespace) -> None:
    rate = memory_rate()
    read = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}
    layers, head = 12 * WIDTH**2 * DEPTH, WIDTH * CODES
    for batch in args.batches:
        with running(__file__, SIDES, str(batch), threads=args.threads) as sides:
            found: dict[str, list[float]] = {side.name: [] for side in sides}
            for _ in range(args.runs):
                for side in sides:
                    found[side.name].append(side.ask("go")["cpu" if args.threads == 1 else "wall"])
        for name, seconds in found.items():
            tokens = batch * args.count / statistics.median(seconds)
            best = statistics.median(found["generate fp32"]) / statistics.median(seconds)
            record = {"side": name, "batch": batch, "threads": args.threads, "tokens_a_second": round(tokens, 1),
                      "times_generate_fp32": round(best, 2)}  # fmt: skip
            if name.startswith("ours"):
                kind = name.split()[1]
                limit = rate / (layers * read[kind] + head * max(2.0, read[kind])) * batch
                record["share_of_memory_limit"] = round(tokens / limit, 2)
            print(json.dumps(record), flush=True)
    print(json.dumps({"memory_gb_a_second": round(rate / 1e9, 1)}))


def sparse(args: argparse.Namespace) -> None:
    """Patterns against all codes: seconds of the processor for a training step of one picture, and for writing it."""
    torch.set_num_threads(args.threads)
    for side in (16, 32, 64):
        tokens, codes = torch.zeros(1, TEXT, dtype=torch.long), torch.zeros(1, side**2, dtype=torch.long)
        networks = {kind: ours("fp32", side=side, attention=kind) for kind in ("full", "sparse")}
        taken: dict[str, list[float]] = {kind: [] for kind in networks}
        written: dict[str, list[float]] = {kind: [] for kind in networks}
        for network in networks.values():
            network.requires_grad_(True)
        for turn in range(4):
            for kind, network in networks.items():
                at = time.process_time()
                network(tokens, codes)[1].logsumexp(-1).sum().backward()
                if turn:
                    taken[kind].append(time.process_time() - at)
                network.zero_grad(set_to_none=True)
        for network in networks.values():
            network.requires_grad_(False)
        for kind, network in networks.items():
            for _ in range(1 if side > 32 else 2):
                at = time.process_time()
                write(network, 1, side**2)
                written[kind].append(time.process_time() - at)
        step = {kind: min(seconds) for kind, seconds in taken.items()}
        draw = {kind: min(seconds) for kind, seconds in written.items()}
        print(json.dumps({
            "codes": side**2, "threads": args.threads, "training_step_full": round(step["full"], 3),
            "training_step_sparse": round(step["sparse"], 3),
            "training_times": round(step["full"] / step["sparse"], 2), "writing_full": round(draw["full"], 2),
            "writing_sparse": round(draw["sparse"], 2), "writing_times": round(draw["full"] / draw["sparse"], 2),
        }), flush=True)  # fmt: skip


@torch.no_grad()
def int8(model: str, data: str) -> None:
    """The loss of held-out codes, given the words, by the same weights in fp32, bf16 and eight bits."""
    import reverie
    from reverie.data.augment import on_white
    from reverie.data.pixels import Pixels, cache_of
    from reverie.recipes.parts import open_index

    index = open_index(Path(data)).select(split="val", video=False)
    for kind, how in (
        ("fp32", {}), ("bf16", {"dtype": torch.bfloat16}), ("int8", {"dtype": torch.bfloat16, "quantise": "int8"}),
    ):  # fmt: skip
        system = reverie.load(model, **how)
        pixels = Pixels(index, size=system.size, cache=cache_of(index), quiet=True)
        some = pixels.good[:256]
        texts = [next(c.text for c in index[i].captions if c.language == "en") for i in some]
        losses = []
        for at in range(0, len(some), 32):
            images = on_white(torch.stack([pixels[i][0] for i in some[at : at + 32]]))
            batch = {"codes": system.encode(images), "tokens": system.read(texts[at : at + 32])}
            losses.append(float(system.loss(batch)["codes"]))
        print(json.dumps({"weights": kind, "held_out_codes": round(statistics.mean(losses), 5)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--count", type=int, default=256, help="codes of a picture")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sparse", action="store_true", help="the patterns against all codes")
    parser.add_argument("--int8", nargs=2, metavar=("MODEL", "DATA"), help="what eight bits cost")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        worker(args.worker[0], int(args.worker[1]), args.count)
    elif args.int8:
        int8(*args.int8)
    elif args.sparse:
        sparse(args)
    else:
        beside(args)


if __name__ == "__main__":
    main()
