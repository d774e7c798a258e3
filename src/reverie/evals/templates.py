"""Prompt ensembles: lists of sentences with `{}` where a name goes.

`openai` are the 80 sentences for ImageNet of CLIP's repository (github.com/openai/CLIP, MIT licence, Copyright (c)
2021 OpenAI; notebooks/Prompt_Engineering_for_ImageNet.ipynb), written here by what they are made of: most stand once
with "a" and once with "the". `simple` are the seven of them that the notebook's forward selection keeps. Their use:
CLIP (2103.00020), section 3.1.4, where the ensemble gains 3.5 points on ImageNet over one sentence.
"""

from __future__ import annotations

from reverie.errors import InputError

_LOOKS = ("bad", "low resolution", "cropped", "bright", "dark", "close-up", "black and white", "pixelated",
          "jpeg corrupted", "blurry", "good")  # fmt: skip
_KINDS = ("hard to see", "clean", "dirty", "cool", "nice", "large", "small", "weird")
_WORKS = ("a sculpture of", "a rendering of", "graffiti of", "a tattoo of", "a drawing of", "a painting of",
          "a doodle of", "a sketch of", "a rendition of", "art of", "itap of", "a photo of")  # fmt: skip
_MADE = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")

_OPENAI = (
    *(f"a {look} photo of {one} {{}}." for look in _LOOKS for one in ("a", "the")),
    *(f"a photo of {one} {kind} {{}}." for kind in _KINDS for one in ("a", "the")),
    *(f"{work} {one} {{}}." for work in _WORKS for one in ("a", "the")),
    *(f"{one} {made} {{}}." for made in _MADE for one in ("a", "the")),
    *(f"{one} {{}} in a video game." for one in ("a", "the")),
    "a photo of many {}.", "a photo of one {}.", "a photo of my {}.", "itap of my {}.",
)  # fmt: skip

ENSEMBLES: dict[str, tuple[str, ...]] = {
    "openai": _OPENAI,
    "simple": (
        "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
        "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
    ),
}  # fmt: skip


def ensemble(name: str) -> tuple[str, ...]:
    """The sentences of a named ensemble."""
    if name not in ENSEMBLES:
        raise InputError(
            f"there is no ensemble {name!r}: the ensembles are {', '.join(ENSEMBLES)}; or write your own templates."
        )
    return ENSEMBLES[name]
