"""Wan 2.1 <-> diffusers' `WanPipeline`; its transformer also <-> the original repository's naming, `WanModel`.

Both keep the transformer's weights in `diffusion_pytorch_model.safetensors` (or parts of it, with an index) beside a
config.json whose `_class_name` says which it is. Of a pipeline `transformer`, `vae` and `scheduler` are the system; the
folders `text_encoder` and `tokenizer` are read beside it (encoders/umt5.py).
https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/transformers/transformer_wan.py
https://github.com/Wan-Video/Wan2.1/blob/main/wan/modules/model.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from reverie.processes.gaussian import Flow
from reverie.samplers.configured import SamplerConfig
from reverie.weights import diffusers_scheduler, video_vae_wan
from reverie.weights.files import ModelFileError, shorten
from reverie.weights.layout import Fields, Foreign
from reverie.weights.places import CONFIG, PIPELINE, SCHEDULER
from reverie.weights.remap import Rule

CLASS, ORIGINAL, PIPELINE_CLASS = "WanTransformer3DModel", "WanModel", "WanPipeline"
TRANSFORMER, VAE = f"transformer/{CONFIG}", f"vae/{CONFIG}"
CONSTANTS = tuple(f"codec.{name}" for name in video_vae_wan.CONSTANTS)
_COMMON = {"_class_name", "_diffusers_version", "_name_or_path", "freq_dim", "ffn_dim", "num_layers", "eps"}
KEYS = _COMMON | {
    "patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
    "cross_attn_norm", "qk_norm", "rope_max_seq_len",
}  # fmt: skip
ORIGINAL_KEYS = _COMMON | {
    "model_type", "patch_size", "text_len", "in_dim", "dim", "text_dim", "out_dim", "num_heads", "window_size",
    "qk_norm", "cross_attn_norm",
}  # fmt: skip


def table(
    config: Mapping[str, Any], *, original: bool = False, theirs: str = "", ours: str = "backbone."
) -> tuple[Rule, ...]:
    """Their names -> ours for a backbone of our config, with what stands before the names of either side."""
    frames, side = config["patch"]
    axes = (("c", config["channels"]), ("pf", frames), ("ph", side), ("pw", side))
    a, b = f"{theirs}blocks.{{i}}", f"{ours}blocks.{{i}}"
    if original:
        time, project, text = "time_embedding.{}", "time_projection.1", "text_embedding.{}"
        layers, own, cross = (0, 2), "self_attn", "cross_attn"
        q, k, v, out, up, down = "q", "k", "v", "o", "ffn.0", "ffn.2"
        norm, block_table, head_table, head = "norm3", "modulation", "head.modulation", "head.head"
    else:
        time, project, text = (
            f"condition_embedder.{part}"
            for part in ("time_embedder.linear_{}", "time_proj", "text_embedder.linear_{}")
        )
        layers, own, cross = (1, 2), "attn1", "attn2"
        q, k, v, out, up, down = "to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"
        norm, block_table, head_table, head = (
            "norm2", "scale_shift_table", "scale_shift_table", "proj_out",
        )  # fmt: skip
    return (
        Rule(
            f"{theirs}patch_embedding.weight", f"{ours}embed.weight", "d c pf ph pw -> d (c pf ph pw)", axes
        ),
        Rule(f"{theirs}patch_embedding.bias", f"{ours}embed.bias"),
        *(
            Rule(f"{theirs}{part.format(layer)}.{{p}}", f"{ours}{name}.{number}.{{p}}")
            for part, name in ((time, "time"), (text, "words"))
            for layer, number in zip(layers, (0, 2), strict=True)
        ),
        Rule(f"{theirs}{project}.{{p}}", f"{ours}modulation.1.{{p}}"),
        Rule(f"{a}.{block_table}", f"{b}.table", "1 six d -> six d"),
        Rule(tuple(f"{a}.{own}.{each}.{{p}}" for each in (q, k, v)), f"{b}.attention.qkv.{{p}}"),
        Rule(f"{a}.{cross}.{q}.{{p}}", f"{b}.cross.q.{{p}}"),
        Rule(tuple(f"{a}.{cross}.{each}.{{p}}" for each in (k, v)), f"{b}.cross.kv.{{p}}"),
        *(
            Rule(f"{a}.{their}.{x}.{{p}}", f"{b}.{our}.{y}.{{p}}")
            for their, our in ((own, "attention"), (cross, "cross"))
            for x, y in ((out, "out"), ("norm_q", "norm_q"), ("norm_k", "norm_k"))
        ),
        Rule(f"{a}.{norm}.{{p}}", f"{b}.norm_context.{{p}}"),
        Rule(f"{a}.{up}.{{p}}", f"{b}.mlp.up.{{p}}"),
        Rule(f"{a}.{down}.{{p}}", f"{b}.mlp.down.{{p}}"),
        Rule(f"{theirs}{head_table}", f"{ours}table", "1 two d -> two d"),
        Rule(f"{theirs}{head}.weight", f"{ours}out.weight", "(pf ph pw c) d -> (c pf ph pw) d", axes),
        Rule(f"{theirs}{head}.bias", f"{ours}out.bias", "(pf ph pw c) -> (c pf ph pw)", axes),
    )


def read(record: Any) -> Foreign:
    """The transformer alone, as a system without a codec, from its config.json of either naming."""
    values = backbone(record)
    original = record.get("_class_name") == ORIGINAL
    return Foreign(system="wan", values={"backbone": values}, table=table(values, original=original))


def backbone(record: Any) -> dict[str, Any]:
    """Our config of the backbone as plain data, from either config.json. Raises `ModelFileError`."""
    fields = Fields(record, where="config.json")
    original = record.get("_class_name") == ORIGINAL
    fields.only(ORIGINAL_KEYS if original else KEYS)
    if original:
        fields.unlike({"model_type": ("t2v",), "window_size": ([-1, -1],), "qk_norm": (True,)})
        width, heads = fields.integer("dim", 2048), fields.integer("num_heads", 16)
        channels, out = fields.integer("in_dim", 16), fields.integer("out_dim", 16)
        hidden, depth = fields.integer("ffn_dim", 8192), fields.integer("num_layers", 32)
    else:
        fields.unlike({"qk_norm": ("rms_norm_across_heads",)})
        heads = fields.integer("num_attention_heads", 40)
        width = heads * fields.integer("attention_head_dim", 128)
        channels = fields.integer("in_channels", 16)
        out = fields.integer("out_channels", 16) if record.get("out_channels") is not None else channels
        hidden, depth = fields.integer("ffn_dim", 13824), fields.integer("num_layers", 40)
    if channels != out:
        raise ModelFileError(
            f"config.json gives {channels} channels in and {out} out: it is a model that continues pictures, and"
            " Reverie reads Wan's text-to-video models."
        )
    patch = record.get("patch_size", [1, 2, 2])
    if (
        not isinstance(patch, list)
        or len(patch) != 3
        or patch[1] != patch[2]
        or not all(type(side) is int and 0 < side < 100 for side in patch)
    ):
        raise ModelFileError(f"config.json gives patch_size {shorten(patch)}; it must be frames, side, side.")
    return {
        "channels": channels,
        "patch": patch[:2],
        "width": width,
        "hidden": hidden,
        "depth": depth,
        "heads": heads,
        "context_width": fields.integer("text_dim", 4096),
        "clock": fields.integer("freq_dim", 256),
        "eps": fields.number("eps", 1e-6),
        "norm_context": fields.flag("cross_attn_norm", True),
    }


def write(
    config: Mapping[str, Any], *, original: bool = False, **names: str
) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """Their config.json for a backbone of our config, and the table; `names` as `table` takes them."""
    frames, side = config["patch"]
    both = {
        "_class_name": ORIGINAL if original else CLASS,
        "eps": config["eps"],
        "ffn_dim": config["hidden"],
        "freq_dim": config["clock"],
        "num_layers": config["depth"],
        "patch_size": [frames, side, side],
        "text_dim": config["context_width"],
        "cross_attn_norm": config["norm_context"],
    }
    if original:
        record = both | {
            "model_type": "t2v",
            "dim": config["width"],
            "num_heads": config["heads"],
            "in_dim": config["channels"],
            "out_dim": config["channels"],
        }
    else:
        record = both | {
            "_diffusers_version": "0.33.0",  # the first release with this class's present keys
            "num_attention_heads": config["heads"],
            "attention_head_dim": config["width"] // config["heads"],
            "in_channels": config["channels"],
            "out_channels": config["channels"],
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
        }
    return record, table(config, original=original, **names)


# ---------------------------------------------------------------- whole pipelines


def read_pipeline(records: Mapping[str, Any]) -> Foreign:
    """The system from a pipeline's JSON files, by path. Raises `ModelFileError`."""
    index = Fields(records[PIPELINE], where=PIPELINE)
    second = index.record.get("transformer_2")
    if index.record.get("boundary_ratio") is not None or second not in (None, [None, None]):
        raise ModelFileError(
            f"{PIPELINE} has two transformers, as Wan 2.2's; Reverie reads Wan 2.1's, which have one."
        )
    index.unlike({"expand_timesteps": (False, None)})
    for file in (TRANSFORMER, VAE, SCHEDULER):
        if file not in records:
            raise ModelFileError(f"the pipeline lacks {file}; fetch the whole folder.")
    values = backbone(records[TRANSFORMER])
    if records[TRANSFORMER].get("_class_name") != CLASS:
        raise ModelFileError(f"{TRANSFORMER} is no {CLASS}; fetch the pipeline's own.")
    vae = video_vae_wan.read(records[VAE], theirs="vae.", ours="codec.")
    sampling = diffusers_scheduler.read(records[SCHEDULER])
    return Foreign(
        system="wan",
        values={"backbone": values, "codec": vae.values, "sampling": _plain(sampling)},
        table=(*table(values, theirs="transformer."), *vae.table),
    )


def write_pipeline(
    config: Mapping[str, Any], constants: Mapping[str, Sequence[float]]
) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """A pipeline's JSON files by path and the table, for a system of our config; `constants` by the names of CONSTANTS.

    Without text encoder and tokenizer: diffusers must be given features unless they are added.
    """
    transformer, rules = write(config["backbone"], theirs="transformer.")
    vae, vae_rules = video_vae_wan.write(
        config["codec"],
        {name: constants[f"codec.{name}"] for name in video_vae_wan.CONSTANTS},
        theirs="vae.",
        ours="codec.",
    )
    sampling = dict(config["sampling"])
    scheduler = diffusers_scheduler.write(
        SamplerConfig(**sampling | {"process": Flow(**sampling["process"])})
    )
    index = {
        "_class_name": PIPELINE_CLASS,
        "_diffusers_version": transformer["_diffusers_version"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "transformer": ["diffusers", CLASS],
        "vae": ["diffusers", video_vae_wan.CLASS],
    }
    return {TRANSFORMER: transformer, VAE: vae, SCHEDULER: scheduler, PIPELINE: index}, (*rules, *vae_rules)


def _plain(sampling: SamplerConfig) -> dict[str, Any]:
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(sampling)))
