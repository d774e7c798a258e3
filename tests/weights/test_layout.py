"""Folders of strangers in public formats: refused in one sentence before they cost time or memory."""

import json
import time

import pytest
import torch

import reverie
from reverie.backbones.dit import DitConfig
from reverie.backbones.wan import WanDitConfig
from reverie.codecs.vae import VaeConfig
from reverie.errors import InputError
from reverie.weights import dit_original, files
from reverie.weights.files import Entry, ModelFileError

HOSTILE = {
    "layers of DiT": ({"_class_name": "DiTTransformer2DModel", "num_layers": 2**24 - 1}, "num_layers"),
    "blocks of Wan's codec": ({"_class_name": "AutoencoderKLWan", "num_res_blocks": 2**24 - 1}, "num_res_blocks"),
    "stages of Wan's codec": (
        {"_class_name": "AutoencoderKLWan", "dim_mult": [1] * 10_000, "temperal_downsample": [True] * 9_999},
        "dim_mult",
    ),
}  # fmt: skip


@pytest.mark.hostile
@pytest.mark.parametrize("case", HOSTILE)
def test_no_config_makes_a_table_without_end(case, tmp_path):
    record, said = HOSTILE[case]
    (tmp_path / "config.json").write_text(json.dumps(record))
    files.write(tmp_path / "diffusion_pytorch_model.safetensors", {"a": torch.zeros(1)})
    start = time.process_time()
    with pytest.raises(ModelFileError, match=said):
        reverie.load(tmp_path)
    assert time.process_time() - start < 1


@pytest.mark.hostile
def test_places_of_nothing_are_not_computed(monkeypatch):
    """A tensor without numbers may claim any shape: places for it would take 154 GB."""
    monkeypatch.setattr(dit_original, "places", None)
    shapes = {
        "x_embedder.proj.weight": (384, 4, 2, 2), "pos_embed": (1, 2**24, 0), "final_layer.linear.weight": (32, 384),
        "y_embedder.embedding_table.weight": (11, 384),
        **{f"blocks.{i}.attn.qkv.weight": (1152, 384) for i in range(12)},
    }  # fmt: skip
    entries = {
        name: Entry(dtype=torch.float32, shape=shape, begin=0, end=0) for name, shape in shapes.items()
    }
    with pytest.raises(ModelFileError, match="places of shape"):
        dit_original.read_alone(entries, None, what="DiT")


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (DitConfig, {"heads": 0}),
        (DitConfig, {"patch": 0}),
        (WanDitConfig, {"heads": 0}),
        (WanDitConfig, {"clock": 0}),
        (VaeConfig, {"groups": 0}),
        (VaeConfig, {"widths": ()}),
    ],
)
def test_no_size_of_a_config_is_divided_by_unseen(config, wrong):
    with pytest.raises(InputError):
        config(**wrong)
