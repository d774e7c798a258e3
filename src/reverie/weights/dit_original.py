"""DiT and SiT <- the names of their authors' code, which are the same for both.

https://github.com/facebookresearch/DiT/blob/main/models.py
https://github.com/willisma/SiT/blob/main/models.py
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor

from reverie.backbones.dit import SCALES, places
from reverie.weights.files import Entry, ModelFileError
from reverie.weights.layout import Foreign
from reverie.weights.remap import Rule

POSITIONS = "pos_embed"  # stored, though it follows from the size
HEADS = {(depth, width): heads for depth, width, heads in SCALES.values()}


def is_theirs(entries: Collection[str]) -> bool:
    """Whether a file has the names of DiT's or SiT's authors."""
    return {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", POSITIONS} <= set(entries)


def read_alone(
    entries: Mapping[str, Entry],
    config: Mapping[str, Any] | None,
    *,
    what: str,
) -> Foreign:
    """From a checkpoint's header: `config`, of the system as plain data, or what the shapes say.

    Names and shapes do not say whether a file is DiT's or SiT's: the config or the file's own name, `what`, must. They
    say the heads of the published sizes alone. A checkpoint has no autoencoder: the model draws latents until it is
    given one (`attach`). As in the authors' code guidance moves three channels.
    """
    if config is not None:
        system = "sit" if "diffusion" in config else "dit"
        backbone = config["backbone"]
    else:
        named = [name for name in ("dit", "sit") if name in what.lower()]
        if len(named) != 1:
            raise ModelFileError(
                f"{what} may be DiT's or SiT's, whose names are the same: give config=, or call the file DiT or SiT."
            )
        system = named[0]
        try:
            shapes = {name: entry.shape for name, entry in entries.items()}
            width, channels, patch, _ = shapes["x_embedder.proj.weight"]
            depth = 0
            while f"blocks.{depth}.attn.qkv.weight" in shapes:
                depth += 1
            rows = shapes["final_layer.linear.weight"][0]
            grid = math.isqrt(shapes[POSITIONS][1])
            backbone = {
                "channels": channels,
                "size": grid * patch,
                "patch": patch,
                "width": width,
                "depth": depth,
                "heads": HEADS[depth, width],
                "classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
                "learned_sigma": rows == 2 * channels * patch**2,
            }
        except KeyError as error:
            raise ModelFileError(
                f"{what} is no {system.upper()} of a published size, as {error} says: give config=."
            ) from None
        except (ValueError, IndexError):
            raise ModelFileError(
                f"{what} has tensors of shapes that no {system.upper()} has; check it."
            ) from None
    values = {"backbone": backbone, "guided_channels": 3} if config is None else dict(config)
    grid, width = backbone["size"] // backbone["patch"], backbone["width"]
    if entries[POSITIONS].shape != (1, grid**2, width):
        raise ModelFileError(
            f"{what} has places of shape {entries[POSITIONS].shape}; a grid of {grid} x {grid} in width {width} has"
            f" {(1, grid**2, width)}."
        )
    table = (*TABLE, Rule(POSITIONS, (), value=partial(_positions, grid, width)))
    return Foreign(system=system, values=values, table=table)


def _positions(grid: int, width: int) -> Tensor:
    return rearrange(places(grid, grid, width, grid=grid), "n d -> 1 n d")


BLOCK = "blocks.{i}"
TABLE = tuple(
    Rule(theirs, f"backbone.{ours}")
    for theirs, ours in (
        ("x_embedder.proj.{p}", "embed.{p}"),
        ("t_embedder.mlp.{i}.{p}", "time.{i}.{p}"),
        ("y_embedder.embedding_table.weight", "classes.weight"),
        (f"{BLOCK}.adaLN_modulation.1.{{p}}", f"{BLOCK}.modulation.{{p}}"),
        (f"{BLOCK}.attn.qkv.{{p}}", f"{BLOCK}.attention.qkv.{{p}}"),
        (f"{BLOCK}.attn.proj.{{p}}", f"{BLOCK}.attention.out.{{p}}"),
        (f"{BLOCK}.mlp.fc1.{{p}}", f"{BLOCK}.mlp.up.{{p}}"),
        (f"{BLOCK}.mlp.fc2.{{p}}", f"{BLOCK}.mlp.down.{{p}}"),
        ("final_layer.adaLN_modulation.1.{p}", "modulation.{p}"),
        ("final_layer.linear.{p}", "out.{p}"),
    )
)
