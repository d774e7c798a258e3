"""CLIP <-> the folder of transformers' `CLIPModel`: weights, config, preprocessing.

Their names -> ours; `remap.invert(TABLE)` is the way back. Reverie's convolutional stem and mean pooling have no
counterpart there and are refused on the way out.
https://github.com/huggingface/transformers/blob/main/src/transformers/models/clip/modeling_clip.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from reverie.errors import InputError
from reverie.weights.files import ModelFileError, shorten
from reverie.weights.remap import Rule

PREPROCESSOR = "preprocessor_config.json"
TOKENIZER = "tokenizer_config.json"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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


TABLE = (
    Rule("vision_model.embeddings.class_embedding", "image.class_token"),
    Rule("vision_model.embeddings.patch_embedding.weight", "image.stem.weight"),
    Rule("vision_model.embeddings.position_embedding.weight", "image.positions"),
    Rule("vision_model.pre_layrnorm.{p}", "image.norm_pre.{p}"),  # their spelling
    *_blocks("vision_model", "image"),
    Rule("vision_model.post_layernorm.{p}", "image.norm_post.{p}"),
    Rule("visual_projection.weight", "image_projection.weight"),
    Rule("text_model.embeddings.token_embedding.weight", "text.embedding.weight"),
    Rule("text_model.embeddings.position_embedding.weight", "text.positions"),
    *_blocks("text_model", "text"),
    Rule("text_model.final_layer_norm.{p}", "text.norm.{p}"),
    Rule("text_projection.weight", "text_projection.weight"),
    Rule("logit_scale", "log_scale", rearrange=" -> 1"),
)
# Buffers that count 0, 1, 2, ..., which versions before 4.31 stored.
IGNORE = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def import_config(records: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The system's name and its config as plain data, from the JSON files of their folder by name.

    Absent keys have transformers' defaults; keys that change nothing here (dropout, initialisation) are not read.
    """
    record = records["config.json"]
    text, vision = _tower(record, "text"), _tower(record, "vision")
    width, vocab = _integer(text, "hidden_size", 512), _integer(text, "vocab_size", 49_408)
    hidden = _integer(text, "intermediate_size", 2048)
    if hidden != 4 * width:
        raise ModelFileError(
            f"config.json gives the text tower an MLP of {hidden}; Reverie's has 4 x {width}."
        )
    if _integer(vision, "num_channels", 3) != 3:
        raise ModelFileError(
            f"config.json asks for {vision['num_channels']} channels; Reverie's CLIP reads 3."
        )
    end = _integer(text, "eos_token_id", 49_407)
    return "clip", {
        "image": {
            "size": _integer(vision, "image_size", 224),
            "patch": _integer(vision, "patch_size", 32),
            "width": _integer(vision, "hidden_size", 768),
            "depth": _integer(vision, "num_hidden_layers", 12),
            "heads": _integer(vision, "num_attention_heads", 12),
            "ratio": _ratio(
                _integer(vision, "intermediate_size", 3072), _integer(vision, "hidden_size", 768)
            ),
            "activation": _activation(vision),
            "eps": vision.get("layer_norm_eps", 1e-5),
        },
        "text": {
            "vocab": vocab,
            "length": _integer(text, "max_position_embeddings", 77),
            "width": width,
            "depth": _integer(text, "num_hidden_layers", 12),
            "heads": _integer(text, "num_attention_heads", 8),
            "activation": _activation(text),
            # OpenAI's own files say 2 and mean the highest id (transformers' pull request 24773).
            "end": vocab - 1 if end == 2 else end,
            "eps": text.get("layer_norm_eps", 1e-5),
        },
        "width": _integer(record, "projection_dim", 512),
        "mean": _colour(records, "image_mean", MEAN),
        "std": _colour(records, "image_std", STD),
    }


def export_config(config: Mapping[str, Any], *, special: tuple[str, str] | None) -> dict[str, Any]:
    """Their JSON files by name, from our config as plain data; `special` are the tokenizer's start and end token."""
    image, text = config["image"], config["text"]
    if image["stem"] != "patch" or image["pool"] != "class":
        raise InputError(
            f"transformers' CLIPModel has no image tower with the stem {image['stem']!r} and the pooling"
            f" {image['pool']!r}, only 'patch' and 'class'; save this model in Reverie's own layout."
        )
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    records: dict[str, Any] = {
        "config.json": {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config["width"],
            "text_config": {
                "model_type": "clip_text_model",
                "vocab_size": text["vocab"],
                "max_position_embeddings": text["length"],
                "hidden_size": text["width"],
                "intermediate_size": 4 * text["width"],
                "num_hidden_layers": text["depth"],
                "num_attention_heads": text["heads"],
                "hidden_act": theirs[text["activation"]],
                "layer_norm_eps": text["eps"],
                "bos_token_id": text["end"] - 1,
                "eos_token_id": text["end"],
                "pad_token_id": 0,
                "projection_dim": config["width"],
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "image_size": image["size"],
                "patch_size": image["patch"],
                "hidden_size": image["width"],
                "intermediate_size": int(image["width"] * image["ratio"]),
                "num_hidden_layers": image["depth"],
                "num_attention_heads": image["heads"],
                "hidden_act": theirs[image["activation"]],
                "layer_norm_eps": image["eps"],
                "projection_dim": config["width"],
            },
        },
        PREPROCESSOR: {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": image["size"]},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": image["size"], "width": image["size"]},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(config["mean"]),
            "image_std": list(config["std"]),
        },
    }
    if special is not None:
        start, end = special
        records[TOKENIZER] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": text["length"],
            "bos_token": start,
            "eos_token": end,
            "pad_token": end,
        }
    return records


def _tower(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    parts = [record.get(f"{name}_config"), record.get(f"{name}_config_dict")]  # the second is older and wins
    for part in parts:
        if part is not None and not isinstance(part, dict):
            raise ModelFileError(
                f"config.json gives the {name} tower as {shorten(part)}; it must be an object."
            )
    return {**(parts[0] or {}), **(parts[1] or {})}


def _integer(record: Mapping[str, Any], key: str, default: int) -> int:
    value = record.get(key, default)
    if type(value) is not int or not 0 < value < 2**24:
        raise ModelFileError(
            f"config.json gives {key} as {shorten(value)}; Reverie reads one whole number above 0."
        )
    return value


def _ratio(hidden: int, width: int) -> float:
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _activation(tower: Mapping[str, Any]) -> str:
    name = tower.get("hidden_act", "quick_gelu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ModelFileError(
            f"config.json gives hidden_act {shorten(name)}; known are {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def _colour(records: Mapping[str, Any], key: str, default: tuple[float, ...]) -> Any:
    record = records.get(PREPROCESSOR, {})
    return record.get(key, list(default)) if isinstance(record, dict) else list(default)
