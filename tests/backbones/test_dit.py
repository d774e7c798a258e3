"""The transformer of DiT: sizes as published, the identity at initialisation, any size of picture."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reverie.backbones.dit import DIT_MODELS, Dit, DitBlock, DitConfig, places
from reverie.errors import InputError
from reverie.planning.counting import on_shapes

SMALL = DitConfig(size=8, width=32, depth=2, heads=4, classes=5)
# 2212.09748, table 4: millions of parameters and Gflops, a multiplication and addition counted as one.
PUBLISHED = {
    "DiT-S/8": (33, 0.36), "DiT-S/4": (33, 1.41), "DiT-S/2": (32.96, 6.06),
    "DiT-B/8": (131, 1.42), "DiT-B/4": (130, 5.56), "DiT-B/2": (130.5, 23.01),
    "DiT-L/8": (459, 5.01), "DiT-L/4": (458, 19.70), "DiT-L/2": (458.1, 80.71),
    "DiT-XL/8": (676, 7.39), "DiT-XL/4": (675, 29.05), "DiT-XL/2": (675.1, 118.64),
}  # fmt: skip


def moved(config=SMALL):
    """A network with random weights everywhere."""
    torch.manual_seed(0)
    model = Dit(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    millions, flops = PUBLISHED[name]
    with on_shapes():
        model = Dit(DIT_MODELS[name])
    # They count the fixed positions among the parameters, which are computed here.
    stored = sum(p.numel() for p in model.parameters()) + (32 // model.config.patch) ** 2 * model.config.width
    assert stored / 1e6 == pytest.approx(millions, abs=0.6 if millions % 1 == 0 else 0.05)
    asked = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long)
    with FlopCounterMode(display=False) as found, torch.no_grad():
        model(*(part.to("meta") for part in asked))
    assert found.get_total_flops() / 2e9 == pytest.approx(flops, rel=0.02)
    assert DIT_MODELS[name.replace("DiT", "SiT")] == DIT_MODELS[name]


def test_a_new_block_is_the_identity_and_a_new_network_says_nothing():
    block, x = DitBlock(32, 4), torch.randn(3, 7, 32)
    torch.nn.init.zeros_(block.modulation.weight)
    torch.nn.init.zeros_(block.modulation.bias)
    assert torch.equal(block(x, torch.randn(3, 32)), x)
    out = Dit(SMALL)(torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert out.shape == (2, 8, 8, 8)
    assert not out.any()


def test_an_item_does_not_depend_on_its_batch():
    """One item alone is normalised by another operator than several."""
    model = moved()
    x, t, classes = (
        torch.randn(3, 4, 8, 12),
        torch.tensor([0.0, 10.0, 999.0]),
        torch.tensor([0, 4, model.null]),
    )
    together = model(x, t, classes)
    for i in range(3):
        assert torch.allclose(
            model(x[i : i + 1], t[i : i + 1], classes[i : i + 1]), together[i : i + 1], atol=2e-5
        )


def test_patches_come_back_where_they_were():
    """What one patch says reaches the others through attention alone."""
    model = moved()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)
    x = torch.randn(1, 4, 8, 12)
    changed = x.clone()
    changed[:, :, 2:4, 6:8] += 1
    time = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    difference = (model(changed, *time) - model(x, *time)).abs().amax(dim=(0, 1))
    assert difference[2:4, 6:8].min() > 0
    difference[2:4, 6:8] = 0
    assert difference.max() == 0


def test_places_lie_between_the_same_edges_at_every_size():
    few, many = places(4, 4, 32, grid=4), places(8, 8, 32, grid=4)
    assert torch.allclose(many.reshape(8, 8, 32)[::2, ::2].reshape(16, 32), few, atol=1e-6)
    wide = places(4, 8, 32, grid=4).reshape(4, 8, 32)
    assert torch.equal(
        wide[:, :, 16:], few.reshape(4, 4, 32)[:, :1, 16:].expand(4, 8, 16)
    )  # rows of a column
    assert len(places(5, 7, 32, grid=4).unique(dim=0)) == 35


@pytest.mark.parametrize("wrong", [{"width": 34}, {"heads": 5}, {"size": 9}])
def test_sizes_that_cannot_be(wrong):
    with pytest.raises(InputError):
        DitConfig(**({"size": 8, "width": 32, "heads": 4} | wrong))
