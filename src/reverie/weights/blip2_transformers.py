"""BLIP-2 <-> the folders of transformers' `Blip2ForImageTextRetrieval` and `Blip2ForConditionalGeneration`.

Their names -> ours; `remap.invert` of a table is the way back. The language model keeps transformers' own names. Theirs
has no temperature: it is written beside their weights as `temp`, which transformers leaves alone, and read if it is
there, else taken as the 0.07 that training begins with. Neither has theirs the head that writes captions in the first
stage (weights/blip2_lavis.py keeps it): a model with one is refused.
https://github.com/huggingface/transformers/blob/main/src/transformers/models/blip_2/modeling_blip_2.py
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from reverie.errors import InputError
from reverie.weights.files import ModelFileError
from reverie.weights.layout import CLIP_COLOURS, LAYERS, Fields, Foreign, inside
from reverie.weights.remap import Rule

CONFIG = "config.json"
GENERATION, PREPROCESSOR, PROCESSOR = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
RECORDS = (CONFIG, PREPROCESSOR, PROCESSOR, GENERATION)
MODEL_TYPES = ("blip-2", "blip_2")
RETRIEVAL, GENERATES = "Blip2ForImageTextRetrieval", "Blip2ForConditionalGeneration"
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu"}
RESAMPLES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
LANGUAGE = "language_model."


def qformer_rules(
    theirs: str, ours: str, *, depth: int, every: int, reads: bool, inner: str = "attention"
) -> tuple[Rule, ...]:
    """The blocks; BERT's names, in which `inner` is what holds the projections.

    Written out, since only some of them look at the picture.
    """
    rules: list[Rule] = []
    for i in range(depth):
        a, b = f"{theirs}.layer.{i}", f"{ours}.blocks.{i}"
        rules += [
            Rule(
                tuple(f"{a}.attention.{inner}.{name}.{{p}}" for name in ("query", "key", "value")),
                f"{b}.attention.qkv.{{p}}",
            ),
            Rule(f"{a}.attention.output.dense.{{p}}", f"{b}.attention.out.{{p}}"),
            Rule(f"{a}.attention.output.LayerNorm.{{p}}", f"{b}.norm_attention.{{p}}"),
            Rule(f"{a}.intermediate_query.dense.{{p}}", f"{b}.mlp_query.up.{{p}}"),
            Rule(f"{a}.output_query.dense.{{p}}", f"{b}.mlp_query.down.{{p}}"),
            Rule(f"{a}.output_query.LayerNorm.{{p}}", f"{b}.norm_query.{{p}}"),
        ]
        if i % every == 0:
            rules += [
                Rule(f"{a}.crossattention.{inner}.query.{{p}}", f"{b}.look.q.{{p}}"),
                Rule(
                    tuple(f"{a}.crossattention.{inner}.{name}.{{p}}" for name in ("key", "value")),
                    f"{b}.look.kv.{{p}}",
                ),
                Rule(f"{a}.crossattention.output.dense.{{p}}", f"{b}.look.out.{{p}}"),
                Rule(f"{a}.crossattention.output.LayerNorm.{{p}}", f"{b}.norm_look.{{p}}"),
            ]
        if reads:
            rules += [
                Rule(f"{a}.intermediate.dense.{{p}}", f"{b}.mlp_text.up.{{p}}"),
                Rule(f"{a}.output.dense.{{p}}", f"{b}.mlp_text.down.{{p}}"),
                Rule(f"{a}.output.LayerNorm.{{p}}", f"{b}.norm_text.{{p}}"),
            ]
    return tuple(rules)


VISION = (
    Rule("vision_model.embeddings.class_embedding", "sight.image.class_token", rearrange="1 1 d -> d"),
    Rule("vision_model.embeddings.position_embedding", "sight.image.positions", rearrange="1 n d -> n d"),
    Rule("vision_model.embeddings.patch_embedding.{p}", "sight.image.stem.{p}"),
    Rule("vision_model.encoder.layers.{i}.self_attn.qkv.{p}", "sight.image.blocks.{i}.attention.qkv.{p}"),
    Rule(
        "vision_model.encoder.layers.{i}.self_attn.projection.{p}", "sight.image.blocks.{i}.attention.out.{p}"
    ),
    Rule("vision_model.encoder.layers.{i}.layer_norm1.{p}", "sight.image.blocks.{i}.norm1.{p}"),
    Rule("vision_model.encoder.layers.{i}.layer_norm2.{p}", "sight.image.blocks.{i}.norm2.{p}"),
    Rule("vision_model.encoder.layers.{i}.mlp.fc1.{p}", "sight.image.blocks.{i}.mlp.up.{p}"),
    Rule("vision_model.encoder.layers.{i}.mlp.fc2.{p}", "sight.image.blocks.{i}.mlp.down.{p}"),
    Rule("vision_model.post_layernorm.{p}", "sight.norm.{p}"),
)
TEMP = Rule("temp", "temperature")
NO_TEMP = Rule((), "temperature", value=lambda: torch.full((1,), 0.07))


def _table(*, depth: int, every: int, retrieval: bool) -> tuple[Rule, ...]:
    blocks = qformer_rules("qformer.encoder", "sight.qformer", depth=depth, every=every, reads=retrieval)
    both = (
        *VISION,
        *blocks,
        Rule("query_tokens", "sight.qformer.queries", rearrange="1 q d -> q d"),
        Rule("qformer.layernorm.{p}", "sight.qformer.norm.{p}"),
    )
    if not retrieval:
        return (*both, Rule("language_projection.{p}", "projection.{p}"))
    return (
        *both,
        Rule("embeddings.word_embeddings.weight", "sight.qformer.embedding.weight"),
        Rule("embeddings.position_embeddings.weight", "sight.qformer.positions"),
        Rule("vision_projection.{p}", "image_projection.{p}"),
        Rule("text_projection.{p}", "text_projection.{p}"),
        Rule("itm_head.{p}", "matching.{p}"),
    )


def is_theirs(record: Any) -> bool:
    return isinstance(record, dict) and record.get("model_type") in MODEL_TYPES


def read(records: Mapping[str, Any], names: Iterable[str]) -> Foreign:
    """From the JSON files of a folder by name, and its tensors' names. Absent keys have transformers' defaults."""
    names = set(names)
    whole = Fields(records[CONFIG], where=CONFIG)
    retrieval = "itm_head.weight" in names
    if not retrieval and "language_projection.weight" not in names:
        raise ModelFileError(
            f"{CONFIG} is of a BLIP-2 without the head for retrieval and without a language model; give the folder of a"
            f" {RETRIEVAL} or a {GENERATES}."
        )
    vision, asks = whole.part("vision_config"), whole.part("qformer_config")
    image: dict[str, Any] = {
        "kind": "vit", "pool": "class", "stem_bias": True, "norm_pre": False, "norm_post": False,
        "size": vision.integer("image_size", 224), "patch": vision.integer("patch_size", 14),
        "width": vision.integer("hidden_size", 1408), "depth": vision.integer("num_hidden_layers", 39, most=LAYERS),
        "heads": vision.integer("num_attention_heads", 16),
        "activation": vision.choice("hidden_act", "gelu", ACTIVATIONS), "eps": vision.number("layer_norm_eps", 1e-6),
    }  # fmt: skip
    vision.unlike({"qkv_bias": (True,)})
    image["hidden"] = inside(vision.integer("intermediate_size", 6144), image["width"])
    every = asks.integer("cross_attention_frequency", 2, most=LAYERS)
    qformer: dict[str, Any] = {
        "queries": whole.integer("num_query_tokens", 32), "width": asks.integer("hidden_size", 768),
        "depth": asks.integer("num_hidden_layers", 12, most=LAYERS), "heads": asks.integer("num_attention_heads", 12),
        "hidden": asks.integer("intermediate_size", 3072), "context_width": image["width"], "every": every,
        "activation": asks.choice("hidden_act", "gelu", ACTIVATIONS), "eps": asks.number("layer_norm_eps", 1e-12),
        "reads": retrieval, "writes": False,
    }  # fmt: skip
    if retrieval:
        qformer |= {
            "vocab": asks.integer("vocab_size", 30_522),
            "length": asks.integer("max_position_embeddings", 512),
        }
        # BERT's ids, whose tokenizer is the only one that these models have; [DEC] has none in theirs.
        small = qformer["vocab"] <= 102
        qformer |= {"start": 2, "end": 3} if small else {}
        qformer["decode"] = qformer["vocab"] - 1
    sight = {
        "image": image,
        "qformer": qformer,
        "norm_eps": image["eps"],
        **_preparation(records, image["size"]),
    }
    table = _table(depth=qformer["depth"], every=every, retrieval=retrieval)
    if retrieval:
        values = {"sight": sight, "width": whole.integer("image_text_hidden_size", 256)}
        return Foreign(
            system="blip2", values=values, table=(*table, TEMP if "temp" in names else NO_TEMP),
            ignore=("embeddings.position_ids",),
        )  # fmt: skip
    return _with_language(whole, records, names, sight, table)


def _with_language(
    whole: Fields, records: Mapping[str, Any], names: set[str], sight: dict[str, Any], table: tuple[Rule, ...]
) -> Foreign:
    text = Fields(whole.record.get("text_config") or {}, where=f"text_config of {CONFIG}")
    said = dict(text.record)
    for record in (whole.record, records.get(GENERATION)):
        if isinstance(record, dict):
            said |= {
                key: record[key] for key in ("eos_token_id", "pad_token_id") if record.get(key) is not None
            }
    ends = said.get("eos_token_id", 2)
    ends = ends[0] if isinstance(ends, list) and ends else ends
    pad = said.get("pad_token_id", 1)
    language = {
        "kind": text.record.get("model_type", "opt"), "record": json.dumps(text.record), "end": ends,
        "pad": pad if type(pad) is int and pad >= 0 else ends,
    }  # fmt: skip
    aliases = _aliases(language)
    theirs = sorted(name.removeprefix(LANGUAGE) for name in names if name.startswith(LANGUAGE))
    of: dict[str, list[str]] = {}
    for name in theirs:
        of.setdefault(aliases.get(name, name), []).append(f"{LANGUAGE}{name}")
    rules = tuple(
        Rule(tuple(sources), f"language.model.{name}", copies=len(sources) > 1)
        for name, sources in of.items()
    )
    question = (
        "Question: {} Short answer:" if language["kind"] == "t5" else "Question: {} Answer:"
    )  # the authors' code
    values = {"sight": sight, "language": language, "question": question}
    return Foreign(system="blip2-language", values=values, table=(*table, *rules))


def _aliases(language: Mapping[str, Any]) -> dict[str, str]:
    """Further names of the tensors of a language model -> the first of them: built on shapes alone."""
    from reverie.backbones.language import Language, LanguageConfig

    try:
        with torch.device("meta"):
            return Language(LanguageConfig(**language)).aliases
    except InputError as error:
        raise ModelFileError(f"text_config of {CONFIG} is refused: {error}") from error


def write(
    name: str, config: Mapping[str, Any], tensors: Iterable[str]
) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """Their JSON files by name and our table, from our config as plain data. InputError: they have no such model."""
    sight = config["sight"]
    image, qformer = sight["image"], sight["qformer"]
    retrieval = name == "blip2"
    for source in (sight["source"], config.get("language_source") or {"model": ""}):
        if source["model"]:
            raise InputError(
                f"a frozen part of this model lies in {source['model']!r:.80} and is not its own, but transformers'"
                " folders hold all of a model; save it in Reverie's own format."
            )
    must: dict[str, tuple[Any, Any]] = {
        "the image tower": (image["kind"], "vit"), "the stem": (image.get("stem"), "patch"),
        "stem_bias": (image.get("stem_bias"), True), "norm_pre": (image.get("norm_pre"), False),
        "norm_post": (image.get("norm_post"), False), "registers": (image.get("registers"), 0),
        "the pooling of images": (image.get("pool"), "class"), "leave": (sight["leave"], 0),
        "norm_eps": (sight["norm_eps"], image.get("eps")),
        "a head that writes": (qformer["writes"], False),
        "a text side": (qformer["reads"], retrieval),
    }  # fmt: skip
    for what, (has, allowed) in must.items():
        if has != allowed:
            raise InputError(
                f"transformers' BLIP-2 cannot have {what} {has!r}, only {allowed!r}; save this model in Reverie's own"
                " format."
            )
    asks = {
        "model_type": "blip_2_qformer", "hidden_size": qformer["width"], "num_hidden_layers": qformer["depth"],
        "num_attention_heads": qformer["heads"], "intermediate_size": qformer["hidden"],
        "hidden_act": qformer["activation"], "layer_norm_eps": qformer["eps"],
        "cross_attention_frequency": qformer["every"], "encoder_hidden_size": image["width"],
        "use_qformer_text_input": retrieval, "vocab_size": qformer["vocab"],
        "max_position_embeddings": qformer["length"], "pad_token_id": qformer["pad"],
    }  # fmt: skip
    looks = {
        "model_type": "blip_2_vision_model", "image_size": image["size"], "patch_size": image["patch"],
        "hidden_size": image["width"], "num_hidden_layers": image["depth"], "num_attention_heads": image["heads"],
        "intermediate_size": image["hidden"] or 4 * image["width"], "hidden_act": image["activation"],
        "layer_norm_eps": image["eps"], "qkv_bias": True,
    }  # fmt: skip
    whole: dict[str, Any] = {
        "architectures": [RETRIEVAL if retrieval else GENERATES], "model_type": "blip-2", "vision_config": looks,
        "qformer_config": asks, "num_query_tokens": qformer["queries"],
    }  # fmt: skip
    table = _table(depth=qformer["depth"], every=qformer["every"], retrieval=retrieval)
    records: dict[str, Any] = {PREPROCESSOR: _processor(sight)}
    if retrieval:
        whole["image_text_hidden_size"] = config["width"]
        table = (*table, TEMP)
    else:
        language = config["language"]
        whole["text_config"] = json.loads(language["record"]) | {"model_type": language["kind"]}
        records[GENERATION] = {"eos_token_id": language["end"], "pad_token_id": language["pad"]}
        inner = [key for key in tensors if key.startswith("language.model.")]
        table = (*table, *(Rule(f"{LANGUAGE}{key.removeprefix('language.model.')}", key) for key in inner))
    return {CONFIG: whole, **records}, table


def _processor(sight: Mapping[str, Any]) -> dict[str, Any]:
    size = sight["image"]["size"]
    if sight["fit"] != "squash":
        raise InputError("transformers' BLIP-2 squashes pictures to a square and cannot crop them.")
    return {
        "image_processor_type": "BlipImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "resample": {ours: theirs for theirs, ours in RESAMPLES.items()}[sight["resample"]],
        "image_mean": list(sight["mean"]), "image_std": list(sight["std"]),
    }  # fmt: skip


def _preparation(records: Mapping[str, Any], side: int) -> dict[str, Any]:
    """How pictures are prepared: mean, std, fit, resample."""
    mean, std = CLIP_COLOURS
    inner = records.get(PROCESSOR)
    if isinstance(inner, dict) and "image_processor" in inner:
        found = Fields(inner["image_processor"], where=f"image_processor of {PROCESSOR}")
    elif PREPROCESSOR in records:
        found = Fields(records[PREPROCESSOR], where=PREPROCESSOR)
    else:
        warnings.warn(
            f"the folder has no {PREPROCESSOR}: pictures are prepared with the mean, std and resizing of transformers'"
            " own BLIP-2 processor, which these weights may not have been trained with",
            stacklevel=2,
        )
        found = Fields({}, where="the absent " + PREPROCESSOR)
    found.unlike(
        {"do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,), "do_center_crop": (False,)}
    )
    if abs(255 * found.number("rescale_factor", 1 / 255) - 1) > 1e-3:
        raise ModelFileError(
            f"{found.where} gives a rescale_factor other than 1/255, which no BLIP-2 of Reverie has."
        )
    square = {"height": side, "width": side}
    if found.record.get("size", square) not in (square, side):
        raise ModelFileError(
            f"{found.where} resizes to {found.record['size']}, but the image tower reads {side} x {side}; write that."
        )
    return {
        "mean": found.colour("image_mean", mean), "std": found.colour("image_std", std), "fit": "squash",
        "resample": found.choice("resample", 3, RESAMPLES),
    }  # fmt: skip
