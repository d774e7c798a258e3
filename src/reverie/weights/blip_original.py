"""BLIP <- the names of its authors' code: pre-trained, captions, retrieval, answers, and two pictures (NLVR).

Slow copies and queues of training are left out. The two text networks of a pre-trained file share all but their
self-attention, so its other tensors stand there twice. `temp` is the temperature that cosines are divided by.
https://github.com/salesforce/BLIP/tree/main/models
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from reverie.weights.files import Entry, ModelFileError
from reverie.weights.layout import Foreign
from reverie.weights.remap import Rule, matching

QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue")
ENCODER, DECODER = "text_encoder", "text_decoder.bert"
WORDS = "embeddings.word_embeddings.weight"
HEAD = "text_decoder.cls.predictions"


def tower(theirs: str = "visual_encoder", ours: str = "image") -> tuple[Rule, ...]:
    """The image tower, as timm names it."""
    block, own = f"{theirs}.blocks.{{i}}", f"{ours}.blocks.{{i}}"
    return (
        Rule(f"{theirs}.cls_token", f"{ours}.class_token", rearrange="1 1 d -> d"),
        Rule(f"{theirs}.pos_embed", f"{ours}.positions", rearrange="1 n d -> n d"),
        Rule(f"{theirs}.patch_embed.proj.{{p}}", f"{ours}.stem.{{p}}"),
        Rule(f"{block}.norm1.{{p}}", f"{own}.norm1.{{p}}"),
        Rule(f"{block}.attn.qkv.{{p}}", f"{own}.attention.qkv.{{p}}"),
        Rule(f"{block}.attn.proj.{{p}}", f"{own}.attention.out.{{p}}"),
        Rule(f"{block}.norm2.{{p}}", f"{own}.norm2.{{p}}"),
        Rule(f"{block}.mlp.fc1.{{p}}", f"{own}.mlp.up.{{p}}"),
        Rule(f"{block}.mlp.fc2.{{p}}", f"{own}.mlp.down.{{p}}"),
        Rule(f"{theirs}.norm.{{p}}", f"{ours}.norm_post.{{p}}"),
    )


def bert(theirs: Iterable[str], ours: str, *, writes: bool = False) -> tuple[Rule, ...]:
    """What all modes of a text network share but cross-attention, and the self-attention of the first of `theirs`.

    theirs: what comes before the names; with two they are copies of one.
    """
    names = list(theirs)
    layer, own = "encoder.layer.{i}", f"{ours}.blocks.{{i}}"
    shared = (
        ("embeddings.position_embeddings.weight", f"{ours}.positions"),
        ("embeddings.LayerNorm.{p}", f"{ours}.norm.{{p}}"),
        (f"{layer}.crossattention.output.LayerNorm.{{p}}", f"{own}.norm_cross.{{p}}"),
        (f"{layer}.intermediate.dense.{{p}}", f"{own}.mlp.up.{{p}}"),
        (f"{layer}.output.dense.{{p}}", f"{own}.mlp.down.{{p}}"),
        (f"{layer}.output.LayerNorm.{{p}}", f"{own}.norm_mlp.{{p}}"),
    )
    rules = [
        Rule(tuple(f"{name}.{source}" for name in names), target, copies=len(names) > 1)
        for source, target in shared
    ]
    return (*rules, *own_attention(names[0], ours, writes=writes))


def own_attention(theirs: str, ours: str, *, writes: bool) -> tuple[Rule, ...]:
    layer, mode = f"{theirs}.encoder.layer.{{i}}.attention", "causal" if writes else "attention"
    own = f"{ours}.blocks.{{i}}"
    return (
        Rule(tuple(f"{layer}.self.{part}.{{p}}" for part in ("query", "key", "value")), f"{own}.{mode}.qkv.{{p}}"),
        Rule(f"{layer}.output.dense.{{p}}", f"{own}.{mode}.out.{{p}}"),
        Rule(f"{layer}.output.LayerNorm.{{p}}", f"{own}.norm_{mode}.{{p}}"),
    )  # fmt: skip


def cross(theirs: Iterable[str], ours: str) -> tuple[Rule, ...]:
    """Cross-attention. Keys and values, which are joined here, are read of the first of `theirs`."""
    names, own = list(theirs), f"{ours}.blocks.{{i}}.cross"
    layer = "encoder.layer.{i}.crossattention"
    tied = len(names) > 1
    return (
        Rule(tuple(f"{name}.{layer}.self.query.{{p}}" for name in names), f"{own}.q.{{p}}", copies=tied),
        Rule(tuple(f"{names[0]}.{layer}.self.{part}.{{p}}" for part in ("key", "value")), f"{own}.kv.{{p}}"),
        Rule(tuple(f"{name}.{layer}.output.dense.{{p}}" for name in names), f"{own}.out.{{p}}", copies=tied),
    )


def twins(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The cross-attentions to two pictures."""
    layer, own = f"{theirs}.encoder.layer.{{i}}.crossattention", f"{ours}.blocks.{{i}}.cross"
    rules = [
        rule
        for i in range(2)
        for rule in (
            Rule(f"{layer}.self{i}.query.{{p}}", f"{own}.both.{i}.q.{{p}}"),
            Rule(tuple(f"{layer}.self{i}.{part}.{{p}}" for part in ("key", "value")), f"{own}.both.{i}.kv.{{p}}"),
            Rule(f"{layer}.output.dense{i}.{{p}}", f"{own}.both.{i}.out.{{p}}"),
        )
    ]  # fmt: skip
    return (*rules, Rule(f"{layer}.output.merge_layer.{{p}}", f"{own}.merge.{{p}}"))


def words(entries: Collection[str], theirs: Iterable[str], ours: str, *, writes: bool) -> tuple[Rule, ...]:
    """The embedding of words, and the head that writes them: under which of their names they stand, `entries` say."""
    names = [f"{name}.{WORDS}" for name in theirs]
    rules: list[Rule] = []
    if writes:
        names.append(f"{HEAD}.decoder.weight")
        biases = [name for name in (f"{HEAD}.bias", f"{HEAD}.decoder.bias") if name in entries]
        rules += [
            Rule(tuple(biases or (f"{HEAD}.bias",)), f"{ours}.words.bias", copies=len(biases) > 1),
            Rule(f"{HEAD}.transform.dense.{{p}}", f"{ours}.words.dense.{{p}}"),
            Rule(f"{HEAD}.transform.LayerNorm.{{p}}", f"{ours}.words.norm.{{p}}"),
        ]
    present = [name for name in names if name in entries] or names[:1]
    return (Rule(tuple(present), f"{ours}.embedding.weight", copies=len(present) > 1), *rules)


COUNTED = "embeddings.position_ids"
HEADS = (
    Rule("vision_proj.{p}", "image_projection.{p}"),
    Rule("text_proj.{p}", "text_projection.{p}"),
    Rule("itm_head.{p}", "matching.{p}"),
)


def task(entries: Collection[str]) -> str | None:
    """What a file of theirs, or of transformers, is for, by its names; None: it is none."""
    encodes, writes = f"{ENCODER}.{WORDS}" in entries, f"{DECODER}.embeddings.LayerNorm.weight" in entries
    if encodes and writes:
        return "pretrained" if "itm_head.weight" in entries else "answers"
    if encodes:
        return (
            "pairs" if "cls_head.0.weight" in entries else "retrieval" if "itm_head.weight" in entries else None
        )  # fmt: skip
    return "captions" if writes else None


def text_table(entries: Collection[str], kind: str) -> tuple[Rule, ...]:
    """The text networks of one kind of file, which transformers names alike."""
    if kind == "captions":
        return (
            *bert([DECODER], "text", writes=True), *cross([DECODER], "text"),
            *words(entries, [DECODER], "text", writes=True),
        )  # fmt: skip
    if kind == "answers":
        return (
            *bert([ENCODER], "text"), *cross([ENCODER], "text"), *words(entries, [ENCODER], "text", writes=False),
            *bert([DECODER], "answers", writes=True), *cross([DECODER], "answers"),
            *words(entries, [DECODER], "answers", writes=True),
        )  # fmt: skip
    if kind == "pretrained":
        both = [ENCODER, DECODER]
        return (
            *bert(both, "text"), *own_attention(DECODER, "text", writes=True), *cross(both, "text"),
            *words(entries, both, "text", writes=True), *HEADS,
        )  # fmt: skip
    read = (*bert([ENCODER], "text"), *words(entries, [ENCODER], "text", writes=False))
    if kind == "pairs":
        return (*read, *twins(ENCODER, "text"), Rule("cls_head.{i}.{p}", "head.{i}.{p}"))
    return (*read, *cross([ENCODER], "text"), *HEADS)


SYSTEMS = {"answers": "blip-vqa", "pairs": "blip-nlvr"}  # the others are "blip"


def is_theirs(entries: Collection[str]) -> bool:
    """Whether a file has the names of BLIP's authors."""
    return "visual_encoder.cls_token" in entries and task(entries) is not None


def read_alone(entries: Mapping[str, Entry], config: Mapping[str, Any] | None, *, what: str) -> Foreign:
    """From a checkpoint's header: `config`, of the system as plain data, or what the shapes say.

    Shapes do not say heads, which have 64 channels in all public files, nor the ids of tokens, which are BERT's there.
    """
    kind = task(entries)
    assert kind is not None
    if config is None:
        try:
            values = _values({name: entry.shape for name, entry in entries.items()}, kind)
        except (KeyError, ValueError, IndexError, ZeroDivisionError):
            raise ModelFileError(f"{what} is no BLIP of a published size: give config=.") from None
    else:
        values = dict(config)
    return Foreign(
        system=SYSTEMS.get(kind, "blip"), values=values, table=_table(entries, kind, values),
        ignore=tuple(_ignored(entries, kind)),
    )  # fmt: skip


def write(name: str, config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The table of a system of ours, given its config as plain data; what they keep beside it in training is absent.

    Their files say neither heads nor ids of tokens: those of other than published sizes are read with config=.
    """
    text = config["text"]
    reads = "retrieval" if not text["writes"] else "pretrained"
    alone = reads if text["understands"] else "captions"
    kind = next((kind for kind, system in SYSTEMS.items() if system == name), alone)
    names = [] if kind == "captions" else [f"{ENCODER}.{WORDS}", f"{ENCODER}.{COUNTED}"]
    if kind in ("captions", "answers", "pretrained"):
        names += [f"{DECODER}.{WORDS}", f"{DECODER}.{COUNTED}"]
        names += [f"{HEAD}.{part}" for part in ("decoder.weight", "bias", "decoder.bias")]
    return _table(names, kind, config)


def _table(entries: Collection[str], kind: str, values: Mapping[str, Any]) -> tuple[Rule, ...]:
    table = [*tower(), *text_table(entries, kind)]
    if kind in ("pretrained", "retrieval"):
        table.append(Rule("temp", "temperature", rearrange=" -> 1"))
    for text, name in (("text", ENCODER), ("answer" if kind == "answers" else "text", DECODER)):
        if (counted := f"{name}.{COUNTED}") in entries:
            table.append(Rule(counted, (), value=partial(_counted, values[text]["length"])))
    return tuple(table)


def _ignored(entries: Collection[str], kind: str) -> Iterable[str]:
    """Slow copies, queues, and of tied keys and values the second copy."""
    for name in entries:
        if re.match(r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\.", name) or name in QUEUES:
            yield name
    if kind == "pretrained":
        again = [
            f"{DECODER}.encoder.layer.{{i}}.crossattention.self.{part}.{{p}}" for part in ("key", "value")
        ]
        yield from matching(again, entries)


def _counted(length: int) -> torch.Tensor:
    return torch.arange(length)[None]


def _depth(shapes: Mapping[str, Any], name: str) -> int:
    depth = 0
    while name.format(depth) in shapes:
        depth += 1
    return depth


def _values(shapes: Mapping[str, tuple[int, ...]], kind: str) -> dict[str, Any]:
    width, _, patch, _ = shapes["visual_encoder.patch_embed.proj.weight"]
    grid = math.isqrt(shapes["visual_encoder.pos_embed"][1] - 1)
    image = {
        "size": grid * patch, "patch": patch, "width": width, "heads": _heads(width),
        "depth": _depth(shapes, "visual_encoder.blocks.{}.norm1.weight"),
        "hidden": shapes["visual_encoder.blocks.0.mlp.fc1.weight"][0],
        "activation": "gelu", "stem_bias": True, "norm_pre": False, "eps": 1e-6,
    }  # fmt: skip

    def text(theirs: str, *, understands: bool, writes: bool) -> dict[str, Any]:
        vocab, width = shapes[f"{theirs}.{WORDS}"]
        layer = f"{theirs}.encoder.layer.0"
        key = "self0" if kind == "pairs" else "self"
        return {
            "vocab": vocab, "width": width, "heads": _heads(width),
            "length": shapes[f"{theirs}.embeddings.position_embeddings.weight"][0],
            "depth": _depth(shapes, f"{theirs}.encoder.layer.{{}}.output.dense.weight"),
            "hidden": shapes[f"{layer}.intermediate.dense.weight"][0],
            "context_width": shapes[f"{layer}.crossattention.{key}.key.weight"][1],
            "understands": understands, "writes": writes,
        }  # fmt: skip

    values: dict[str, Any] = {"image": image}
    if kind == "captions":
        values["text"] = text(DECODER, understands=False, writes=True)
        values["prompt"] = "a picture of "
    else:
        values["text"] = text(ENCODER, understands=True, writes=kind == "pretrained")
    if kind == "answers":
        values["answer"] = text(DECODER, understands=False, writes=True)
    if kind in ("pretrained", "retrieval"):
        values["width"] = shapes["vision_proj.weight"][0]
    if kind == "pairs":
        merging = f"{ENCODER}.encoder.layer.{{}}.crossattention.output.merge_layer.weight"
        depth = values["text"]["depth"]
        values["merges"] = next((i for i in range(depth) if merging.format(i) in shapes), depth)
    return values


def _heads(width: int) -> int:
    if width % 64:
        raise ValueError(width)
    return width // 64
