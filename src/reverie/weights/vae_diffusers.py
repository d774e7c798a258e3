"""The picture autoencoder <-> diffusers' `AutoencoderKL`, and <- the names of latent diffusion's own checkpoints.

https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/autoencoders/autoencoder_kl.py
https://github.com/CompVis/latent-diffusion/blob/main/ldm/models/autoencoder.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from reverie.weights.files import Entry, ModelFileError, shorten
from reverie.weights.layout import Fields, Foreign
from reverie.weights.remap import Rule

CLASS = "AutoencoderKL"
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
# Names of the attention's weights now, and in the files of before 2023.
NAMES = ("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")
PREFIX = "first_stage_model."  # in the single files of Stable Diffusion
# What a config may say besides without changing a number.
SILENT = (
    "_class_name", "_diffusers_version", "_name_or_path", "sample_size", "force_upcast", "act_fn", "in_channels",
    "out_channels", "latents_mean", "latents_std",
)  # fmt: skip


def read(record: Any, entries: Collection[str] = ()) -> Foreign:
    """From their config.json; `entries`, the names of the file's tensors, tell old files from new ones."""
    whole = Fields(record, where=f"the config of {CLASS}")
    whole.choice("_class_name", CLASS, {CLASS: CLASS})
    whole.only((
        *SILENT, "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "latent_channels",
        "norm_num_groups", "mid_block_add_attention", "use_quant_conv", "use_post_quant_conv", "scaling_factor",
        "shift_factor",
    ))  # fmt: skip
    whole.unlike({
        "act_fn": ("silu",), "in_channels": (3,), "out_channels": (3,), "latents_mean": (None,), "latents_std": (None,),
    })  # fmt: skip
    widths = record.get("block_out_channels", [64])
    if not isinstance(widths, list) or not widths or not all(type(w) is int and w > 0 for w in widths):
        raise ModelFileError(
            f"{whole.where} gives block_out_channels as {shorten(widths)}; it must be widths."
        )
    down = _attentive(record.get("down_block_types", ["DownEncoderBlock2D"]), DOWN, whole, len(widths))
    up = _attentive(record.get("up_block_types", ["UpDecoderBlock2D"]), UP, whole, len(widths))
    attention = sum(down)
    if down != [i >= len(widths) - attention for i in range(len(widths))] or up != down[::-1]:
        raise ModelFileError(
            f"{whole.where} attends at levels other than the lowest, alike both ways: refused."
        )
    quant = whole.flag("use_quant_conv", True)
    if whole.flag("use_post_quant_conv", True) != quant:
        raise ModelFileError(
            f"{whole.where} has one of quant_conv and post_quant_conv; Reverie has both or none."
        )
    values: dict[str, Any] = {
        "channels": whole.integer("latent_channels", 4),
        "widths": widths,
        "depth": whole.integer("layers_per_block", 1),
        "groups": whole.integer("norm_num_groups", 32),
        "attention": attention,
        "middle": whole.flag("mid_block_add_attention", True),
        "quant": quant,
        "scale": whole.number("scaling_factor", 0.18215),
        "shift": 0.0 if record.get("shift_factor") is None else whole.number("shift_factor", 0.0),
    }
    old = any(name.endswith(".attentions.0.query.weight") for name in entries)
    return Foreign(system="vae", values=values, table=table(len(widths), NAMES[old]))


def write(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """Their config.json and our table, from our config as plain data."""
    count, attention = len(config["widths"]), config["attention"]
    lowest = [i >= count - attention for i in range(count)]
    record = {
        "_class_name": CLASS,
        "act_fn": "silu",
        "block_out_channels": list(config["widths"]),
        "down_block_types": ["AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in lowest],
        "up_block_types": ["AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in lowest[::-1]],
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config["channels"],
        "layers_per_block": config["depth"],
        "norm_num_groups": config["groups"],
        "mid_block_add_attention": config["middle"],
        "use_quant_conv": config["quant"],
        "use_post_quant_conv": config["quant"],
        "scaling_factor": config["scale"],
        "shift_factor": config["shift"] or None,
        "sample_size": 512,
    }
    return record, table(count)


def table(levels: int, names: tuple[str, str, str, str] = NAMES[0]) -> tuple[Rule, ...]:
    """Their names -> ours, for so many levels; `names` are those of the attention's weights."""

    def attention(theirs: str, ours: str) -> tuple[Rule, ...]:
        return (
            Rule(f"{theirs}.group_norm.{{p}}", f"{ours}.norm.{{p}}"),
            Rule(tuple(f"{theirs}.{name}.{{p}}" for name in names[:3]), f"{ours}.attention.qkv.{{p}}"),
            Rule(f"{theirs}.{names[3]}.{{p}}", f"{ours}.attention.out.{{p}}"),
        )

    rules = [Rule("quant_conv.{p}", "quant.{p}"), Rule("post_quant_conv.{p}", "unquant.{p}")]
    for side, levels_name, resize in (
        ("encoder", "down_blocks", "downsamplers"),
        ("decoder", "up_blocks", "upsamplers"),
    ):
        level, ours = f"{side}.{levels_name}.{{i}}", f"{side}.levels.{{i}}"
        rules += [
            Rule(f"{side}.conv_in.{{p}}", f"{side}.stem.{{p}}"),
            Rule(f"{side}.conv_norm_out.{{p}}", f"{side}.norm.{{p}}"),
            Rule(f"{side}.conv_out.{{p}}", f"{side}.out.{{p}}"),
            *_block(f"{level}.resnets.{{j}}", f"{ours}.blocks.{{j}}", skip="conv_shortcut"),
            *attention(f"{level}.attentions.{{j}}", f"{ours}.attentions.{{j}}"),
            Rule(f"{level}.{resize}.0.conv.{{p}}", f"{ours}.resize.{{p}}"),
            *_block(f"{side}.mid_block.resnets.0", f"{side}.middle.0", skip=None),
            *attention(f"{side}.mid_block.attentions.0", f"{side}.middle.1"),
            *_block(f"{side}.mid_block.resnets.1", f"{side}.middle.2", skip=None),
        ]
    return tuple(rules)


def is_theirs(entries: Collection[str]) -> bool:
    """Whether a file holds an autoencoder under latent diffusion's names, alone or as a part of Stable Diffusion."""
    return f"{PREFIX}encoder.conv_in.weight" in entries or (
        "encoder.conv_in.weight" in entries and "encoder.mid.block_1.norm1.weight" in entries
    )


def read_alone(entries: Mapping[str, Entry], config: Mapping[str, Any] | None, *, what: str) -> Foreign:
    """From a checkpoint's header: `config`, ours as plain data, or what the shapes say.

    Shapes do not say the constants of normalisation: without a config they are those that the number of channels and
    the convolutions around the latents have in Stable Diffusion and SD3. Tensors beside the autoencoder (a loss that
    was stored with it, the rest of Stable Diffusion) are left.
    """
    prefix = PREFIX if f"{PREFIX}encoder.conv_in.weight" in entries else ""
    shapes = {
        name.removeprefix(prefix): entry.shape for name, entry in entries.items() if name.startswith(prefix)
    }

    def count(start: str, *, number: int = 0) -> int:
        while any(name.startswith(f"{start}.{number}.") for name in shapes):
            number += 1
        return number

    try:
        levels, quant = count("encoder.down"), "quant_conv.weight" in shapes
        values = {
            "channels": shapes["decoder.conv_in.weight"][1],
            "widths": [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)],
            "depth": count("encoder.down.0.block"),
            "attention": sum(f"encoder.down.{i}.attn.0.norm.weight" in shapes for i in range(levels)),
            "middle": "encoder.mid.attn_1.norm.weight" in shapes,
            "quant": quant,
        }
    except (KeyError, IndexError):
        raise ModelFileError(
            f"{what} lacks parts of an autoencoder of latent diffusion; fetch it again."
        ) from None
    if config is None and (values["channels"], quant) not in ((4, True), (16, False)):
        raise ModelFileError(
            f"{what} has latents of {values['channels']} channels, whose normalisation no name says; give config=."
        )
    if config is None:
        values |= {} if quant else {"scale": 1.5305, "shift": 0.0609}
    else:
        values = dict(config)
    rules = original_table(levels, prefix, linear=len(shapes.get("encoder.mid.attn_1.q.weight", ())) == 2)
    known = ("encoder", "decoder", "quant_conv", "post_quant_conv")
    others = tuple(
        name for name in entries if not name.startswith(tuple(f"{prefix}{part}." for part in known))
    )
    return Foreign(system="vae", values=values, table=rules, ignore=others)


def original_table(levels: int, prefix: str = "", *, linear: bool = False) -> tuple[Rule, ...]:
    """Latent diffusion's names -> ours; `linear`: the attention's weights are matrices, not 1 x 1 convolutions."""

    def attention(theirs: str, ours: str) -> tuple[Rule, ...]:
        flat = None if linear else "d c 1 1 -> d c"
        return (
            Rule(f"{theirs}.norm.{{p}}", f"{ours}.norm.{{p}}"),
            Rule(
                tuple(f"{theirs}.{x}.weight" for x in "qkv"), f"{ours}.attention.qkv.weight", rearrange=flat
            ),
            Rule(tuple(f"{theirs}.{x}.bias" for x in "qkv"), f"{ours}.attention.qkv.bias"),
            Rule(f"{theirs}.proj_out.weight", f"{ours}.attention.out.weight", rearrange=flat),
            Rule(f"{theirs}.proj_out.bias", f"{ours}.attention.out.bias"),
        )

    rules = [
        Rule(f"{prefix}quant_conv.{{p}}", "quant.{p}"),
        Rule(f"{prefix}post_quant_conv.{{p}}", "unquant.{p}"),
    ]
    for side, levels_name, resize in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        theirs = f"{prefix}{side}"
        rules += [
            Rule(f"{theirs}.conv_in.{{p}}", f"{side}.stem.{{p}}"),
            Rule(f"{theirs}.norm_out.{{p}}", f"{side}.norm.{{p}}"),
            Rule(f"{theirs}.conv_out.{{p}}", f"{side}.out.{{p}}"),
            *_block(f"{theirs}.mid.block_1", f"{side}.middle.0", skip=None),
            *attention(f"{theirs}.mid.attn_1", f"{side}.middle.1"),
            *_block(f"{theirs}.mid.block_2", f"{side}.middle.2", skip=None),
        ]
        for i in range(levels):  # the decoder's levels are counted the other way
            level = f"{theirs}.{levels_name}.{i}"
            ours = f"{side}.levels.{i if side == 'encoder' else levels - 1 - i}"
            rules += [
                *_block(f"{level}.block.{{j}}", f"{ours}.blocks.{{j}}", skip="nin_shortcut"),
                *attention(f"{level}.attn.{{j}}", f"{ours}.attentions.{{j}}"),
                Rule(f"{level}.{resize}.conv.{{p}}", f"{ours}.resize.{{p}}"),
            ]
    return tuple(rules)


def _block(theirs: str, ours: str, *, skip: str | None) -> tuple[Rule, ...]:
    same = ("norm1", "conv1", "norm2", "conv2")
    rules = tuple(Rule(f"{theirs}.{name}.{{p}}", f"{ours}.{name}.{{p}}") for name in same)
    return rules if skip is None else (*rules, Rule(f"{theirs}.{skip}.{{p}}", f"{ours}.skip.{{p}}"))


def _attentive(types: Any, known: Mapping[str, bool], whole: Fields, count: int) -> list[bool]:
    if (
        not isinstance(types, list)
        or len(types) != count
        or not all(isinstance(t, str) and t in known for t in types)
    ):
        raise ModelFileError(
            f"{whole.where} gives the levels {shorten(types)}; it must be {count} of {', '.join(known)}."
        )
    return [known[kind] for kind in types]
