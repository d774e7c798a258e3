"""The image tower: shapes, and that a picture's features are its own."""

import pytest
import torch

from reverie.encoders.vit import Vit, VitConfig, conv_stem
from reverie.errors import InputError

SMALL = {"size": 32, "patch": 16, "width": 16, "depth": 2, "heads": 2}
KINDS = [
    {"stem": stem, "pool": pool} for stem in ("patch", "conv") for pool in ("class", "mean", "attention")
]


def tower(**kind):
    torch.manual_seed(0)
    return Vit(VitConfig(**SMALL | kind)).eval()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
@torch.no_grad()
def test_features_and_their_vector(kind):
    vit = tower(**kind)
    image = torch.randn(3, 3, 32, 32)
    features = vit(image)
    assert features.shape == (3, 4 + (kind["pool"] == "class"), 16)
    if kind["pool"] != "attention":
        vector = features[:, 0] if kind["pool"] == "class" else features.mean(1)
        torch.testing.assert_close(vit.pool(features), vector)
    for i in range(3):  # a picture's features do not depend on the rest of the batch
        torch.testing.assert_close(vit(image[i : i + 1])[0], features[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
def test_every_part_of_the_picture_and_every_parameter_matters(kind):
    vit = tower(**kind)
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    (vit.pool(vit(image)) * torch.randn(16)).sum().backward()
    assert (image.grad.abs().sum((0, 1)) > 0).all()
    for name, parameter in vit.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_where_a_patch_stands_matters():
    vit = tower(pool="mean")
    image = torch.randn(1, 3, 32, 32)
    swapped = image.flip(-1)
    swapped = torch.cat(
        [swapped[..., :16].flip(-1), swapped[..., 16:].flip(-1)], -1
    )  # left and right patch swapped
    assert swapped[..., :16].equal(image[..., 16:])
    assert not torch.allclose(vit.pool(vit(image)), vit.pool(vit(swapped)), atol=1e-3)
    torch.nn.init.zeros_(vit.positions)  # and only the positions tell
    torch.testing.assert_close(vit.pool(vit(image)), vit.pool(vit(swapped)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch", [4, 8, 16, 32])
def test_the_conv_stem_divides_by_its_patch(patch):
    out = conv_stem(24, patch)(torch.randn(2, 3, 64, 96))
    assert out.shape == (2, 24, 64 // patch, 96 // patch)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 40, "stem": "conv"}, "40"),
        ({"size": 8}, "8"),
        ({"stem": "conv", "patch": 12, "size": 24}, "12"),
        ({"stem": "conv", "patch": 2, "size": 24}, "2"),
        ({"width": 15}, "15"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        Vit(VitConfig(**SMALL | change))


@torch.no_grad()
def test_attention_pooling_does_not_care_for_the_order_of_features():
    vit = tower(pool="attention")
    features = torch.randn(2, 4, 16)
    assert vit.pool(features).shape == (2, 16)
    torch.testing.assert_close(vit.pool(features[:, [2, 0, 3, 1]]), vit.pool(features))
    assert not torch.allclose(vit.pool(features + 1), vit.pool(features), atol=1e-3)


@torch.no_grad()
def test_registers_take_part_and_leave_no_features():
    plain, own = tower(), tower(registers=3)
    own.load_state_dict(own.state_dict() | plain.state_dict())
    image = torch.randn(2, 3, 32, 32)
    assert own(image).shape == plain(image).shape
    assert not torch.allclose(own(image), plain(image), atol=1e-3)
    own.registers[[0, 2]] = own.registers[[2, 0]]  # they have no places
    features = own(image)
    own.registers[[0, 2]] = own.registers[[2, 0]]
    torch.testing.assert_close(own(image), features)


@torch.no_grad()
def test_pixels_beyond_the_last_whole_patch_are_not_seen():
    torch.manual_seed(0)
    vit = Vit(VitConfig(**SMALL | {"size": 39})).eval()
    image = torch.randn(1, 3, 39, 39)
    other = image.clone()
    other[..., 32:, :] = 0
    other[..., 32:] = 0
    assert torch.equal(vit(image), vit(other))
    assert vit(image).shape == (1, 5, 16)


@pytest.mark.parametrize("kind", [*KINDS, {"registers": 2}], ids=str)
@torch.no_grad()
def test_the_vector_is_what_pooling_the_features_gives(kind):
    vit = tower(**kind)
    image = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(vit.embed(image), vit.pool(vit(image)), atol=1e-5, rtol=1e-5)


def masked_out(vit, image, keep):
    """The reference for `keep`: all tokens are computed, those that are dropped are hidden from attention."""
    real = torch.zeros(len(image), vit.config.patches, dtype=torch.bool).scatter_(1, keep, True)
    has_class = vit.class_token is not None
    ones = torch.ones(len(image), vit.config.registers, dtype=torch.bool)
    seen = torch.cat([ones.new_ones(len(image), int(has_class)), real, ones], dim=1)
    x, length = vit._tokens(image, None)
    for block in vit.blocks:
        x = block(x, mask=seen[:, None, None])
    features = vit.norm_post(x[:, :length])
    stay = keep + has_class
    if has_class:
        stay = torch.cat([torch.zeros_like(keep[:, :1]), stay], dim=1)
    return features[torch.arange(len(image))[:, None], stay]


@pytest.mark.parametrize("kind", [*KINDS, {"registers": 2}, {"registers": 2, "pool": "mean"}], ids=str)
def test_a_dropped_patch_is_one_that_nobody_attends_to(kind):
    vit = tower(size=48, **kind)
    image = torch.randn(3, 3, 48, 48)
    keep = torch.stack([torch.randperm(9)[:4].sort().values for _ in range(3)])
    lengths = []
    hook = vit.blocks[0].register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    features = vit(image, keep)
    hook.remove()
    assert lengths == [4 + (vit.class_token is not None) + vit.config.registers]  # really shorter
    expected = masked_out(vit, image, keep)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vit.embed(image, keep), vit.pool(expected), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(vit.embed(image, keep), vit.embed(image), atol=1e-3)
    if vit.config.stem == "patch":  # and its pixels reach nothing
        image.requires_grad_(True)
        (vit.embed(image, keep) * torch.randn(16)).sum().backward()
        grid = image.grad.unflatten(3, (3, 16)).unflatten(2, (3, 16)).abs().sum((1, 3, 5)).flatten(1)
        assert torch.equal((grid > 0), torch.zeros_like(grid, dtype=torch.bool).scatter_(1, keep, True))


@pytest.mark.parametrize("kind", [*KINDS, {"registers": 2}], ids=str)
@torch.no_grad()
def test_all_patches_kept_is_the_plain_tower(kind):
    vit = tower(**kind)
    image = torch.randn(3, 3, 32, 32)
    every = torch.arange(4).expand(3, 4)
    assert torch.equal(vit.embed(image, every), vit.embed(image))
    assert torch.equal(vit(image, every), vit(image))
