"""MDT's network: sizes, a masked pass that computes what stays, an interpolater that whole passes never ask."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reverie.backbones.dit import Modulations
from reverie.backbones.mdt import MDT_MODELS, SPARE, Mdt, MdtBlock, MdtConfig, distances
from reverie.errors import InputError
from reverie.planning.counting import on_shapes

SMALL = MdtConfig(size=8, width=32, depth=6, decoder=2, heads=4, classes=5)
FIRST = dataclasses.replace(SMALL, skips=False, masked=(0.3, 0.3))


def moved(config=SMALL):
    """A network with random weights everywhere."""
    torch.manual_seed(0)
    model = Mdt(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def asked(count=3):
    torch.manual_seed(1)
    x = torch.randn(count, 4, 8, 8)
    keep = torch.stack([torch.randperm(16)[:9] for _ in range(count)])
    return x, torch.tensor([0.0, 400.0, 999.0])[:count], torch.tensor([1, 4, 5])[:count], keep


# Of the authors' code for 32 x 32 latents: what is learned, the table of scores with its unread rows included.
PUBLISHED = {
    "MDT-S/2": 35_797_208, "MDT-S/4": 35_647_736, "MDT-S/8": 35_818_712,
    "MDT-B/2": 141_488_528, "MDT-B/4": 141_189_488, "MDT-B/8": 141_531_056,
    "MDT-L/2": 477_641_312, "MDT-L/4": 477_101_248, "MDT-L/8": 477_522_752,
    "MDT-XL/2": 699_778_144, "MDT-XL/4": 699_160_256, "MDT-XL/8": 699_631_936,
    "MDTv2-S/2": 38_454_872, "MDTv2-B/2": 150_931_856, "MDTv2-L/2": 507_015_776, "MDTv2-XL/2": 742_263_904,
}  # fmt: skip


def test_named_sizes_are_the_published_ones():
    assert PUBLISHED.keys() == MDT_MODELS.keys()
    for name, config in MDT_MODELS.items():
        with on_shapes():
            assert sum(p.numel() for p in Mdt(config).parameters()) == PUBLISHED[name], name


def test_a_new_network_says_nothing_and_begins_at_dits_places():
    model = Mdt(SMALL)
    x, t, classes, keep = asked()
    for out in (model(x, t, classes), model(x, t, classes, keep=keep)):
        assert out.shape == (3, 8, 8, 8)
        assert not out.any()
    assert torch.equal(model.places, model.decoder_places)
    assert model.places.requires_grad


@pytest.mark.parametrize("config", [SMALL, FIRST], ids=["version 2", "version 1"])
def test_a_masked_pass_sees_what_stays_alone(config):
    model = moved(config)
    x, t, classes, keep = asked()
    out = model(x, t, classes, keep=keep)
    away = torch.ones(3, 16, dtype=torch.bool).scatter(1, keep, False)
    changed = x + 5 * away.reshape(3, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    if (
        not config.skips
    ):  # in version 2 the decoder reads the patches that came in, so that it can say their noise
        assert torch.allclose(model(changed, t, classes, keep=keep), out, atol=1e-5)
    # The order in which patches are named is nothing.
    mixed = torch.stack([row[torch.randperm(9)] for row in keep])
    assert torch.allclose(model(x, t, classes, keep=mixed), out, atol=1e-4)
    for i in range(3):  # an item alone
        alone = model(x[i : i + 1], t[i : i + 1], classes[i : i + 1], keep=keep[i : i + 1])
        assert torch.allclose(alone, out[i : i + 1], atol=1e-4)
    # With nothing missing it is the whole pass.
    every = torch.arange(16).expand(3, -1)
    assert torch.allclose(model(x, t, classes, keep=every), model(x, t, classes), atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, FIRST], ids=["version 2", "version 1"])
def test_the_encoder_computes_what_stays_alone(config):
    model = moved(config)
    seen = []
    for block in (*model.blocks, model.interpolater):
        block.inner.mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    x, t, classes, keep = asked()
    model(x, t, classes, keep=keep)
    assert seen == [9] * 4 + [16] * 3
    seen.clear()
    model(x, t, classes)
    assert seen == [16] * 6

    def flops(**more):
        with FlopCounterMode(display=False) as found, torch.no_grad():
            model(x, t, classes, **more)
        return found.get_total_flops()

    part = 1 + (1 - 7 * 4 / 16) / 6  # seven of sixteen patches less in four blocks, one block more
    assert flops(keep=keep) / flops() == pytest.approx(part, abs=0.06)


def test_what_stays_goes_past_the_interpolater():
    """With a decoder that is the identity, what stayed is what the encoder made of it, and places."""
    model = moved(FIRST)
    filled = []
    model.blocks[4].register_forward_pre_hook(lambda _, args: filled.append(args[0]))
    made = []
    model.blocks[3].register_forward_hook(lambda _, __, out: made.append(out))
    x, t, classes, keep = asked()
    model(x, t, classes, keep=keep)
    for i in range(3):
        assert torch.equal(filled[0][i, keep[i]], made[0][i] + model.decoder_places[keep[i]])
    with torch.no_grad():
        model.missing.add_(1)
    model(x, t, classes, keep=keep)
    for i in range(3):
        assert torch.equal(filled[1][i, keep[i]], filled[0][i, keep[i]])
        gone = [n for n in range(16) if n not in keep[i].tolist()]
        assert (filled[1][i, gone] - filled[0][i, gone]).abs().amax(-1).min() > 0.1


def test_without_the_interpolater_whole_passes_stay_as_they_are():
    model = moved()
    x, t, classes, keep = asked()
    before = model(x, t, classes)
    count = len(model.state_dict())
    model.drop_interpolater()
    assert torch.equal(model(x, t, classes), before)
    assert len(model.state_dict()) < count
    assert model.state_dict().keys() == Mdt(model.config).state_dict().keys()
    assert model.config.masked is None
    with pytest.raises(AttributeError):
        model(x, t, classes, keep=keep)


def test_every_parameter_learns():
    model = moved()
    x, t, classes, keep = asked()
    (model(x, t, classes, keep=keep) ** 2).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_modulations_for_all_steps_are_those_of_each():
    model = moved()
    x, _, classes, _ = asked()
    modulations = Modulations(model, [999.0, 7.0], classes)
    for t in (999.0, 7.0):
        one = model(x, torch.full((3,), t), classes)
        assert torch.allclose(model(x, modulations=modulations.at(t)), one, atol=1e-4)


def test_distances_are_those_of_a_grid():
    found = distances(3)
    for i in range(9):
        for j in range(9):
            down, right = i // 3 - j // 3, i % 3 - j % 3
            assert found[i, j] == (down + 2) * 5 + right + 2
    block = MdtBlock(MdtConfig(size=3, patch=1, depth=3, decoder=1, width=8, heads=2))
    assert block.scores.shape == (found.max() + 1 + SPARE, 2)


@pytest.mark.parametrize(
    "wrong", [{"decoder": 0}, {"decoder": 6}, {"decoder": 3}, {"masked": (0.5, 0.3)}, {"masked": (0.3, 1.0)},
              {"heads": 5}, {"size": 9}, {"width": 0}],
)  # fmt: skip
def test_what_cannot_be(wrong):
    with pytest.raises(InputError):
        dataclasses.replace(SMALL, **wrong)
