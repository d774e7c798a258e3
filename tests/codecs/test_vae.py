"""The picture autoencoder: what needs no reference. tests/reference has its numbers against diffusers."""

import pytest
import torch

from reverie.codecs import vae
from reverie.codecs.vae import VAES, Vae, VaeConfig, double_conv, norm_conv, tiled
from reverie.errors import InputError
from reverie.planning.counting import on_shapes

SMALL = VaeConfig(widths=(16, 32), depth=1, groups=8, attention=1)


# Counted on the published files; of latent diffusion's own, by its code.
@pytest.mark.parametrize(
    ("name", "parameters", "stride"),
    [("sd", 83_653_863, 8), ("sdxl", 83_653_863, 8), ("sd3", 83_819_683, 8), ("flux", 83_819_683, 8)],
)
def test_published_sizes(name, parameters, stride):
    with on_shapes():
        model = Vae(VAES[name])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.stride == stride


@pytest.mark.parametrize(
    ("name", "stride", "channels"), [("kl-f4", 4, 3), ("kl-f8", 8, 4), ("kl-f16", 16, 16), ("kl-f32", 32, 64)]
)
def test_the_zoo_of_latent_diffusion(name, stride, channels):
    with on_shapes():
        model = Vae(VAES[name])
        shape = model.encode(torch.empty(2, 3, 64, 128)).shape
    assert shape == (2, channels, 64 // stride, 128 // stride) == (2, *model.latent_shape((64, 128)))


def test_rows_and_halves_change_nothing(monkeypatch):
    torch.manual_seed(0)
    norm, conv = torch.nn.GroupNorm(4, 8, eps=1e-6), torch.nn.Conv2d(8, 12, 3, padding=1)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, onto = torch.randn(2, 8, 13, 9) + 3, torch.randn(2, 12, 13, 9)
    whole, added, doubled = (
        norm_conv(x, norm, conv),
        norm_conv(x, norm, conv, onto=onto),
        double_conv(x, conv),
    )
    monkeypatch.setattr(vae, "SLAB", 2 * 8 * 9 * 4)
    with torch.no_grad():
        assert torch.allclose(norm_conv(x.clone(), norm, conv), whole, atol=1e-5)
        assert torch.allclose(norm_conv(x.clone(), norm, conv, onto=onto.clone()), added, atol=1e-5)
        assert torch.allclose(double_conv(x, conv), doubled, atol=1e-5)


def test_encoding_does_not_change_the_picture_and_items_do_not_meet(monkeypatch):
    monkeypatch.setattr(vae, "TOGETHER", 1)
    model = Vae(SMALL).eval()
    image = torch.randn(3, 3, 16, 24)
    kept = image.clone()
    with torch.no_grad():
        latents = model.encode(image)
        pictures = model.decode(latents)
        assert torch.allclose(model.decode(latents[1:2]), pictures[1:2])
    assert torch.equal(image, kept)
    assert torch.allclose(model.encode(image), latents, atol=1e-5)
    assert torch.allclose(model.decode(latents), pictures, atol=1e-5)


def test_normalised_latents_are_those_of_the_posterior():
    model = Vae(VaeConfig(widths=(16, 32), depth=1, groups=8, scale=0.5, shift=0.25)).eval()
    image = torch.randn(1, 3, 16, 16)
    mean, log_variance = model.posterior(image)
    assert torch.allclose(model.encode(image), (mean - 0.25) * 0.5)
    noise = torch.randn_like(mean)
    sampled = (mean + noise * (0.5 * log_variance).exp() - 0.25) * 0.5
    assert torch.allclose(model.encode(image, noise=noise), sampled)


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (37, 64)])
def test_tiles_of_what_is_local_are_the_whole(size):
    """A function that sees no neighbour is not changed by tiles, whatever their blending; nor is a constant."""
    x = torch.randn(2, 3, *size)
    assert torch.allclose(
        tiled(lambda part: 2 * part + 1, x, side=16, unit=1, factor=1), 2 * x + 1, atol=1e-6
    )
    doubled = tiled(
        lambda part: part.repeat_interleave(2, -1).repeat_interleave(2, -2), x, side=16, unit=1, factor=2
    )
    assert torch.allclose(doubled, x.repeat_interleave(2, -1).repeat_interleave(2, -2), atol=1e-6)


def test_tiles_blend_without_a_seam():
    """Two tiles of different brightness: the change is spread over the overlap, in equal steps."""
    brightness = iter((0.0, 1.0))
    line = tiled(
        lambda part: part * 0 + next(brightness), torch.zeros(1, 1, 16, 28), side=16, unit=1, factor=1
    )[0, 0, 0]
    steps = line.diff()
    assert line[0] == 0
    assert line[-1] == 1
    assert steps.min() >= 0
    assert steps.max() <= 1.01 / 4


def test_large_pictures_in_tiles_are_near_the_whole():
    torch.manual_seed(0)
    model = Vae(SMALL).eval()
    with torch.no_grad():
        image = torch.rand(1, 3, 64, 48).mul(2).sub(1)
        whole = model.encode(image)
        assert (model.encode(image, tile=32) - whole).norm() / whole.norm() < 0.3
        assert torch.equal(model.encode(image, tile=64), whole)
        assert torch.equal(model.decode(whole, tile=64), model.decode(whole))
        assert model.decode(whole, tile=32).shape == image.shape


def test_what_cannot_be_taken_is_refused():
    model = Vae(SMALL)
    for wrong in (torch.zeros(1, 3, 15, 16), torch.zeros(1, 4, 16, 16), torch.zeros(3, 16, 16)):
        with pytest.raises(InputError):
            model.encode(wrong)
    with pytest.raises(InputError):
        model.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(InputError):
        VaeConfig(widths=(10, 20))
    with pytest.raises(InputError):
        model.decode(torch.zeros(1, 4, 20, 20), tile=2)


@pytest.mark.parametrize("tile", [0, 15, 1])
def test_a_tile_that_holds_parts_of_latents_is_refused(tile):
    model = Vae(SMALL).eval()
    with pytest.raises(InputError, match=f"tile {tile} cannot be drawn: give a multiple of 2"):
        model.decode(torch.zeros(1, model.channels, 16, 16), tile=tile)
