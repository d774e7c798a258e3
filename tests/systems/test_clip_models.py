"""The published models: as many parameters as their tables say, counted on the meta device."""

import pytest
import torch

from reverie.systems.clip import Clip
from reverie.systems.clip_models import MODELS

# Millions, whole and of the image tower: open_clip's docs/model_profile.csv. SigLIP 2's is SigLIP's with 256,000 words.
PUBLISHED = {
    "RN50": (102.01, 38.32), "RN101": (119.69, 56.26), "RN50x4": (178.3, 87.14), "RN50x16": (290.98, 167.33),
    "RN50x64": (623.26, 420.38), "ViT-B-32": (151.28, 87.85), "ViT-B-16": (149.62, 86.19),
    "ViT-L-14": (427.62, 303.97), "ViT-L-14-336": (427.94, 304.29), "ViT-H-14": (986.11, 632.08),
    "ViT-g-14": (1366.68, 1012.65), "ViT-bigG-14": (2539.57, 1844.91), "ViT-B-16-SigLIP": (203.16, 92.88),
    "ViT-B-16-SigLIP2": (203.16 + 224_000 * 768 / 1e6, 92.88),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    with torch.device("meta"):
        clip = Clip(MODELS[name])
    count = {
        part: sum(p.numel() for n, p in clip.named_parameters() if n.startswith(part))
        for part in ("", "image")
    }
    whole, image = PUBLISHED[name.removesuffix("-quickgelu")]
    assert count[""] / 1e6 == pytest.approx(whole, abs=0.0051)
    assert count["image"] / 1e6 == pytest.approx(image, abs=0.0051)


def test_openais_use_quickgelu_and_nobody_else():
    assert {MODELS[f"{name}-quickgelu"].text.activation for name in ("RN50", "ViT-L-14-336")} == {
        "quick_gelu"
    }
    assert MODELS["ViT-B-32"].image.activation == MODELS["ViT-B-32"].text.activation == "gelu"
