"""BLIP-2's first stage under its authors' names (LAVIS, `Blip2Qformer`), as a safetensors file; `temp` is kept.

`Qformer.bert...`, `query_tokens`, `vision_proj`, `text_proj`, `itm_head`, `temp`, `ln_vision`, and `visual_encoder`
where the file holds the frozen tower. The released files lack it: then `config` says where it comes from, a
`Blip2Config` whose `sight.source` names a model that has it.
https://github.com/salesforce/LAVIS/blob/main/lavis/models/blip2_models/blip2_qformer.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from reverie.errors import InputError
from reverie.weights.blip2_transformers import qformer_rules
from reverie.weights.files import Entry, ModelFileError
from reverie.weights.layout import LAYERS, Foreign, inside
from reverie.weights.remap import Rule

BERT = "Qformer.bert"
HEAD_CHANNELS = 64  # BERT's; the number of heads stands in no tensor
NO_TOWER = (
    "{what} holds a BLIP-2 without its frozen image tower: give config=, a Blip2Config whose sight.source names a model"
    " that has it, and its hash."
)
# Buffers that count 0, 1, 2, ...
IGNORE = (f"{BERT}.embeddings.position_ids",)


def is_theirs(entries: Collection[str]) -> bool:
    """Whether a file has the names of the first stage's authors."""
    return {"query_tokens", "itm_head.weight", f"{BERT}.embeddings.LayerNorm.weight"} <= set(entries)


def read_alone(entries: Mapping[str, Entry], config: Mapping[str, Any] | None, *, what: str) -> Foreign:
    """From a checkpoint's header: `config`, a `Blip2Config` as plain data, or what the shapes say.

    They do not say how many heads there are: EVA's have 88 channels, BERT's 64, unless the config says it. A file
    without `visual_encoder` needs a config whose `sight.source` names a model with that tower, and its hash.
    """
    tower = "visual_encoder.cls_token" in entries
    if config is not None:
        if "sight" not in config or "width" not in config:
            raise ModelFileError(f"{what} is a BLIP-2 of the first stage: give a Blip2Config, or none.")
        if not tower and not config["sight"]["source"]["model"]:
            raise ModelFileError(NO_TOWER.format(what=what))
        values = dict(config)
    elif tower:
        values = _values(entries, what)
    else:
        raise ModelFileError(NO_TOWER.format(what=what))
    inner = values["sight"]["qformer"]
    own = not values["sight"].get("source", {}).get("model")
    table = _table(depth=min(inner["depth"], LAYERS), every=max(inner["every"], 1), tower=own)
    # A tower that is named is not read a second time.
    ignore = IGNORE if own else (*IGNORE, *(name for name in entries if name.startswith("visual_encoder.")))
    return Foreign(system="blip2", values=values, table=table, ignore=ignore)


def write(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Our table, from our config as plain data. InputError: they have no such model."""
    sight = config["sight"]
    inner, image = sight["qformer"], sight["image"]
    own = not sight["source"]["model"]
    as_theirs = {"kind": "vit", "stem": "patch", "stem_bias": True, "norm_pre": False, "norm_post": False,
                 "registers": 0, "pool": "class"}  # fmt: skip
    if own and (sight["leave"] or any(image.get(key) != value for key, value in as_theirs.items())):
        raise InputError("LAVIS has no image tower of this kind; save this model in Reverie's own format.")
    if not (inner["reads"] and inner["writes"]):
        raise InputError(
            "LAVIS' first stage has a head that writes, which this model lacks; save it in Reverie's own format."
        )
    return _table(depth=inner["depth"], every=inner["every"], tower=own)


def _values(entries: Mapping[str, Entry], what: str) -> dict[str, Any]:
    """The config that the shapes say."""
    try:
        width, _, patch, _ = entries["visual_encoder.patch_embed.proj.weight"].shape
        places = entries["visual_encoder.pos_embed"].shape[1] - 1
        hidden = entries["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0]
        _, queries, channels = entries["query_tokens"].shape
        words = entries[f"{BERT}.embeddings.word_embeddings.weight"].shape[0]
        length = entries[f"{BERT}.embeddings.position_embeddings.weight"].shape[0]
        inside_text = entries[f"{BERT}.encoder.layer.0.intermediate.dense.weight"].shape[0]
        shared = entries["vision_proj.weight"].shape[0]
        depths = [
            1 + max(int(found[1]) for name in entries if (found := re.match(pattern, name)))
            for pattern in (
                r"visual_encoder\.blocks\.(\d{1,3})\.",
                r"Qformer\.bert\.encoder\.layer\.(\d{1,3})\.",
            )
        ]
    except (KeyError, ValueError, IndexError) as error:
        raise ModelFileError(
            f"{what} lacks tensors of a BLIP-2, or has them in other shapes; fetch it again."
        ) from error
    looks = sorted(
        {
            int(found[1])
            for name in entries
            if (found := re.match(r"Qformer\.bert\.encoder\.layer\.(\d+)\.cross", name))
        }
    )
    image = {
        "kind": "vit", "size": patch * math.isqrt(places), "patch": patch, "width": width, "depth": depths[0],
        "heads": max(width // (88 if width % 88 == 0 else 64), 1), "hidden": inside(hidden, width),
        "activation": "gelu", "stem_bias": True, "norm_pre": False, "norm_post": False, "eps": 1e-6,
    }  # fmt: skip
    bert = words > 30_000
    qformer = {
        "queries": queries, "width": channels, "depth": depths[1], "heads": max(channels // HEAD_CHANNELS, 1),
        "hidden": inside_text, "context_width": width, "every": looks[1] if len(looks) > 1 else depths[1],
        "vocab": words, "length": length, "decode": words - 1, **({} if bert else {"start": 2, "end": 3}),
    }  # fmt: skip
    return {"sight": {"image": image, "qformer": qformer}, "width": shared}


def _table(*, depth: int, every: int, tower: bool) -> tuple[Rule, ...]:
    blocks = qformer_rules(
        f"{BERT}.encoder", "sight.qformer", depth=depth, every=every, reads=True, inner="self"
    )
    vision = (
        Rule("visual_encoder.cls_token", "sight.image.class_token", rearrange="1 1 d -> d"),
        Rule("visual_encoder.pos_embed", "sight.image.positions", rearrange="1 n d -> n d"),
        Rule("visual_encoder.patch_embed.proj.{p}", "sight.image.stem.{p}"),
        Rule("visual_encoder.blocks.{i}.attn.qkv.weight", "sight.image.blocks.{i}.attention.qkv.weight"),
        # Keys have no bias of theirs; ours is zero there.
        Rule(
            ("visual_encoder.blocks.{i}.attn.q_bias", "visual_encoder.blocks.{i}.attn.v_bias"),
            "sight.image.blocks.{i}.attention.qkv.bias", zeros=(1,),
        ),
        Rule("visual_encoder.blocks.{i}.attn.proj.{p}", "sight.image.blocks.{i}.attention.out.{p}"),
        Rule("visual_encoder.blocks.{i}.norm1.{p}", "sight.image.blocks.{i}.norm1.{p}"),
        Rule("visual_encoder.blocks.{i}.norm2.{p}", "sight.image.blocks.{i}.norm2.{p}"),
        Rule("visual_encoder.blocks.{i}.mlp.fc1.{p}", "sight.image.blocks.{i}.mlp.up.{p}"),
        Rule("visual_encoder.blocks.{i}.mlp.fc2.{p}", "sight.image.blocks.{i}.mlp.down.{p}"),
    )  # fmt: skip
    head = "Qformer.cls.predictions"
    words = (
        Rule(
            (f"{BERT}.embeddings.word_embeddings.weight", f"{head}.decoder.weight"), "sight.qformer.embedding.weight",
            copies=True,
        ),
        Rule(f"{head}.transform.dense.{{p}}", "sight.qformer.words.dense.{p}"),
        Rule(f"{head}.transform.LayerNorm.{{p}}", "sight.qformer.words.norm.{p}"),
        Rule((f"{head}.bias", f"{head}.decoder.bias"), "sight.qformer.words.bias", copies=True),
    )  # fmt: skip
    return (
        *(vision if tower else ()),
        *blocks,
        *words,
        Rule("ln_vision.{p}", "sight.norm.{p}"),
        Rule("query_tokens", "sight.qformer.queries", rearrange="1 q d -> q d"),
        Rule(f"{BERT}.embeddings.position_embeddings.weight", "sight.qformer.positions"),
        Rule(f"{BERT}.embeddings.LayerNorm.{{p}}", "sight.qformer.norm.{p}"),
        Rule("vision_proj.{p}", "image_projection.{p}"),
        Rule("text_proj.{p}", "text_projection.{p}"),
        Rule("itm_head.{p}", "matching.{p}"),
        Rule("temp", "temperature", rearrange=" -> 1"),
    )
