"""Our picture autoencoder against diffusers' AutoencoderKL at small random weights, and its names before and beside."""

from dataclasses import asdict

import pytest
import torch

from reverie.codecs.vae import Vae, VaeConfig
from reverie.weights import files, remap, vae_diffusers
from reverie.weights.files import Entry, ModelFileError

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.reference

SHAPES = {
    "like Stable Diffusion": {},
    "like SD3: 16 channels, a shift, no convolutions around": {
        "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
    "attention at the lowest levels, one block each": {"attend": 2, "layers_per_block": 1},
    "no attention in the middle": {"mid_block_add_attention": False},
}  # fmt: skip


def their_vae(*, attend=0, **shape):
    torch.manual_seed(0)
    widths = (16, 32, 32)
    kinds = [i >= len(widths) - attend for i in range(len(widths))]
    model = diffusers.AutoencoderKL(**{
        "block_out_channels": widths, "layers_per_block": 2, "norm_num_groups": 8, "latent_channels": 4,
        "down_block_types": ["AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in kinds],
        "up_block_types": ["AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in kinds[::-1]],
        "sample_size": 512, **shape,
    }).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def record_of(model):
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()}
    return {key: value for key, value in plain.items() if not key.startswith("_")} | {
        "_class_name": "AutoencoderKL"
    }


def load(foreign, tensors):
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in foreign.values.items()}
    model = Vae(VaeConfig(**values)).eval()
    expected = files.expectation(model.state_dict())
    model.load_state_dict(remap.apply(foreign.table, tensors, expected=expected, ignore=foreign.ignore))
    return model


def ours_from(theirs):
    return load(vae_diffusers.read(record_of(theirs), list(theirs.state_dict())), theirs.state_dict())


def near(ours, theirs, most=1e-5):
    assert ours.shape == theirs.shape
    return (ours - theirs).norm() / theirs.norm() < most


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("slab", [2**22, 1500], ids=["whole maps", "by rows"])
def test_latents_pictures_and_gradients_are_equal(shape, slab, monkeypatch):
    monkeypatch.setattr("reverie.codecs.vae.SLAB", slab)
    theirs = their_vae(**shape)
    ours = ours_from(theirs)
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor or 0
    image = torch.randn(2, 3, 24, 36)
    with torch.no_grad():
        found = theirs.encode(image).latent_dist
        for one, other in zip(ours.posterior(image.clone()), (found.mean, found.logvar), strict=True):
            assert near(one, other)
        latents = (found.mean - shift) * scale
        assert near(ours.encode(image), latents)
        noise = torch.randn_like(latents)
        assert near(ours.encode(image, noise=noise), (found.mean + found.std * noise - shift) * scale)
        assert near(ours.decode(latents), theirs.decode(latents / scale + shift).sample)
    a, b = (latents.clone().requires_grad_() for _ in range(2))
    drawn, expected = ours.decode(a), theirs.decode(b / scale + shift).sample
    probe = torch.randn_like(expected)
    for out in (drawn, expected):
        (out * probe).sum().backward()
    assert near(drawn, expected)
    assert near(a.grad, b.grad, 1e-4)
    assert near(ours.decoder.stem.weight.grad, theirs.decoder.conv_in.weight.grad, 1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_way_back_is_bit_equal(shape):
    theirs = their_vae(**shape)
    ours = ours_from(theirs)
    record, table = vae_diffusers.write(asdict(ours.config))
    back = remap.apply(remap.invert(table), ours.state_dict())
    state = theirs.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert (
        diffusers.AutoencoderKL.from_config(record).config.items()
        >= {
            key: value
            for key, value in record_of(theirs).items()
            if key not in ("_class_name", "block_out_channels")
        }.items()
    )


def test_old_names_of_the_attention_are_read():
    theirs = their_vae()
    new, old = vae_diffusers.NAMES
    state = {}
    for name, tensor in theirs.state_dict().items():
        for now, before in zip(new, old, strict=True):
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{before}.")
        state[name] = tensor
    assert state.keys() != theirs.state_dict().keys()
    ours = load(vae_diffusers.read(record_of(theirs), list(state)), state)
    expected = ours_from(theirs).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("shape", [{}, SHAPES["like SD3: 16 channels, a shift, no convolutions around"]])
def test_latent_diffusions_names_are_read_as_diffusers_reads_them(prefix, shape):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    expected = ours_from(their_vae(**shape))
    table = vae_diffusers.original_table(3, prefix)
    checkpoint = remap.apply(remap.invert(table), expected.state_dict())
    converted = convert_ldm_vae_checkpoint(dict(checkpoint), record_of(their_vae(**shape)))
    theirs = their_vae(**shape).state_dict()
    assert converted.keys() == theirs.keys()
    assert all(torch.equal(converted[name], theirs[name]) for name in theirs)

    beside = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    checkpoint |= beside
    entries = {n: Entry(dtype=t.dtype, shape=tuple(t.shape), begin=0, end=0) for n, t in checkpoint.items()}
    assert vae_diffusers.is_theirs(entries)
    foreign = vae_diffusers.read_alone(entries, None, what="a file")
    ours = load(Foreign_with(foreign, groups=8), checkpoint)
    assert ours.config == expected.config
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in ours.state_dict().items())


def Foreign_with(foreign, **values):
    """Widths this small need fewer groups than the 32 that every published one has."""
    return type(foreign)(
        system=foreign.system, values=foreign.values | values, table=foreign.table, ignore=foreign.ignore
    )


def test_what_we_do_not_have_is_refused():
    record = record_of(their_vae())
    for change in (
        {"latents_mean": [0.0] * 4}, {"act_fn": "relu"}, {"use_quant_conv": False}, {"spectral": True},
        {"up_block_types": ["AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 2]},
    ):  # fmt: skip
        with pytest.raises(ModelFileError):
            vae_diffusers.read(record | change)
