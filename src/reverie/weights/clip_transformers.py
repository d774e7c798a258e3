"""CLIP and SigLIP <-> the folders of transformers' `CLIPModel` and `SiglipModel`: weights, config, preprocessing.

Their names -> ours; `remap.invert` of a table is the way back. What they have no words for (a convolutional stem,
registers, a ResNet, other poolings) is refused on the way out; of open_clip's rule for crops, "crop_even", theirs is
the nearest, a pixel apart where a picture's long side is over by an odd number.
https://github.com/huggingface/transformers/blob/main/src/transformers/models/clip/modeling_clip.py
https://github.com/huggingface/transformers/blob/main/src/transformers/models/siglip/modeling_siglip.py
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from reverie.errors import InputError
from reverie.weights.files import ModelFileError, shorten
from reverie.weights.layout import CLIP_COLOURS, HALVES, Fields, Foreign, inside
from reverie.weights.remap import Rule

CONFIG = "config.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
RECORDS = (CONFIG, PREPROCESSOR, PROCESSOR)


def _blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    theirs, ours = f"{theirs}.encoder.layers.{{i}}", f"{ours}.blocks.{{i}}"
    qkv = tuple(f"{theirs}.self_attn.{name}_proj.{{p}}" for name in "qkv")
    return (
        Rule(f"{theirs}.layer_norm1.{{p}}", f"{ours}.norm1.{{p}}"),
        Rule(qkv, f"{ours}.attention.qkv.{{p}}"),
        Rule(f"{theirs}.self_attn.out_proj.{{p}}", f"{ours}.attention.out.{{p}}"),
        Rule(f"{theirs}.layer_norm2.{{p}}", f"{ours}.norm2.{{p}}"),
        Rule(f"{theirs}.mlp.fc1.{{p}}", f"{ours}.mlp.up.{{p}}"),
        Rule(f"{theirs}.mlp.fc2.{{p}}", f"{ours}.mlp.down.{{p}}"),
    )


BOTH = (
    Rule("vision_model.embeddings.patch_embedding.{p}", "image.stem.{p}"),
    Rule("vision_model.embeddings.position_embedding.weight", "image.positions"),
    *_blocks("vision_model", "image"),
    Rule("vision_model.post_layernorm.{p}", "image.norm_post.{p}"),
    Rule("text_model.embeddings.token_embedding.weight", "text.embedding.weight"),
    Rule("text_model.embeddings.position_embedding.weight", "text.positions"),
    *_blocks("text_model", "text"),
    Rule("text_model.final_layer_norm.{p}", "text.norm.{p}"),
)
CLIP = (
    *BOTH,
    Rule("vision_model.embeddings.class_embedding", "image.class_token"),
    Rule("vision_model.pre_layrnorm.{p}", "image.norm_pre.{p}"),  # their spelling
    Rule("visual_projection.weight", "image_projection.weight"),
    Rule("text_projection.weight", "text_projection.weight"),
    Rule("logit_scale", "log_scale", rearrange=" -> 1"),
)
HEAD = "vision_model.head"
SIGLIP = (
    *BOTH,
    Rule(f"{HEAD}.probe", "image.pooling.query", rearrange="1 1 d -> d"),
    Rule(f"{HEAD}.attention.in_proj_{{p}}", tuple(f"image.pooling.attention.{part}.{{p}}" for part in "qkv")),
    Rule(f"{HEAD}.attention.out_proj.{{p}}", "image.pooling.attention.out.{p}"),
    Rule(f"{HEAD}.layernorm.{{p}}", "image.pooling.norm.{p}"),
    Rule(f"{HEAD}.mlp.fc1.{{p}}", "image.pooling.mlp.up.{p}"),
    Rule(f"{HEAD}.mlp.fc2.{{p}}", "image.pooling.mlp.down.{p}"),
    Rule("text_model.head.{p}", "text_projection.{p}"),
    Rule("logit_scale", "log_scale"),
    Rule("logit_bias", "bias"),
)
# Buffers that count 0, 1, 2, ..., which versions before 4.31 stored.
IGNORE = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
KINDS = ("clip", "siglip", "blip")  # whose processors' defaults are known
RESAMPLES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read(records: Mapping[str, Any]) -> Foreign:
    """From the JSON files of a folder by name.

    Absent keys have transformers' defaults; keys that change nothing here (dropout, initialisation) are not read.
    """
    whole = Fields(records[CONFIG], where=CONFIG)
    kind = whole.choice("model_type", None, {"clip": "clip", "siglip": "siglip"})
    text, vision = _tower(whole, "text"), _tower(whole, "vision")
    vision.unlike({"num_channels": (3,), "vision_use_head": (True,)})
    image: dict[str, Any] = {
        "kind": "vit",
        "size": vision.integer("image_size", 224),
        "patch": vision.integer("patch_size", 32 if kind == "clip" else 16),
        "width": vision.integer("hidden_size", 768),
        "depth": vision.integer("num_hidden_layers", 12),
        "heads": vision.integer("num_attention_heads", 12),
        "hidden": vision.integer("intermediate_size", 3072),
    }
    words: dict[str, Any] = {
        "vocab": text.integer("vocab_size", 49_408 if kind == "clip" else 32_000),
        "length": text.integer("max_position_embeddings", 77 if kind == "clip" else 64),
        "width": text.integer("hidden_size", 512 if kind == "clip" else 768),
        "depth": text.integer("num_hidden_layers", 12),
        "heads": text.integer("num_attention_heads", 8 if kind == "clip" else 12),
        "hidden": text.integer("intermediate_size", 2048 if kind == "clip" else 3072),
    }
    act, eps = ("quick_gelu", 1e-5) if kind == "clip" else ("gelu_pytorch_tanh", 1e-6)
    for tower, values in ((vision, image), (text, words)):
        values["activation"] = tower.choice("hidden_act", act, ACTIVATIONS)
        values["eps"] = tower.number("layer_norm_eps", eps)
        values["hidden"] = inside(values["hidden"], values["width"])
    values = {"image": image, "text": words}
    if kind == "clip":
        end = text.integer("eos_token_id", 49_407)
        # OpenAI's own files say 2 and mean the highest id (transformers' pull request 24773).
        words |= {"pool": "argmax", "end": words["vocab"] - 1} if end == 2 else {"pool": "end", "end": end}
        values["width"] = whole.integer("projection_dim", 512)
    else:
        image |= {"stem_bias": True, "norm_pre": False, "pool": "attention"}
        words |= {"causal": False, "pool": "last"}
        width = text.record.get("projection_size")
        values |= {"width": words["width"] if width is None else text.integer("projection_size", 1)}
        values |= {"image_projection": False, "text_bias": True, "loss": "sigmoid"}
    values |= preparation(records, kind, image["size"])
    return Foreign(system="clip", values=values, table=CLIP if kind == "clip" else SIGLIP, ignore=IGNORE)


def write(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """Their JSON files by name and our table, from our config as plain data. InputError: they have no such model."""
    image, text = config["image"], config["text"]
    kind = "siglip" if config["loss"] == "sigmoid" else "clip"
    siglip = kind == "siglip"
    must: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "the image tower": (image["kind"], ("vit",)),
        "the stem": (image.get("stem"), ("patch",)),
        "stem_bias": (image.get("stem_bias"), (siglip,)),
        "norm_pre": (image.get("norm_pre"), (not siglip,)),
        "registers": (image.get("registers"), (0,)),
        "the pooling of images": (image.get("pool"), ("attention",) if siglip else ("class",)),
        "the causal mask of texts": (text["causal"], (not siglip,)),
        "the pooling of texts": (text["pool"], ("last",) if siglip else ("end", "argmax")),
        "image_projection": (config["image_projection"], (not siglip,)),
        "text_bias": (config["text_bias"], (siglip,)),
    }
    for what, (has, allowed) in must.items():
        if has not in allowed:
            raise InputError(
                f"transformers' {'SiglipModel' if siglip else 'CLIPModel'} cannot have {what} {has!r}, only"
                f" {' or '.join(map(repr, allowed))}; save this model in Reverie's own format."
            )
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}

    def tower(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "hidden_size": values["width"],
            "intermediate_size": values["hidden"] or 4 * values["width"],
            "num_hidden_layers": values["depth"],
            "num_attention_heads": values["heads"],
            "hidden_act": theirs[values["activation"]],
            "layer_norm_eps": values["eps"],
        }

    words = {
        "model_type": f"{kind}_text_model",
        "vocab_size": text["vocab"],
        "max_position_embeddings": text["length"],
        **tower(text),
    }
    looks = {
        "model_type": f"{kind}_vision_model",
        "image_size": image["size"],
        "patch_size": image["patch"],
        **tower(image),
    }
    whole: dict[str, Any] = {"architectures": [f"{'Siglip' if siglip else 'CLIP'}Model"], "model_type": kind}
    if siglip:
        words["projection_size"] = config["width"]
    else:
        end = text["end"] if text["pool"] == "end" else 2
        words |= {"bos_token_id": max(end - 1, 0), "eos_token_id": end, "pad_token_id": 0}
        words["projection_dim"] = looks["projection_dim"] = whole["projection_dim"] = config["width"]
    records: dict[str, Any] = {
        CONFIG: whole | {"text_config": words, "vision_config": looks},
        PREPROCESSOR: _processor(config, kind),
    }
    return records, SIGLIP if siglip else CLIP


def _processor(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    size = config["image"]["size"]
    square = {"height": size, "width": size}
    crop = config["fit"] != "squash"
    return {
        "image_processor_type": "CLIPImageProcessor" if crop or kind == "clip" else "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if crop else square,
        "resample": {ours: theirs for theirs, ours in RESAMPLES.items()}[config["resample"]],
        "do_center_crop": crop,
        **({"crop_size": square} if crop else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config["mean"]),
        "image_std": list(config["std"]),
    }


def preparation(records: Mapping[str, Any], kind: str, side: int) -> dict[str, Any]:
    """How pictures are prepared for a "clip", "siglip" or "blip" that reads `side x side`: mean, std, fit, resample."""
    found = Fields({}, where="the absent " + PREPROCESSOR)
    inner = records.get(PROCESSOR)
    if (
        isinstance(inner, dict) and "image_processor" in inner
    ):  # the newer place, which transformers reads first
        found = Fields(inner["image_processor"], where=f"image_processor of {PROCESSOR}")
    elif PREPROCESSOR in records:
        found = Fields(records[PREPROCESSOR], where=PREPROCESSOR)
    else:
        warnings.warn(
            f"the folder has no {PREPROCESSOR}: pictures are prepared with the mean, std and resizing of"
            f" transformers' own {kind} processor, which these weights may not have been trained with",
            stacklevel=2,
        )
    named = str(
        found.record.get("image_processor_type", found.record.get("feature_extractor_type", kind))
    ).lower()
    complete = {"image_mean", "image_std", "size", "resample"} <= found.record.keys()
    if not named.startswith(KINDS) and not complete:
        raise ModelFileError(
            f"{found.where} names {shorten(named)}, whose defaults Reverie does not know, without giving image_mean,"
            " image_std, size and resample; add them."
        )
    kind = next((known for known in KINDS if named.startswith(known)), "clip")
    mean, std = HALVES if kind == "siglip" else CLIP_COLOURS
    found.unlike({"do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,)})
    if abs(255 * found.number("rescale_factor", 1 / 255) - 1) > 1e-3:
        raise ModelFileError(
            f"{found.where} gives a rescale_factor other than 1/255, which no model of Reverie has."
        )
    crop = found.flag("do_center_crop", kind == "clip")
    size = found.record.get(
        "size", {"shortest_edge": side} if kind == "clip" else {"height": side, "width": side}
    )
    square = {"height": side, "width": side}
    # Folders of before 2022 write one number: the short edge if it is cropped afterwards, else both.
    if size == side:
        size = {"shortest_edge": side} if crop else square
    cut = found.record.get("crop_size", side)
    if crop and size == {"shortest_edge": side} and cut in (side, square):
        fit = "crop"
    elif size == square and (not crop or cut in (side, square)):
        fit = "squash"
    else:
        raise ModelFileError(
            f"{found.where} resizes to {size} and crops to {cut if crop else 'nothing'}, but the image tower reads"
            f" {side} x {side}; Reverie can resize the short edge to {side} and crop, or both edges to {side}."
        )
    return {
        "mean": found.colour("image_mean", mean),
        "std": found.colour("image_std", std),
        "fit": fit,
        "resample": found.choice("resample", 3, RESAMPLES),
    }


def _tower(whole: Fields, name: str) -> Fields:
    """A tower's config; the older of its two places (`..._config_dict`) wins."""
    parts = [whole.record.get(f"{name}_config"), whole.record.get(f"{name}_config_dict")]
    merged: dict[str, Any] = {}
    for part in parts:
        if part is not None:
            merged |= Fields(part, where=f"{name}_config of {CONFIG}").record
    return Fields(merged, where=f"{name}_config of {CONFIG}")
