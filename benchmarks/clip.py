"""CLIP's two towers beside open_clip, transformers and onnxruntime, interleaved in one run.

    python benchmarks/clip.py [--quick] [--threads 1] [--precision fp32 bf16] [--batch 1 32] [--out runs/clip-speed]

ViT-B/32 at 224 pixels (768 x 12 x 12), text 512 x 12 x 8 with 77 positions, random weights, since speed does not
depend on them; pictures as tensors, texts as tokens of real captions (the ones that ship, in English). Each round
calls every side once, and the table has the median of the rounds. open_clip and transformers read all 77 positions,
as their tokenizers fill them; onnxruntime runs open_clip's exported image tower, in fp32. In bf16 the weights of each
side are bf16, which is quicker than autocast for all.

With one thread the clock is this process's processor time, which other work on the machine disturbs least; with more
it is the time on the wall, and the machine must be quiet: the table says how many cores others used meanwhile. The
share of the peak is the arithmetic of the model on the positions that were read, over what a product of two matrices of
2,048 reaches in the same rounds. Memory is the peak of a process of its own
that embeds at each batch, libraries included.

What is quick in ours, and why, for docs/systems/clip.md:

- Texts run on their real tokens: they stand one after the other without padding, and only attention knows where each
  ends. A caption of nine tokens costs nine, not 77.
- The last block computes only the vector that is read: the class token's, or the end token's.
- Linear layers of many outputs at few positions are computed 512 outputs at a time, since the library under torch
  otherwise packs the whole weight first.
- bf16 weights on a processor without bf16 arithmetic widen to fp32 part by part. That halves the memory of the weights
  and takes somewhat longer than fp32: such a processor cannot be quicker in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peers import torchvision_loads
from torch import Tensor
from turns import busy, others

SIDES = ("reverie", "open_clip", "transformers", "onnxruntime")
MISSING = {
    "open_clip": "pip install --no-deps open_clip_torch timm torchvision",
    "transformers": "pip install transformers",
    "onnxruntime": "pip install onnxruntime onnx onnxscript, and open_clip",
}
POSITIONS, END, VOCAB = 77, 49_407, 49_408
Call = Callable[[], Any]


# The sides ---------------------------------------------------------------------------------------------------------


def reverie(dtype: torch.dtype) -> tuple[Any, Any]:
    from reverie.encoders.text import TextConfig
    from reverie.encoders.vit import VitConfig
    from reverie.systems.clip import Clip, ClipConfig

    model = Clip(ClipConfig(image=VitConfig(activation="gelu"), text=TextConfig(activation="gelu")))
    model = model.eval().to(dtype)
    return model.embed_image, model.embed_text


def open_clip_model() -> Any:
    torchvision_loads()
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=12, width=768, head_width=64, patch_size=32, image_size=224)
    text = open_clip.CLIPTextCfg(context_length=POSITIONS, vocab_size=VOCAB, width=512, heads=8, layers=12)
    return open_clip.model.CLIP(512, vision, text).eval()


def open_clip(dtype: torch.dtype) -> tuple[Any, Any]:
    model = open_clip_model().to(dtype)
    return (lambda x: model.encode_image(x.to(dtype))), model.encode_text


def transformers(dtype: torch.dtype) -> tuple[Any, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torchvision_loads()
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "image_size": 224, "patch_size": 32, "hidden_act": "gelu"}  # fmt: skip
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
            "max_position_embeddings": POSITIONS, "vocab_size": VOCAB, "hidden_act": "gelu", "eos_token_id": END,
            }  # fmt: skip
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=512)).eval().to(dtype)
    return (
        lambda x: model.get_image_features(pixel_values=x.to(dtype)),
        lambda tokens: model.get_text_features(input_ids=tokens),
    )


class _ImageTower(torch.nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode_image(x)


def onnxruntime(dtype: torch.dtype) -> tuple[Any, Any]:
    import onnxruntime as runtime

    if dtype != torch.float32:
        return None, None
    sessions: dict[int, Any] = {}

    def session(batch: int) -> Any:
        """open_clip's tower exported for one batch, the form that is quickest there."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = str(Path(folder) / "tower.onnx")
            torch.onnx.export(
                _ImageTower(open_clip_model()), (torch.randn(batch, 3, 224, 224),), path,
                input_names=["x"], output_names=["y"], dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def embed(x: Tensor) -> Any:
        if len(x) not in sessions:
            sessions[len(x)] = session(len(x))
        return sessions[len(x)].run(None, {"x": x.numpy()})

    return embed, None


MAKERS = {
    "reverie": reverie, "open_clip": open_clip, "transformers": transformers, "onnxruntime": onnxruntime,
}  # fmt: skip


def sides(dtype: torch.dtype, names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """name -> (embed images, embed tokens); what is missing is said in one line and left out."""
    found = {}
    for name in names:
        try:
            found[name] = MAKERS[name](dtype)
        except ImportError as error:
            print(f"{name} is left out ({error}): `{MISSING[name]}`", file=sys.stderr)
    return found


# The clock ---------------------------------------------------------------------------------------------------------


def interleave(calls: dict[str, Call], *, seconds: float, wall: bool) -> dict[str, dict[str, float]]:
    """Each call once a round for `seconds`, three rounds or more; one that would need more than its share has fewer."""
    clock = time.perf_counter if wall else time.process_time
    taken: dict[str, list[float]] = {name: [] for name in calls}
    load: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for call in calls.values():
        call()
    begun = time.perf_counter()
    for turn in range(10**6):
        if turn >= 3 and time.perf_counter() - begun > seconds:
            break
        for name, call in calls.items():
            if turn and spent[name] > max(seconds, 10) and turn >= 2:
                continue
            before, at, own, begin = busy(), clock(), time.process_time(), time.perf_counter()
            call()
            taken[name].append(clock() - at)
            spent[name] += (on_wall := time.perf_counter() - begin)
            load[name].append(others(on_wall, time.process_time() - own, before))
    return {
        name: {"seconds": statistics.median(times), "rounds": len(times), "least": min(times), "most": max(times),
               "others": statistics.fmean(load[name])}
        for name, times in taken.items()
    }  # fmt: skip


def arithmetic(positions: Sequence[int], width: int, depth: int) -> float:
    """Operations of a tower on items of these lengths: linear layers and attention, the projection left out."""
    return sum(2.0 * depth * (12 * width**2 * n + 2 * width * n**2) for n in positions)


# The work ----------------------------------------------------------------------------------------------------------


def captions(count: int) -> Tensor:
    """The first `count` English captions that ship, in an order that mixes lengths, as CLIP's tokens `count 77`."""
    from reverie import rng
    from reverie.codecs.bpe import Bpe
    from reverie.data.index import Index
    from reverie.data.stickers import sample_folder

    texts = sorted(
        {
            caption.text
            for item in Index.read(sample_folder())
            for caption in item.captions
            if caption.text.isascii()
        }
    )
    order = torch.randperm(len(texts), generator=rng.generator(0, "captions"))
    return Bpe.clip().encode([texts[i] for i in order[:count].tolist()], length=POSITIONS)


def cases(batches: Sequence[int], texts: Tensor) -> list[dict[str, Any]]:
    work: list[dict[str, Any]] = []
    for batch in batches:
        images = torch.rand(batch, 3, 224, 224) * 2 - 1
        work.append({"what": "image", "batch": batch, "input": images})
        # One text: the one of the middle length, since a single draw might be very short or long.
        length = (texts == END).int().argmax(-1) + 1
        some = texts[length.argsort()[len(texts) // 2]][None] if batch == 1 else texts[:batch]
        work.append(
            {
                "what": "text",
                "batch": batch,
                "input": some,
                "tokens": ((some == END).int().argmax(-1) + 1).tolist(),
            }
        )
    return work


def work_of(case: dict[str, Any], side: str) -> float:
    if case["what"] == "image":
        return arithmetic([50] * case["batch"], 768, 12) + 2.0 * case["batch"] * 49 * 3072 * 768
    return arithmetic(case["tokens"] if side == "reverie" else [POSITIONS] * case["batch"], 512, 12)


@torch.no_grad()
def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    texts = captions(max(64, *asked.batch))
    left, right = torch.randn(2, 2048, 2048)
    rows: list[dict[str, Any]] = []
    for precision in asked.precision:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        models = sides(dtype, asked.sides)
        for case in cases(asked.batch, texts):
            place = 0 if case["what"] == "image" else 1
            calls: dict[str, Call] = {
                name: (lambda embed=model[place], given=case["input"]: embed(given))
                for name, model in models.items()
                if model[place] is not None
            }
            calls["peak"] = lambda: left @ right
            times = interleave(calls, seconds=asked.seconds, wall=asked.threads > 1)
            peak = 2 * 2048**3 / times.pop("peak")["seconds"]
            for name, time_of in times.items():
                row = {
                    "what": case["what"],
                    "batch": case["batch"],
                    "precision": precision,
                    "side": name,
                    **time_of,
                }
                row["rate"] = case["batch"] / row["seconds"]
                row["share"] = work_of(case, name) / row["seconds"] / peak
                row["peak_gflops"] = peak / 1e9
                if "tokens" in case:
                    row["tokens"] = sum(case["tokens"])
                rows.append(row)
            print(".", end="", file=sys.stderr, flush=True)
        del models
    print(file=sys.stderr)
    return rows


@torch.no_grad()
def memory(asked: argparse.Namespace) -> None:
    """In a process of its own: embed at every batch, then the peak, as JSON."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[asked.precision[0]]
    torch.set_default_dtype(
        dtype
    )  # built in it, else the peak is that of the weights before they were rounded
    models = sides(dtype, asked.sides)
    torch.set_default_dtype(torch.float32)
    for case in cases(asked.batch, captions(max(64, *asked.batch))):
        for model in models.values():
            embed = model[0 if case["what"] == "image" else 1]
            if embed is not None:
                embed(case["input"])
    print(json.dumps({"mib": round(peak() / 2**20)} if models else {}))


def peak() -> int:
    """Bytes. Where the system has it, of this program alone: `getrusage` keeps what the parent had reached."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memories(asked: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for precision in asked.precision:
        for side in asked.sides:
            if side == "onnxruntime":  # its export shares the process, so its peak is not its own
                continue
            command = [sys.executable, __file__, "--memory", "--sides", side, "--precision", precision,
                       "--threads", str(asked.threads), "--batch", *map(str, asked.batch)]  # fmt: skip
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append({"side": side, "precision": precision, **json.loads(told.strip().split("\n")[-1])})
    return [one for one in found if "mib" in one]


# The report --------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], peaks: list[dict[str, Any]], threads: int) -> str:
    clock = "processor time" if threads == 1 else "wall time"
    disturbed = statistics.fmean(row["others"] for row in rows)
    peak = statistics.median(row["peak_gflops"] for row in rows)
    names = [name for name in SIDES if any(row["side"] == name for row in rows)]
    lines = [
        f"Items a second (share of the matmul peak), {threads} thread{'s' * (threads > 1)}, {clock}, "
        f"torch {torch.__version__}; peak {peak:.0f} GFLOP/s; others used {disturbed:.1f} cores meanwhile.",
        "",
        f"| | {' | '.join(names)} | ours over the best peer |",
        f"|---|{'---:|' * (len(names) + 1)}",
    ]
    for key in dict.fromkeys((row["what"], row["precision"], row["batch"]) for row in rows):
        here = {row["side"]: row for row in rows if (row["what"], row["precision"], row["batch"]) == key}
        cells = [f"{here[n]['rate']:.2f} ({here[n]['share']:.0%})" if n in here else "" for n in names]
        best = max((row["rate"] for name, row in here.items() if name != "reverie"), default=None)
        ratio = f"{here['reverie']['rate'] / best:.2f}" if best and "reverie" in here else ""
        tokens = next((f", {row['tokens']} tokens" for row in here.values() if "tokens" in row), "")
        lines.append(f"| {key[0]}s, {key[1]}, batch {key[2]}{tokens} | {' | '.join(cells)} | {ratio} |")
    if peaks:
        lines += ["", "| peak memory, MiB | " + " | ".join(n for n in names if n != "onnxruntime") + " |",
                  "|---|" + "---:|" * len([n for n in names if n != "onnxruntime"])]  # fmt: skip
        for precision in dict.fromkeys(one["precision"] for one in peaks):
            of = {one["side"]: one["mib"] for one in peaks if one["precision"] == precision}
            lines.append(
                f"| {precision} | "
                + " | ".join(str(of.get(n, "")) for n in names if n != "onnxruntime")
                + " |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/clip-speed"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each line of the table")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--quick", action="store_true", help="three rounds of batch 1 and 4, no memory")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    if asked.memory:
        memory(asked)
        return
    if asked.quick:
        asked.seconds, asked.batch = 0.0, [1, 4]
    rows = measure(asked)
    peaks = [] if asked.quick else memories(asked)
    text = table(rows, peaks, asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    found = {"torch": torch.__version__, "threads": asked.threads, "rows": rows, "memory": peaks}
    (asked.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (asked.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
