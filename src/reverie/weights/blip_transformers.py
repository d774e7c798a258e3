"""BLIP <-> the folders of transformers: BlipForConditionalGeneration (captions), BlipForImageTextRetrieval and
BlipForQuestionAnswering: weights, config, preprocessing.

Their config has no ids of [CLS] and [ENC], and no temperature. [ENC] is the token after [DEC], as in all public files;
what is written here says so under keys of its own (`cls_token_id`, `enc_token_id`, `temp`), which transformers keeps.
Their retrieval model reads [CLS] where it should be given [ENC], the token that the weights were trained with: `match`
gives [ENC]. https://github.com/huggingface/transformers/blob/main/src/transformers/models/blip/modeling_blip.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from reverie.errors import InputError
from reverie.weights.blip_original import DECODER, ENCODER, SYSTEMS, WORDS, task, text_table
from reverie.weights.clip_transformers import (
    ACTIVATIONS,
    CONFIG,
    PREPROCESSOR,
    RESAMPLES,
    preparation,
)
from reverie.weights.files import ModelFileError
from reverie.weights.layout import Fields, Foreign, inside
from reverie.weights.remap import Rule

KIND = "blip"
CLASSES = {
    "captions": "BlipForConditionalGeneration",
    "retrieval": "BlipForImageTextRetrieval",
    "answers": "BlipForQuestionAnswering",
}
TOWER = (
    Rule("vision_model.embeddings.class_embedding", "image.class_token", rearrange="1 1 d -> d"),
    Rule("vision_model.embeddings.position_embedding", "image.positions", rearrange="1 n d -> n d"),
    Rule("vision_model.embeddings.patch_embedding.{p}", "image.stem.{p}"),
    *(
        Rule(f"vision_model.encoder.layers.{{i}}.{theirs}.{{p}}", f"image.blocks.{{i}}.{ours}.{{p}}")
        for theirs, ours in (
            ("layer_norm1", "norm1"),
            ("self_attn.qkv", "attention.qkv"),
            ("self_attn.projection", "attention.out"),
            ("layer_norm2", "norm2"),
            ("mlp.fc1", "mlp.up"),
            ("mlp.fc2", "mlp.down"),
        )
    ),
    Rule("vision_model.post_layernorm.{p}", "image.norm_post.{p}"),
)
# Buffers that count 0, 1, 2, ..., which older versions stored.
COUNTED = tuple(f"{name}.embeddings.position_ids" for name in (ENCODER, DECODER))


def _table(entries: Collection[str], kind: str, temperature: float) -> tuple[Rule, ...]:
    table = (*TOWER, *text_table(entries, kind))
    if kind != "retrieval":
        return table
    return (*table, Rule((), "temperature", value=lambda: torch.tensor([temperature])))


def read(records: Mapping[str, Any], entries: Collection[str]) -> Foreign:
    """From the JSON files of a folder by name, and the names of its weights. Absent keys have their defaults."""
    whole = Fields(records[CONFIG], where=CONFIG)
    kind = task(entries)
    if kind not in CLASSES:
        raise ModelFileError(
            f"the weights are of no BLIP that Reverie reads; known are {', '.join(CLASSES.values())}."
        )
    text, vision = whole.part("text_config"), whole.part("vision_config")
    image: dict[str, Any] = {
        "size": vision.integer("image_size", 384),
        "patch": vision.integer("patch_size", 16),
        "width": vision.integer("hidden_size", 768),
        "depth": vision.integer("num_hidden_layers", 12),
        "heads": vision.integer("num_attention_heads", 12),
        "activation": vision.choice("hidden_act", "gelu", ACTIVATIONS),
        "eps": vision.number("layer_norm_eps", 1e-5),
        "stem_bias": True,
        "norm_pre": False,
    }
    image["hidden"] = inside(vision.integer("intermediate_size", 3072), image["width"])
    vocab = text.integer("vocab_size", 30_524)
    decode = _id(text, "bos_token_id", 30_522, vocab)
    words: dict[str, Any] = {
        "vocab": vocab,
        "length": text.integer("max_position_embeddings", 512),
        "width": text.integer("hidden_size", 768),
        "depth": text.integer("num_hidden_layers", 12),
        "heads": text.integer("num_attention_heads", 8),
        "hidden": text.integer("intermediate_size", 3072),
        "context_width": image["width"],
        "activation": text.choice("hidden_act", "gelu", ACTIVATIONS),
        "eps": text.number("layer_norm_eps", 1e-12),
        "pad": _id(text, "pad_token_id", 0, vocab),
        "start": _id(text, "cls_token_id", min(101, vocab - 1), vocab),
        "end": _id(text, "sep_token_id", 102, vocab),
        "decode": decode,
        "ground": _id(text, "enc_token_id", min(decode + 1, vocab - 1), vocab),
        "understands": kind != "captions",
        "writes": kind == "captions",
    }
    values: dict[str, Any] = {"image": image, "text": words}
    if kind == "answers":
        values["answer"] = words | {"understands": False, "writes": True, "context_width": words["width"]}
        values["smoothing"] = whole.number("smoothing", 0.1)
    if kind == "retrieval":
        values["width"] = whole.integer("image_text_hidden_size", 256)
    if kind == "captions" and isinstance(prompt := whole.record.get("prompt", ""), str):
        values["prompt"] = prompt
    values |= preparation(records, KIND, image["size"])
    temperature = whole.number("temp", 0.07)
    table = _table(entries, kind, temperature)
    return Foreign(system=SYSTEMS.get(kind, "blip"), values=values, table=table, ignore=COUNTED)


def write(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """Their JSON files by name and our table, from our config as plain data. InputError: they have no such model."""
    image, text = config["image"], config["text"]
    kind = {("blip", False): "captions", ("blip", True): "retrieval", ("blip-vqa", True): "answers"}.get(
        (name, text["understands"])
    )
    answer = config.get("answer", text)
    alike = {"understands", "writes", "context_width", "dropout"}
    must: dict[str, tuple[Any, Any]] = {
        "one network that understands and writes": (kind == "retrieval" and text["writes"], False),
        "the stem": (image["stem"], "patch"),
        "stem_bias": (image["stem_bias"], True),
        "norm_pre": (image["norm_pre"], False),
        "registers": (image["registers"], 0),
        "the pooling of images": (image["pool"], "class"),
        "an [ENC] that is not after [DEC], but": (text["ground"] - text["decode"], 1),
        "another network for answers": (
            any(answer[key] != text[key] for key in text.keys() - alike) and kind == "answers",
            False,
        ),
        "answers that read other channels than pictures have": (
            kind == "answers" and answer["context_width"] != image["width"],
            False,
        ),
        "the fitting": (config["fit"], "squash"),
    }
    for what, (has, allowed) in must.items():
        if has != allowed and not (what.startswith("an [ENC]") and kind == "captions"):
            raise InputError(
                f"transformers' Blip models cannot have {what} {has!r}, only {allowed!r}; save this model in Reverie's"
                " own format."
            )
    assert kind is not None
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    looks = {
        "model_type": "blip_vision_model",
        "image_size": image["size"],
        "patch_size": image["patch"],
        "hidden_size": image["width"],
        "intermediate_size": image["hidden"] or 4 * image["width"],
        "num_hidden_layers": image["depth"],
        "num_attention_heads": image["heads"],
        "hidden_act": theirs[image["activation"]],
        "layer_norm_eps": image["eps"],
    }
    words = {
        "model_type": "blip_text_model",
        "vocab_size": text["vocab"],
        "max_position_embeddings": text["length"],
        "hidden_size": text["width"],
        "encoder_hidden_size": image["width"],
        "intermediate_size": text["hidden"],
        "num_hidden_layers": text["depth"],
        "num_attention_heads": text["heads"],
        "hidden_act": theirs[text["activation"]],
        "layer_norm_eps": text["eps"],
        "bos_token_id": text["decode"],
        "eos_token_id": text["end"],
        "sep_token_id": text["end"],
        "pad_token_id": text["pad"],
        "cls_token_id": text["start"],
        "enc_token_id": text["ground"],
    }
    whole: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": KIND,
        "text_config": words,
        "vision_config": looks,
    }
    temperature = 0.07
    if kind == "retrieval":
        temperature = whole["temp"] = float(tensors["temperature"])
        whole["image_text_hidden_size"] = config["width"]
    elif kind == "answers":
        whole["smoothing"] = config["smoothing"]
    elif config["prompt"]:
        whole["prompt"] = config["prompt"]
    size = image["size"]
    processor = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": {ours: number for number, ours in RESAMPLES.items()}[config["resample"]],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config["mean"]),
        "image_std": list(config["std"]),
    }
    embeddings = [f"{prefix}.{WORDS}" for prefix in (ENCODER, DECODER)]
    biases = ["text_decoder.cls.predictions.bias"]
    return {CONFIG: whole, PREPROCESSOR: processor}, _table([*embeddings, *biases], kind, temperature)


def _id(text: Fields, key: str, default: int, vocab: int) -> int:
    value = text.record.get(key, default)
    if type(value) is not int or not 0 <= value < vocab:
        raise ModelFileError(
            f"{text.where} gives {key} as {value!r:.40}; it must be a token, from 0 to {vocab - 1}."
        )
    return value
