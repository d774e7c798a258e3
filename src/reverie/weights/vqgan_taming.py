"""The autoencoder with a learned codebook <- the names of taming-transformers' VQGAN, and of latent diffusion's VQ.

https://github.com/CompVis/taming-transformers/blob/master/taming/models/vqgan.py

Their networks are those of latent diffusion's autoencoder, and so are the names. What was stored beside them, the
discriminator and the network of the perceptual loss, is left.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from reverie.weights.files import Entry, ModelFileError
from reverie.weights.layout import Foreign
from reverie.weights.remap import Rule
from reverie.weights.vae_diffusers import PREFIX, original_table

BOOKS = ("quantize.embedding.weight", "quantize.embed.weight")  # by the nearest vector, and by logits


def is_theirs(entries: Collection[str]) -> bool:
    return any(f"{prefix}{book}" in entries for prefix in ("", PREFIX) for book in BOOKS)


def read_alone(entries: Mapping[str, Entry], config: Mapping[str, Any] | None, *, what: str) -> Foreign:
    """From a checkpoint's header: the shapes say everything but the groups of the normalisation, which are 32."""
    prefix = PREFIX if any(f"{PREFIX}{book}" in entries for book in BOOKS) else ""
    shapes = {
        name.removeprefix(prefix): one.shape for name, one in entries.items() if name.startswith(prefix)
    }

    def count(start: str) -> int:
        number = 0
        while any(name.startswith(f"{start}.{number}.") for name in shapes):
            number += 1
        return number

    by_logits = BOOKS[1] in shapes
    book = BOOKS[by_logits]
    try:
        levels = count("encoder.down")
        values = {
            "vocab": shapes[book][0],
            "dim": shapes[book][1],
            "channels": shapes["encoder.conv_out.weight"][0],
            "widths": [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)],
            "depth": count("encoder.down.0.block"),
            "attention": sum(f"encoder.down.{i}.attn.0.norm.weight" in shapes for i in range(levels)),
            "middle": "encoder.mid.attn_1.norm.weight" in shapes,
            "choice": "argmax" if by_logits else "nearest",
        }
    except (KeyError, IndexError):
        raise ModelFileError(f"{what} lacks parts of a VQGAN; fetch it again.") from None
    known = ("encoder", "decoder", "quant_conv", "post_quant_conv", "quantize")
    others = tuple(
        name for name in entries if not name.startswith(tuple(f"{prefix}{part}." for part in known))
    )
    return Foreign(
        system="vq", values=dict(config) if config else values, table=table(levels, prefix, by_logits=by_logits),
        ignore=others,
    )  # fmt: skip


def table(levels: int, prefix: str = "", *, by_logits: bool = False) -> tuple[Rule, ...]:
    """Their names -> ours."""
    book = (Rule(f"{prefix}{BOOKS[by_logits]}", "codebook"),)
    choose = (Rule(f"{prefix}quantize.proj.{{p}}", "choose.{p}"),) if by_logits else ()
    return (*original_table(levels, prefix), *book, *choose)
