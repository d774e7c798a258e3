"""CLIP and SigLIP <-> open_clip: its folders, its checkpoints, and OpenAI's own naming, which it kept.

A folder holds open_clip_config.json beside the weights. A checkpoint alone holds names only: OpenAI's own are known by
three numbers among the weights, and their definition (QuickGELU, heads of 64 channels, read at the highest id) goes
with them; of any other somebody must say which model it is, since names and shapes do not tell GELU from QuickGELU.
SigLIP's image tower there is timm's, known by its model's name.
https://github.com/mlfoundations/open_clip/blob/main/src/open_clip/model.py
https://github.com/openai/CLIP/blob/main/clip/model.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reverie.errors import InputError
from reverie.weights.files import Entry, ModelFileError, shorten
from reverie.weights.layout import CLIP_COLOURS, Fields, Foreign, inside, ratio
from reverie.weights.remap import Rule

CONFIG, MODEL = "open_clip_config.json", "open_clip_model.safetensors"
OPENAI = (
    "input_resolution",
    "context_length",
    "vocab_size",
)  # numbers that OpenAI's files hold besides weights
# The mask is a buffer of the text tower; of a TorchScript archive it comes with every block, since each holds it.
MASK = ("attn_mask", "transformer.resblocks.{i}.attn_mask")
IGNORE = (*OPENAI, *MASK, *(f"text.{mask}" for mask in MASK))
HEAD = 64  # channels of a head unless the config says otherwise
# The keys of their config that are read, or change nothing once a model is trained.
_BOTH = {
    "width", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs", "ls_init_value", "output_tokens", "qk_norm",
    "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc", "block_type",
}  # fmt: skip
MODEL_KEYS = {
    "embed_dim", "quick_gelu", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "custom_text",
    "vision_cfg", "text_cfg",
}  # fmt: skip
VISION_KEYS = _BOTH | {
    "image_size", "patch_size", "head_width", "patch_dropout", "attentional_pool", "attn_pooler_queries",
    "attn_pooler_heads", "no_ln_pre", "pos_embed_type", "final_ln_after_pool", "pool_type", "timm_model_name",
    "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
}  # fmt: skip
TEXT_KEYS = _BOTH | {
    "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "heads", "embed_cls",
    "pad_id", "eos_id", "no_causal_mask", "final_ln_after_pool", "pool_type", "proj_bias", "proj_type",
    "hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
}  # fmt: skip

# timm's SigLIP towers: a size's width, depth, heads and hidden channels; of each tower the patch, the picture's side
# and how it computes GELU. https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/vision_transformer.py
TIMM_SHAPES = {
    "base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096), "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}  # fmt: skip
TIMM = {
    f"vit_{size}_patch{patch}_siglip_{side}": (size, patch, side, activation)
    for size, patch, sides, activation in (
        ("base", 16, (224, 256, 384, 512), "gelu"),
        ("base", 32, (256,), "gelu_tanh"),
        ("large", 16, (256, 384), "gelu"),
        ("large", 16, (512,), "gelu_tanh"),
        ("so400m", 14, (224, 378, 384), "gelu"),
        ("so400m", 16, (256, 384, 512), "gelu_tanh"),
        ("giantopt", 16, (256, 384), "gelu_tanh"),
    )
    for side in sides
}


# ---------------------------------------------------------------- names


def _blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    theirs, ours = f"{theirs}.resblocks.{{i}}", f"{ours}.blocks.{{i}}"
    return (
        Rule(f"{theirs}.ln_1.{{p}}", f"{ours}.norm1.{{p}}"),
        Rule(f"{theirs}.attn.in_proj_{{p}}", f"{ours}.attention.qkv.{{p}}"),
        Rule(f"{theirs}.attn.out_proj.{{p}}", f"{ours}.attention.out.{{p}}"),
        Rule(f"{theirs}.ln_2.{{p}}", f"{ours}.norm2.{{p}}"),
        Rule(f"{theirs}.mlp.c_fc.{{p}}", f"{ours}.mlp.up.{{p}}"),
        Rule(f"{theirs}.mlp.c_proj.{{p}}", f"{ours}.mlp.down.{{p}}"),
    )


VIT = (
    Rule("visual.class_embedding", "image.class_token"),
    Rule("visual.conv1.weight", "image.stem.weight"),
    Rule("visual.positional_embedding", "image.positions"),
    Rule("visual.ln_pre.{p}", "image.norm_pre.{p}"),
    *_blocks("visual.transformer", "image"),
    Rule("visual.ln_post.{p}", "image.norm_post.{p}"),
    Rule("visual.proj", "image_projection.weight", rearrange="a b -> b a"),
)
_STAGE, _OURS = "visual.layer{l}.{i}", "image.stage{l}.{i}"
RESNET = (
    *(Rule(f"visual.conv{k}.weight", f"image.conv{k}.weight") for k in (1, 2, 3)),
    *(Rule(f"visual.bn{k}.{{p}}", f"image.norm{k}.{{p}}") for k in (1, 2, 3)),
    *(Rule(f"{_STAGE}.conv{k}.weight", f"{_OURS}.conv{k}.weight") for k in (1, 2, 3)),
    *(Rule(f"{_STAGE}.bn{k}.{{p}}", f"{_OURS}.norm{k}.{{p}}") for k in (1, 2, 3)),
    Rule(f"{_STAGE}.downsample.{{k}}.{{p}}", f"{_OURS}.shortcut.{{k}}.{{p}}"),
    Rule("visual.attnpool.positional_embedding", "image.positions"),
    *(Rule(f"visual.attnpool.{x}_proj.{{p}}", f"image.pooling.{x}.{{p}}") for x in "qkv"),
    Rule("visual.attnpool.c_proj.{p}", "image.pooling.out.{p}"),
)
_TRUNK = "visual.trunk"
TIMM_VIT = (
    Rule(f"{_TRUNK}.patch_embed.proj.{{p}}", "image.stem.{p}"),
    Rule(f"{_TRUNK}.pos_embed", "image.positions", rearrange="1 n d -> n d"),
    Rule(f"{_TRUNK}.blocks.{{i}}.norm1.{{p}}", "image.blocks.{i}.norm1.{p}"),
    Rule(f"{_TRUNK}.blocks.{{i}}.attn.qkv.{{p}}", "image.blocks.{i}.attention.qkv.{p}"),
    Rule(f"{_TRUNK}.blocks.{{i}}.attn.proj.{{p}}", "image.blocks.{i}.attention.out.{p}"),
    Rule(f"{_TRUNK}.blocks.{{i}}.norm2.{{p}}", "image.blocks.{i}.norm2.{p}"),
    Rule(f"{_TRUNK}.blocks.{{i}}.mlp.fc1.{{p}}", "image.blocks.{i}.mlp.up.{p}"),
    Rule(f"{_TRUNK}.blocks.{{i}}.mlp.fc2.{{p}}", "image.blocks.{i}.mlp.down.{p}"),
    Rule(f"{_TRUNK}.norm.{{p}}", "image.norm_post.{p}"),
    Rule(f"{_TRUNK}.attn_pool.latent", "image.pooling.query", rearrange="1 1 d -> d"),
    Rule(f"{_TRUNK}.attn_pool.q.{{p}}", "image.pooling.attention.q.{p}"),
    Rule(
        f"{_TRUNK}.attn_pool.kv.{{p}}",
        ("image.pooling.attention.k.{p}", "image.pooling.attention.v.{p}"),
    ),
    Rule(f"{_TRUNK}.attn_pool.proj.{{p}}", "image.pooling.attention.out.{p}"),
    Rule(f"{_TRUNK}.attn_pool.norm.{{p}}", "image.pooling.norm.{p}"),
    Rule(f"{_TRUNK}.attn_pool.mlp.fc1.{{p}}", "image.pooling.mlp.up.{p}"),
    Rule(f"{_TRUNK}.attn_pool.mlp.fc2.{{p}}", "image.pooling.mlp.down.{p}"),
)


def table(config: Mapping[str, Any], *, text: str, scalar: bool = True, prefix: str = "") -> tuple[Rule, ...]:
    """Their names -> ours for a model of our config. `text`: "text." where the text tower is a module of its own.

    `scalar`: whether the temperature is a number or a list of one. `prefix`: before every name ("module.").
    """
    image = config["image"]
    tower = RESNET if image["kind"] == "resnet" else TIMM_VIT if image["pool"] == "attention" else VIT
    one = " -> 1" if scalar else None
    projection = (
        Rule(f"{text}text_projection.{{p}}", "text_projection.{p}")
        if config["text_bias"]
        else Rule(f"{text}text_projection", "text_projection.weight", rearrange="a b -> b a")
    )
    rules = (
        *tower,
        Rule(f"{text}token_embedding.weight", "text.embedding.weight"),
        Rule(f"{text}positional_embedding", "text.positions"),
        *_blocks(f"{text}transformer", "text"),
        Rule(f"{text}ln_final.{{p}}", "text.norm.{p}"),
        projection,
        Rule("logit_scale", "log_scale", rearrange=one),
        Rule("logit_bias", "bias", rearrange=one),
    )
    if not prefix:
        return rules
    return tuple(
        Rule(
            tuple(prefix + source for source in rule.sources)
            if len(rule.sources) > 1
            else prefix + rule.sources[0],
            rule.target,
            rule.rearrange,
        )
        for rule in rules
    )


def _foreign(values: dict[str, Any], entries: Mapping[str, Entry]) -> Foreign:
    """With the table that fits what names the file has."""
    prefix = prefix_of(entries)
    text = "text." if f"{prefix}text.token_embedding.weight" in entries else ""
    scale = entries.get(f"{prefix}logit_scale")
    scalar = scale is None or scale.shape == ()
    ignore = tuple(prefix + name for name in IGNORE)
    rules = table(values, text=text, scalar=scalar, prefix=prefix)
    return Foreign(system="clip", values=values, table=rules, ignore=ignore)


# ---------------------------------------------------------------- in


def prefix_of(entries: Mapping[str, Entry]) -> str:
    """What wrappers put before every name: "module.", "_orig_mod.", "model."."""
    found = [name.removesuffix("logit_scale") for name in entries if name.endswith("logit_scale")]
    return found[0] if len(found) == 1 and all(name.startswith(found[0]) for name in entries) else ""


def is_theirs(entries: Mapping[str, Entry]) -> bool:
    """Whether a file has open_clip's names."""
    prefix = prefix_of(entries)
    return f"{prefix}logit_scale" in entries and any(name.startswith(f"{prefix}visual.") for name in entries)


def read_alone(entries: Mapping[str, Entry], values: dict[str, Any] | None, *, what: str) -> Foreign:
    """A checkpoint without a config beside it; `values` is our config as plain data, which OpenAI's own need not."""
    openais = all(name in entries for name in OPENAI)
    if values is not None:
        activations = {tower.get("activation", "quick_gelu") for tower in (values["image"], values["text"])}
        if openais and activations != {"quick_gelu"}:
            raise ModelFileError(
                f"{what} is OpenAI's own and was trained with QuickGELU, which config= contradicts: leave it out."
            )
        return _foreign(values, entries)
    if not openais:
        raise ModelFileError(
            f"{what} has open_clip's names but does not say what it is (GELU or QuickGELU, how many heads): load it"
            " with config=, such as reverie.load(FILE, config='ViT-B-32'), or from a folder with "
            + CONFIG
            + "."
        )
    return _foreign(_openai(entries, what), entries)


def _openai(entries: Mapping[str, Entry], what: str) -> dict[str, Any]:
    """The config of one of OpenAI's own models by its shapes, as its `build_model` reads them."""

    def shape(name: str, length: int) -> tuple[int, ...]:
        found = entries[name].shape if name in entries else ()
        if len(found) != length or not all(found):
            raise ModelFileError(f"{what} lacks {name}, or its shape {list(found)} is none of CLIP's.")
        return found

    def count(pattern: str) -> int:
        return len({found[1] for name in entries if (found := re.match(pattern, name))})

    (text_width,), (vocab, _) = shape("ln_final.weight", 1), shape("token_embedding.weight", 2)
    length, width = shape("positional_embedding", 2)[0], shape("text_projection", 2)[1]
    values: dict[str, Any] = {
        "text": {
            "vocab": vocab,
            "length": length,
            "width": text_width,
            "depth": count(r"transformer\.resblocks\.(\d+)\."),
            "heads": max(text_width // HEAD, 1),
            "pool": "argmax",
            "end": vocab - 1,
        },
        "width": width,
    }
    if "visual.proj" in entries:
        inside, _, patch, _ = shape("visual.conv1.weight", 4)
        values["image"] = {
            "kind": "vit",
            "size": patch * math.isqrt(shape("visual.positional_embedding", 2)[0] - 1),
            "patch": patch,
            "width": inside,
            "depth": count(r"visual\.transformer\.resblocks\.(\d+)\."),
            "heads": max(inside // HEAD, 1),
            "pool": "class",
        }
    else:
        inside = shape("visual.layer1.0.conv1.weight", 4)[0]
        values["image"] = {
            "kind": "resnet",
            "size": 32 * math.isqrt(shape("visual.attnpool.positional_embedding", 2)[0] - 1),
            "width": inside,
            "depths": [count(rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
            "heads": max(32 * inside // HEAD, 1),
            "out": width,
        }
        values["image_projection"] = False
    return values | {"text_bias": False, "fit": "crop_even"}


def read(records: Mapping[str, Any], entries: Mapping[str, Entry]) -> Foreign:
    """From the JSON files of a folder by name, and the header of its weights. Absent keys have open_clip's defaults."""
    record = Fields(records[CONFIG], where=CONFIG)
    model = record.part("model_cfg") if "model_cfg" in record.record else record
    vision, text = model.part("vision_cfg"), model.part("text_cfg")
    for part, known in ((model, MODEL_KEYS), (vision, VISION_KEYS), (text, TEXT_KEYS)):
        part.only(known)
    quick = model.flag("quick_gelu")
    text.unlike({
        "hf_model_name": (None, ""), "ls_init_value": (None,), "embed_cls": (False,), "proj_type": ("linear",),
        "qk_norm": (False,), "scaled_cosine_attn": (False,), "scale_heads": (False,), "scale_attn_inner": (False,),
        "scale_attn": (False,), "scale_fc": (False,), "block_type": (None, "default"),
    })  # fmt: skip
    width = text.integer("width", 512)
    causal = not text.flag("no_causal_mask")
    vocab = text.integer("vocab_size", 49_408)
    pool = text.choice("pool_type", "argmax", {"argmax": "argmax", "eos": "end", "last": "last"})
    if not text.record.get("hf_tokenizer_name"):
        text.unlike({"tokenizer_kwargs": (None, {}, {"clean": "lower"})})
    words = {
        "vocab": vocab,
        "length": text.integer("context_length", 77),
        "width": width,
        "depth": text.integer("layers", 12),
        "heads": text.integer("heads", 8),
        "hidden": inside(int(width * text.number("mlp_ratio", 4.0)), width),
        "causal": causal,
        "pool": pool,
        "end": text.integer("eos_id", 2) if pool == "end" else vocab - 1,
        "activation": _activation(text, quick),
        "eps": _eps(text),
    }
    values: dict[str, Any] = {
        "text": words,
        "width": model.integer("embed_dim", 512),
        "text_bias": text.flag("proj_bias"),
        "loss": "softmax" if model.record.get("init_logit_bias") is None else "sigmoid",
    }
    if "timm_model_name" in vision.record:
        values |= {"image": _timm(vision), "image_projection": False}
    elif isinstance(vision.record.get("layers"), list):
        channels = vision.integer("width", 64)
        heads = channels * 32 // vision.integer("head_width", HEAD)
        size = vision.integer("image_size", 224)
        values["image"] = {
            "kind": "resnet", "size": size, "width": channels, "depths": vision.record["layers"], "heads": heads,
            "out": values["width"],
        }  # fmt: skip
        values["image_projection"] = False
    else:
        values["image"] = _vit(vision, quick)
    seen = record.part("preprocess_cfg")
    seen.unlike({"mode": ("RGB",)})
    side = values["image"]["size"]
    if seen.record.get("size", side) not in (side, [side, side], [3, side, side]):
        raise ModelFileError(
            f"{seen.where} gives size {shorten(seen.record['size'])}, but the tower reads {side}."
        )
    values |= {
        "mean": seen.colour("mean", CLIP_COLOURS[0]),
        "std": seen.colour("std", CLIP_COLOURS[1]),
        "fit": seen.choice("resize_mode", "shortest", {"shortest": "crop_even", "squash": "squash"}),
        "resample": seen.choice(
            "interpolation", "bicubic", {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
        ),
    }
    return replace(_foreign(values, entries), own_words=bool(text.record.get("hf_tokenizer_name")))


def _vit(vision: Fields, quick: bool) -> dict[str, Any]:
    vision.unlike({
        "pool_type": ("tok",), "attentional_pool": (False,), "ls_init_value": (None,),
        "pos_embed_type": ("learnable", "sin_cos_2d"), "qk_norm": (False,), "scaled_cosine_attn": (False,),
        "scale_heads": (False,), "scale_attn_inner": (False,), "scale_attn": (False,), "scale_fc": (False,),
        "block_type": (None, "default"),
    })  # fmt: skip
    width = vision.integer("width", 768)
    return {
        "kind": "vit",
        "size": vision.integer("image_size", 224),
        "patch": vision.integer("patch_size", 16),
        "width": width,
        "depth": vision.integer("layers", 12),
        "heads": width // vision.integer("head_width", HEAD),
        "hidden": inside(int(width * vision.number("mlp_ratio", 4.0)), width),
        "norm_pre": not vision.flag("no_ln_pre"),
        "pool": "class",
        "activation": _activation(vision, quick),
        "eps": _eps(vision),
    }


def _timm(vision: Fields) -> dict[str, Any]:
    name = vision.record["timm_model_name"]
    if not isinstance(name, str) or name not in TIMM:
        raise ModelFileError(
            f"{vision.where} names timm's {shorten(name)}; of timm's towers Reverie knows SigLIP's"
            " (vit_base_patch16_siglip_224 and its kin)."
        )
    vision.unlike({"timm_pool": ("map",), "timm_proj": ("none", "")})
    size, patch, side, activation = TIMM[name]
    return _siglip(size, patch, vision.integer("image_size", side), activation)


def _siglip(size: str, patch: int, side: int, activation: str) -> dict[str, Any]:
    width, depth, heads, hidden = TIMM_SHAPES[size]
    return {
        "kind": "vit", "size": side, "patch": patch, "width": width, "depth": depth, "heads": heads,
        "hidden": inside(hidden, width),
        "activation": activation, "stem": "patch", "stem_bias": True, "norm_pre": False, "registers": 0,
        "pool": "attention", "eps": 1e-6,
    }  # fmt: skip


def _activation(tower: Fields, quick: bool) -> str:
    given = tower.record.get("act_kwargs") or {}
    if given not in ({}, {"approximate": "tanh"}, {"approximate": "none"}) or (given and quick):
        raise ModelFileError(f"{tower.where} gives act_kwargs {shorten(given)}; known is approximate: tanh.")
    return "quick_gelu" if quick else "gelu_tanh" if given.get("approximate") == "tanh" else "gelu"


def _eps(tower: Fields) -> float:
    given = Fields(tower.record.get("norm_kwargs") or {}, where=f"norm_kwargs of {tower.where}")
    given.unlike({key: () for key in given.record if key != "eps"})
    return given.number("eps", 1e-5)


# ---------------------------------------------------------------- out


def write(config: Mapping[str, Any], *, own_words: bool) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """Their JSON file by name and our table, from our config as plain data.

    `own_words`: the tokenizer is not CLIP's own, so it is written beside and they are told to read it. InputError:
    they have no such model.
    """
    image, text = config["image"], config["text"]
    quick = text["activation"] == "quick_gelu"
    resnet = image["kind"] == "resnet"
    timm = not resnet and image["pool"] == "attention"
    words: dict[str, Any] = {
        "context_length": text["length"],
        "vocab_size": text["vocab"],
        "width": text["width"],
        "heads": text["heads"],
        "layers": text["depth"],
        "pool_type": {"argmax": "argmax", "end": "eos", "last": "last"}[text["pool"]],
        **_written(text, quick),
    }
    if text["pool"] == "end":
        words["eos_id"] = text["end"]
    if not text["causal"]:
        words["no_causal_mask"] = True
    if config["text_bias"]:
        words["proj_bias"] = True
    if own_words:
        words["hf_tokenizer_name"] = "."  # from a folder they read the tokenizer that lies in it
    model: dict[str, Any] = {"embed_dim": config["width"]}
    if quick:
        model["quick_gelu"] = True
    if config["loss"] == "sigmoid":
        model["init_logit_bias"] = -10
    if resnet:
        model["vision_cfg"] = {
            "image_size": image["size"],
            "layers": list(image["depths"]),
            "width": image["width"],
            "head_width": image["width"] * 32 // image["heads"],
            "patch_size": None,
        }
    elif timm:
        model |= {"custom_text": True, "vision_cfg": _timm_name(image, config["image_projection"])}
    else:
        must = {"stem": "patch", "stem_bias": False, "registers": 0, "pool": "class"}
        for key, wanted in must.items():
            if image[key] != wanted:
                raise _none(f"image tower with {key} {image[key]!r}, only {wanted!r}")
        if not config["image_projection"]:
            raise _none("vision transformer without a projection")
        if (image["activation"] == "quick_gelu") != quick:
            raise _none("QuickGELU in one tower alone")
        model["vision_cfg"] = {
            "image_size": image["size"],
            "patch_size": image["patch"],
            "width": image["width"],
            "layers": image["depth"],
            "head_width": image["width"] // image["heads"],
            **({} if image["norm_pre"] else {"no_ln_pre": True}),
            **_written(image, quick),
        }
    model["text_cfg"] = words
    seen = {
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["resample"],
        "resize_mode": {"crop": "shortest", "crop_even": "shortest", "squash": "squash"}[config["fit"]],
    }
    rules = table(config, text="text." if timm else "")
    return {CONFIG: {"model_cfg": model, "preprocess_cfg": seen}}, rules


def _written(tower: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    hidden = tower["hidden"] or 4 * tower["width"]
    said: dict[str, Any] = {"mlp_ratio": ratio(hidden, tower["width"])}
    if tower["activation"] == "gelu_tanh":
        if quick:
            raise _none("QuickGELU in one tower alone")
        said["act_kwargs"] = {"approximate": "tanh"}
    if tower["eps"] != 1e-5:
        said["norm_kwargs"] = {"eps": tower["eps"]}
    return said


def _timm_name(image: Mapping[str, Any], projected: bool) -> dict[str, Any]:
    full = {**image, "hidden": inside(image["hidden"] or 4 * image["width"], image["width"])}
    names = [name for name, tower in TIMM.items() if full == _siglip(*tower)]
    if not names or projected:
        raise _none(
            "an image tower with attention pooling but timm's of SigLIP, of their sizes and activation"
        )
    return {
        "image_size": image["size"],
        "timm_model_name": names[0],
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }


def _none(what: str) -> InputError:
    return InputError(f"open_clip has no {what}; save this model in Reverie's own format.")
