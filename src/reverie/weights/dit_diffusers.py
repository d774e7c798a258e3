"""DiT <-> diffusers' `DiTTransformer2DModel` and the folders of its `DiTPipeline`.

Every block of theirs holds a copy of the embeddings of time and class; here they are one, so copies that differ are
refused. Their times' waves and the norm before their MLP differ from the authors' code, as our config says.
https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/transformers/dit_transformer_2d.py
https://github.com/huggingface/diffusers/blob/main/src/diffusers/pipelines/dit/pipeline_dit.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reverie.errors import InputError
from reverie.weights.files import ModelFileError
from reverie.weights.layout import Fields, Foreign
from reverie.weights.remap import Rule

CLASS = "DiTTransformer2DModel"
CLASSES = (CLASS, "Transformer2DModel")  # the latter is what the published folders of DiT name
EMBEDDINGS = (
    ("timestep_embedder.linear_1.{p}", "time.0.{p}"),
    ("timestep_embedder.linear_2.{p}", "time.2.{p}"),
    ("class_embedder.embedding_table.weight", "classes.weight"),
)


def read(record: Any) -> Foreign:
    """From their config.json, of either class."""
    whole = Fields(record, where=f"the config of {CLASS}")
    whole.unlike({
        "norm_type": ("ada_norm_zero",), "activation_fn": ("gelu-approximate",), "attention_bias": (True,),
        "norm_elementwise_affine": (False,), "cross_attention_dim": (None,), "double_self_attention": (False,),
        "only_cross_attention": (False,), "num_vector_embeds": (None,), "dropout": (0.0, 0), "caption_channels": (None,),
        "interpolation_scale": (None, 1, 1.0),
    })  # fmt: skip
    heads, head = whole.integer("num_attention_heads", 16), whole.integer("attention_head_dim", 72)
    channels, depth = whole.integer("in_channels", 4), whole.integer("num_layers", 28)
    out = channels if record.get("out_channels") is None else whole.integer("out_channels", channels)
    if out not in (channels, 2 * channels):
        raise ModelFileError(
            f"{whole.where} gives {out} channels for {channels}; it must be as many, or twice as many."
        )
    values = {
        "channels": channels,
        "size": whole.integer("sample_size", 32),
        "patch": whole.integer("patch_size", 2),
        "width": heads * head,
        "depth": depth,
        "heads": heads,
        "classes": whole.integer("num_embeds_ada_norm", 1000),
        "learned_sigma": out == 2 * channels,
        "waves": "diffusers",
        "mlp_eps": whole.number("norm_eps", 1e-5),
    }
    return Foreign(system="dit", values=values, table=table(depth), ignore=("pos_embed.pos_embed",))


def write(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """Their config.json and our table, from our network's config as plain data. InputError: they have no such model."""
    if config["waves"] != "diffusers":
        raise InputError(
            "diffusers' DiT embeds times by other waves than the authors' code, which this model was trained with, so"
            " numbers would differ; save it in Reverie's own format."
        )
    if int(config["width"] * config["ratio"]) != 4 * config["width"]:
        raise InputError(
            f"diffusers' DiT has MLPs of 4 times the width, not {config['ratio']:g}; save this model in Reverie's own"
            " format."
        )
    record = {
        "_class_name": CLASS,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config["width"] // config["heads"],
        "dropout": 0.0,
        "in_channels": config["channels"],
        "norm_elementwise_affine": False,
        "norm_eps": config["mlp_eps"],
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config["heads"],
        "num_embeds_ada_norm": config["classes"],
        "num_layers": config["depth"],
        "out_channels": config["channels"] * (2 if config["learned_sigma"] else 1),
        "patch_size": config["patch"],
        "sample_size": config["size"],
        "upcast_attention": False,
    }
    return record, table(config["depth"])


def table(depth: int) -> tuple[Rule, ...]:
    """Their names -> ours, for so many blocks."""
    block = "transformer_blocks.{i}"
    copies = tuple(
        Rule(tuple(f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in range(depth)), ours, copies=True)
        for theirs, ours in EMBEDDINGS
    )
    return (
        Rule("pos_embed.proj.{p}", "embed.{p}"),
        *copies,
        Rule(f"{block}.norm1.linear.{{p}}", "blocks.{i}.modulation.{p}"),
        Rule(tuple(f"{block}.attn1.to_{x}.{{p}}" for x in "qkv"), "blocks.{i}.attention.qkv.{p}"),
        Rule(f"{block}.attn1.to_out.0.{{p}}", "blocks.{i}.attention.out.{p}"),
        Rule(f"{block}.ff.net.0.proj.{{p}}", "blocks.{i}.mlp.up.{p}"),
        Rule(f"{block}.ff.net.2.{{p}}", "blocks.{i}.mlp.down.{p}"),
        Rule("proj_out_1.{p}", "modulation.{p}"),
        Rule("proj_out_2.{p}", "out.{p}"),
    )
