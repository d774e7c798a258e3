"""Our video autoencoder against diffusers' AutoencoderKLWan at small random weights, and Wan's original names."""

import json
from dataclasses import asdict

import pytest
import torch

from reverie.codecs.video_vae import VideoVae, VideoVaeConfig
from reverie.weights import remap, video_vae_wan
from reverie.weights.files import Entry, ModelFileError, expectation
from reverie.weights.layout import Foreign
from reverie.weights.store import config_from

pytestmark = pytest.mark.reference
SHAPES = {
    "4x8x8": {"base_dim": 8, "z_dim": 4, "num_res_blocks": 2},
    "1x8x8": {"base_dim": 8, "z_dim": 3, "num_res_blocks": 1, "temperal_downsample": [False, False, False]},
    "4x4x4": {
        "base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "dim_mult": [1, 3, 2], "temperal_downsample": [True, True],
    },
    "2x4x4, pixels folded": {
        "base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "dim_mult": [1, 2], "temperal_downsample": [True],
        "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_temporal": 2, "scale_factor_spatial": 4,
    },
}  # fmt: skip


def their_model(name):
    """Far from initialisation."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    z = SHAPES[name]["z_dim"]
    constants = {
        "latents_mean": [0.1 * i - 0.2 for i in range(z)],
        "latents_std": [0.5 + i for i in range(z)],
    }
    model = diffusers.AutoencoderKLWan(**SHAPES[name], **constants).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def record_of(model):
    return json.loads(model.to_json_string())


def ours_of(foreign: Foreign, tensors) -> VideoVae:
    made = VideoVae(config_from(VideoVaeConfig, foreign.values, where="config.json")).eval()
    made.load_state_dict(remap.apply(foreign.table, tensors, expected=expectation(made.state_dict())))
    return made


def near(mine, theirs):
    return (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
@pytest.mark.parametrize("name", SHAPES)
def test_equal_numbers_for_pictures_and_clips(name, frames):
    theirs = their_model(name)
    ours = ours_of(video_vae_wan.read(record_of(theirs)), theirs.state_dict())
    h, w = 3 * ours.stride[1], 2 * ours.stride[1]
    x = torch.rand(2, 3, frames, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, log_variance = ours.posterior(x)
    theirs_of = theirs.encode(x).latent_dist
    assert near(mean, theirs_of.mean)
    assert near(log_variance, theirs_of.logvar)
    wide = [
        torch.tensor(theirs.config[key]).reshape(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std")
    ]
    assert near(ours.encode(x), (theirs_of.mean - wide[0]) / wide[1])
    raw = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    drawn = theirs.decode(raw).sample  # which they clamp
    assert (drawn.abs() < 1).float().mean() > 0.2
    assert near(ours.draw(raw).clamp(-1, 1), drawn)


@pytest.mark.parametrize("name", SHAPES)
def test_the_way_back_is_bit_equal(name):
    theirs = their_model(name)
    record, tensors = record_of(theirs), theirs.state_dict()
    ours = ours_of(video_vae_wan.read(record), tensors)
    constants = {key: getattr(ours, key).tolist() for key in video_vae_wan.CONSTANTS}
    written, table = video_vae_wan.write(asdict(ours.config), constants)
    back = remap.apply(remap.invert(table), ours.state_dict(), expected=expectation(tensors))
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    again = remap.computed(video_vae_wan.read(written).table)
    assert again.keys() == set(video_vae_wan.CONSTANTS)
    for key, value in again.items():
        assert torch.equal(value, getattr(ours, key))
    made = type(theirs)(**{key: value for key, value in written.items() if key != "_class_name"})
    made.load_state_dict(back)


def entries_of(tensors):
    return {k: Entry(dtype=v.dtype, shape=tuple(v.shape), begin=0, end=0) for k, v in tensors.items()}


@torch.no_grad()
def test_the_original_names_say_the_same():
    """diffusers' own converter knows them; the shape is read from the tensors, the constants are the code's."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    torch.manual_seed(0)
    config = VideoVaeConfig(widths=(8, 16, 32, 32), temporal=(False, True, True), blocks=2, patch=1)
    vae = VideoVae(config)
    for parameter in vae.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours = vae.state_dict() | {
        "mean": torch.tensor(video_vae_wan.MEAN),
        "std": torch.tensor(video_vae_wan.STD),
    }
    table = video_vae_wan.table(asdict(config), original=True)
    original = remap.apply(remap.invert(table), ours, ignore=video_vae_wan.CONSTANTS)
    assert video_vae_wan.is_original(entries_of(original))
    foreign = video_vae_wan.read_alone(entries_of(original), what="Wan2.1_VAE.safetensors")
    again = ours_of(foreign, original)
    assert again.config == config
    assert all(torch.equal(value, ours[key]) for key, value in again.state_dict().items())

    constants = {key: value.tolist() for key, value in remap.computed(foreign.table).items()}
    record, table = video_vae_wan.write(asdict(config), constants)
    converted = single_file.convert_wan_vae_to_diffusers(original)
    assert not video_vae_wan.is_original(entries_of(converted))
    expected = remap.apply(remap.invert(table), ours)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in converted.items())
    assert record["latents_mean"] == list(video_vae_wan.MEAN)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"is_residual": True}, "is_residual"),
        ({"attn_scales": [1.0]}, "attn_scales"),
        ({"decoder_base_dim": 16}, "decoder_base_dim"),
        ({"patch_size": 2}, "in_channels"),
        ({"dim_mult": [2, 2, 4, 4]}, "dim_mult"),
        ({"dim_mult": 4}, "dim_mult"),
        ({"temperal_downsample": "no"}, "temperal_downsample"),
        ({"temperal_downsample": [True]}, "temperal_downsample"),
        ({"latents_std": [0.0] * 4}, "latents_std"),
        ({"latents_mean": [0.0] * 3}, "latents_mean"),
        ({"something_new": 1}, "something_new"),
    ],
)
def test_what_cannot_be_followed_is_refused(changed, said):
    record = record_of(their_model("4x8x8"))
    video_vae_wan.read(record)
    with pytest.raises(ModelFileError, match=said):
        video_vae_wan.read(record | changed)


def test_a_file_of_something_else_is_refused():
    config = asdict(VideoVaeConfig(widths=(4, 4), temporal=(True,), blocks=1, patch=1))
    table = remap.invert(video_vae_wan.table(config, original=True))
    names = remap.apply(
        table, VideoVae(VideoVaeConfig(**config)).state_dict(), ignore=video_vae_wan.CONSTANTS
    )
    found = video_vae_wan.read_alone(entries_of(names), what="it").values
    assert found == config | {"widths": [4, 4], "temporal": [True]}
    without = {key: value for key, value in names.items() if not key.startswith("encoder.downsamples.0.")}
    with pytest.raises(ModelFileError, match="no autoencoder of Wan"):
        video_vae_wan.read_alone(entries_of(without), what="it")
    other = names | {"conv2.weight": torch.zeros(5, 5, 1, 1, 1)}
    with pytest.raises(ModelFileError, match="latents_mean"):
        video_vae_wan.read_alone(entries_of(other), what="it")
    given = {"latents_mean": [0.0] * 5, "latents_std": [1.0] * 5}
    table = video_vae_wan.read_alone(entries_of(other), given, what="it").table
    assert torch.equal(remap.computed(table)["std"], torch.ones(5))
