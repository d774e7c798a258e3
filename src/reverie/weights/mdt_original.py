"""MDT, version 1 and 2 <- the names of its authors' code.

https://github.com/sail-sg/MDT/blob/main/masked_diffusion/models.py (version 1: the branch mdtv1)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from reverie.backbones.mdt import distances
from reverie.weights.files import Entry, ModelFileError
from reverie.weights.layout import LAYERS, Foreign
from reverie.weights.remap import Rule

DECODER = 2  # blocks of version 1, whose files do not say it: its one published model has so many
MASKED = ("mask_token", "sideblocks.0.")  # what masked passes alone need


def is_theirs(entries: Collection[str]) -> bool:
    """Whether a file has the names of MDT's authors, among which are those of DiT's."""
    return {"x_embedder.proj.weight", "decoder_pos_embed", "mask_token"} <= set(entries)


def read_alone(
    entries: Mapping[str, Entry],
    config: Mapping[str, Any] | None,
    *,
    what: str,
) -> Foreign:
    """From a checkpoint's header: `config`, of the system as plain data, or what the names and shapes say.

    They do not say how many blocks the decoder of version 1 has (`DECODER`, unless the config says it), nor what share
    was masked. A checkpoint has no autoencoder: the model draws latents until it is given one (`attach`). As in the
    authors' code guidance moves three channels. A config with `masked` None reads the model without its interpolater.
    """
    if config is None:
        said = _backbone(entries, what)
        values: dict[str, Any] = {
            "backbone": said,
            "gamma": 5.0 if said["skips"] else None,
            "guided_channels": 3,
        }
    elif "decoder" in config["backbone"]:
        values = dict(config)
    else:
        raise ModelFileError(f"{what} is an MDT, which the given config is not: give MDT's, or none.")
    backbone = values["backbone"]
    patches = (backbone["size"] // backbone["patch"]) ** 2
    for name, entry in entries.items():  # before as many numbers are computed
        if name.endswith(INDEX) and entry.shape != (patches, patches):
            raise ModelFileError(
                f"{what} has {entry.shape} distances; {patches} patches have {(patches,) * 2}."
            )
    ignore = tuple(name for name in entries if name.startswith(MASKED)) if backbone["masked"] is None else ()
    return Foreign(system="mdt", values=values, table=table(backbone), ignore=ignore)


def _backbone(entries: Mapping[str, Entry], what: str) -> dict[str, Any]:
    shapes = {name: entry.shape for name, entry in entries.items()}

    def count(stack: str) -> int:
        return next(i for i in range(LAYERS) if f"{stack}.{i}.attn.qkv.weight" not in shapes)

    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        if patch < 1:
            raise ValueError
        skips = not count("blocks")
        rows = shapes["final_layer.linear.weight"][0]
        return {
            "channels": channels,
            "size": math.isqrt(shapes["pos_embed"][1]) * patch,
            "patch": patch,
            "width": width,
            "depth": 2 * count("en_inblocks") + count("de_blocks") if skips else count("blocks"),
            "decoder": count("de_blocks") if skips else DECODER,
            "heads": shapes["sideblocks.0.attn.rel_pos_bias.relative_position_bias_table"][1],
            "classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
            "learned_sigma": rows == 2 * channels * patch**2,
            "skips": skips,
            "masked": [0.3, 0.5] if skips else [0.3, 0.3],
        }
    except KeyError as error:
        raise ModelFileError(f"{what} is no whole MDT, as {error} says: fetch it again.") from None
    except (ValueError, IndexError, StopIteration):
        raise ModelFileError(f"{what} has tensors of shapes that no MDT has; check it.") from None


def table(backbone: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Their names -> ours, for a backbone's config as plain data."""
    depth, decoder = backbone["depth"], backbone["decoder"]
    if not 0 < decoder < depth <= LAYERS:
        raise ModelFileError(f"a decoder of {decoder} of {depth} blocks is none that Reverie reads.")
    half = (depth - decoder) // 2
    stacks = [("en_inblocks", half), ("en_outblocks", half), ("de_blocks", decoder)]
    theirs = [f"{stack}.{i}" for stack, blocks in stacks for i in range(blocks)]
    if not backbone["skips"]:
        theirs = [f"blocks.{i}" for i in range(depth)]
    named = {name: f"backbone.blocks.{i}" for i, name in enumerate(theirs)}
    rules = list(TABLE)
    if backbone["masked"] is not None:
        named["sideblocks.0"] = "backbone.interpolater"
        rules.append(Rule("mask_token", "backbone.missing", "i j d -> (i j d)", (("i", 1), ("j", 1))))
    place = partial(distances, backbone["size"] // backbone["patch"])
    for one, ours in named.items():
        rules += (Rule(f"{one}.{a}", f"{ours}.{b}") for a, b in BLOCK)
        rules.append(Rule(f"{one}.{INDEX}", (), value=place))
    return tuple(rules)


INDEX = "attn.rel_pos_bias.relative_position_index"  # stored, though it follows from the size
BLOCK = (
    ("adaLN_modulation.1.{p}", "inner.modulation.{p}"),
    ("attn.qkv.{p}", "inner.attention.qkv.{p}"),
    ("attn.proj.{p}", "inner.attention.out.{p}"),
    ("attn.rel_pos_bias.relative_position_bias_table", "scores"),
    ("mlp.fc1.{p}", "inner.mlp.up.{p}"),
    ("mlp.fc2.{p}", "inner.mlp.down.{p}"),
    ("skip_linear.{p}", "join.{p}"),
)
TABLE = (
    *(
        Rule(theirs, f"backbone.{ours}")
        for theirs, ours in (
            ("x_embedder.proj.{p}", "embed.{p}"),
            ("t_embedder.mlp.{i}.{p}", "time.{i}.{p}"),
            ("y_embedder.embedding_table.weight", "classes.weight"),
            ("final_layer.adaLN_modulation.1.{p}", "modulation.{p}"),
            ("final_layer.linear.{p}", "out.{p}"),
        )
    ),
    *(
        Rule(theirs, f"backbone.{ours}", "i n d -> (i n) d", (("i", 1),))
        for theirs, ours in (("pos_embed", "places"), ("decoder_pos_embed", "decoder_places"))
    ),
)
