"""DiT and SiT as systems: classes, seeds, guidance, their losses on exact networks, the authors' names."""

import dataclasses
import math

import pytest
import torch

import reverie
from reverie.backbones.dit import DitConfig
from reverie.codecs.vae import Vae, VaeConfig
from reverie.errors import InputError
from reverie.objectives.denoising import variance_bound
from reverie.processes.gaussian import Ddpm
from reverie.systems.dit import DiffusionTransformer, DiffusionTransformerConfig
from reverie.systems.sit import Sit, SitConfig
from reverie.weights import dit_original, files, remap
from reverie.weights.files import Entry, ModelFileError

BACKBONE = DitConfig(channels=3, size=8, width=32, depth=1, heads=4, classes=3, patch=2)
CODEC = VaeConfig(widths=(8, 8), depth=1, groups=4)
NAMES = ("cat", "crane, bird", "crane, machine")
CONFIGS = {
    "dit": DiffusionTransformerConfig(backbone=BACKBONE, names=NAMES, steps=3),
    "sit": SitConfig(backbone=dataclasses.replace(BACKBONE, learned_sigma=False), names=NAMES, steps=3),
}


def made(name, **changes):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIGS[name], **changes)
    model = (DiffusionTransformer if name == "dit" else Sit)(config).eval()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_pictures_depend_on_seed_and_class_alone(name):
    model = made(name)
    assert model.generate_image(["cat"]).shape == (1, 3, 8, 8)
    both = model.generate_image([0, 1], seed=5, guidance=2.0)
    assert torch.allclose(model.generate_image([1], seed=6, guidance=2.0), both[1:], atol=1e-5)
    assert torch.allclose(model.generate_image(["bird"], seed=[6], guidance=2.0), both[1:], atol=1e-5)
    assert not torch.allclose(model.generate_image([1], seed=7, guidance=2.0), both[1:], atol=1e-2)
    assert not torch.allclose(model.generate_image([2], seed=6, guidance=2.0), both[1:], atol=1e-3)
    assert model.generate_image([0], size=(12, 16)).shape == (1, 3, 12, 16)
    counted = []
    model.generate_image([0], progress=lambda done, all: counted.append((done, all)))
    assert counted == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_sampler_draws(name):
    from reverie.systems import dit, sit

    model = made(name)
    for sampler in (dit if name == "dit" else sit).SAMPLERS:
        assert model.generate_image([0], steps=4, sampler=sampler).isfinite().all()
    if name == "sit":
        some = [
            model.generate_image([0], diffusion=w) for w in ("sigma", "decreasing", "increasing-decreasing")
        ]
        assert not torch.equal(some[0], some[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_cannot_be_asked_for(name):
    model = made(name)
    for classes in ([], "cat", ["dog"], [3], [-1], ["crane"], [0.5], [True], None):
        with pytest.raises(InputError):
            model.generate_image(classes)
    for wrong in (
        {"sampler": "none"}, {"steps": 0}, {"guidance": math.nan}, {"seed": [1, 2]}, {"size": (9, 8)}, {"size": 8},
        {"seed": 0.5}, {"steps": 2.5},
    ):  # fmt: skip
        with pytest.raises(InputError):
            model.generate_image([0], **wrong)
    with pytest.raises(InputError, match="names"):
        dataclasses.replace(CONFIGS[name], names=("one",))


@pytest.mark.parametrize("name", CONFIGS)
def test_guidance_of_fewer_channels_leaves_the_others(name):
    """In one step; in more the channels meet in the network."""
    sampler = {"dit": "ddim", "sit": "euler"}[name]
    plain, all_, first = (
        made(name, guided_channels=n, **({"spacing": "trailing"} if name == "dit" else {})).sample(
            torch.tensor([0]), torch.ones(1, 3, 8, 8), steps=1, guidance=w, sampler=sampler
        )
        for n, w in ((0, 1.0), (0, 3.0), (2, 3.0))
    )
    assert torch.allclose(first[:, :2], all_[:, :2], atol=1e-4 * float(all_.abs().max()))
    assert torch.allclose(first[:, 2:], plain[:, 2:], atol=1e-4 * float(plain.abs().max()))
    assert not torch.allclose(all_[:, 2:], plain[:, 2:], rtol=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_codec_is_given_later(name, tmp_path, monkeypatch):
    backbone = dataclasses.replace(CONFIGS[name].backbone, channels=4)
    model = made(name, backbone=backbone)
    with monkeypatch.context() as patch:
        patch.setattr(model, "sample", None)  # said before anything is drawn
        with pytest.raises(InputError, match="attach"):
            model.generate_image([0])
    with pytest.raises(InputError, match="4 channels"):
        model.attach(Vae(dataclasses.replace(CODEC, channels=3)))
    assert model.attach(Vae(CODEC).eval()).generate_image([0]).shape == (1, 3, 16, 16)
    reverie.save(model, tmp_path / "kept")
    again = reverie.load(tmp_path / "kept")
    assert again.config == model.config
    assert torch.equal(again.generate_image(["cat"]), model.generate_image(["cat"]))


def batch(count=64, **more):
    torch.manual_seed(1)
    return {
        "latents": torch.randn(count, 3, 8, 8) * 0.3, "noise": torch.randn(count, 3, 8, 8),
        "classes": torch.randint(3, (count,)), "drop": torch.zeros(count, dtype=torch.bool),
        "uniform": torch.rand(count), **more,
    }  # fmt: skip


def test_the_right_velocity_costs_nothing(monkeypatch):
    """SiT's network is told 1 - t and says minus the velocity."""
    model, data = made("sit"), batch()
    told = []

    def exact(x, t, classes):
        told.append(t)
        return data["latents"] - data["noise"]

    monkeypatch.setattr(model.backbone, "forward", exact)
    assert model.loss(data)["loss"] == 0
    assert torch.equal(told[0], 1 - data["uniform"])


def test_the_right_noise_costs_the_width_of_the_step_alone(monkeypatch):
    model = made("dit")
    data = batch(t=torch.randint(1, 20, (64,)))
    seen = []

    def exact(x, t, classes, v=-1.0):
        seen.append(classes)
        return torch.cat([data["noise"], torch.full_like(x, v)], dim=1)

    monkeypatch.setattr(model.backbone, "forward", exact)
    found = model.loss(data | {"drop": torch.arange(64) < 32})
    assert found["mse"] == 0
    assert found["bound"].abs() < 1e-4  # the small variance is the posterior's own
    assert (seen[0][:32] == model.backbone.null).all()
    assert torch.equal(seen[0][32:], data["classes"][32:])
    monkeypatch.setattr(model.backbone, "forward", lambda *args: exact(*args, v=1.0))
    assert model.loss(data)["bound"] > 1e-3


def test_the_bound_is_a_divergence_of_normals():
    """Against torch's own, at indices where p and q differ; and it moves the variance alone."""
    process, t = Ddpm(), torch.tensor([1, 30, 999])
    x0, x_t, predicted = (torch.randn(3, 2, 4, 4) for _ in range(3))
    v = torch.rand(3, 2, 4, 4) * 2 - 1
    for i, index in enumerate(t.tolist()):
        now, after = process.at(index), process.at(index - 1)
        beta = 1 - (now.alpha / after.alpha) ** 2
        small, large = math.log(beta * after.sigma**2 / now.sigma**2), math.log(beta)
        means = [
            after.alpha * beta / now.sigma**2 * x
            + now.alpha / after.alpha * after.sigma**2 / now.sigma**2 * x_t
            for x in (x0, predicted)
        ]
        log = (v + 1) / 2 * large + (1 - v) / 2 * small
        q = torch.distributions.Normal(means[0][i], math.exp(small / 2))
        p = torch.distributions.Normal(means[1][i], (log[i] / 2).exp())
        expected = torch.distributions.kl_divergence(q, p).mean() / math.log(2)
        assert torch.allclose(variance_bound(x0, x_t, predicted, v, t, process)[i], expected, rtol=1e-3)
    model = made("dit")
    loss = model.loss(batch())
    loss["bound"].backward()
    gradient = model.backbone.out.weight.grad.reshape(2, 2, 6, 32)  # rows of a patch, columns, channels
    assert not gradient[:, :, :3].any()
    assert gradient[:, :, 3:].any()


def test_at_index_0_the_bound_is_a_likelihood():
    """Bins over all values add up to one."""
    x0 = torch.linspace(-1, 1, 256).reshape(256, 1)
    t = torch.zeros(256, dtype=torch.long)
    bits = variance_bound(
        x0, torch.full_like(x0, 0.1), torch.full_like(x0, 0.1), torch.full_like(x0, 0.5), t, Ddpm()
    )
    assert (2.0**-bits).sum() == pytest.approx(1, abs=1e-3)


# What a checkpoint of the authors holds, of two blocks: https://github.com/facebookresearch/DiT/blob/main/models.py
THEIRS = {
    "pos_embed": (1, 16, 16), "x_embedder.proj.weight": (16, 4, 2, 2), "x_embedder.proj.bias": (16,),
    "t_embedder.mlp.0.weight": (16, 256), "t_embedder.mlp.0.bias": (16,), "t_embedder.mlp.2.weight": (16, 16),
    "t_embedder.mlp.2.bias": (16,), "y_embedder.embedding_table.weight": (11, 16),
    **{
        f"blocks.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "attn.qkv.weight": (48, 16), "attn.qkv.bias": (48,), "attn.proj.weight": (16, 16), "attn.proj.bias": (16,),
            "mlp.fc1.weight": (64, 16), "mlp.fc1.bias": (64,), "mlp.fc2.weight": (16, 64), "mlp.fc2.bias": (16,),
            "adaLN_modulation.1.weight": (96, 16), "adaLN_modulation.1.bias": (96,),
        }.items()
    },
    "final_layer.linear.weight": (32, 16), "final_layer.linear.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (32, 16), "final_layer.adaLN_modulation.1.bias": (32,),
}  # fmt: skip


def their_file(path, *, positions=None):
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in THEIRS.items()}
    tensors["pos_embed"] = their_positions(4, 16) if positions is None else positions
    files.write(path, tensors)
    return tensors


def their_positions(side, width):
    """The arithmetic of their code, position by position."""
    rows = []
    for h in range(side):
        for w in range(side):
            row = []
            for place in (w, h):
                angles = [place / 10000 ** (i / (width / 4)) for i in range(width // 4)]
                row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(row)
    return torch.tensor([rows], dtype=torch.float64).float()


def test_the_authors_checkpoints_load_by_their_names(tmp_path, monkeypatch):
    tensors = their_file(tmp_path / "DiT-tiny.safetensors")
    entries = files.header(tmp_path / "DiT-tiny.safetensors")
    assert dit_original.is_theirs(entries)
    with pytest.raises(ModelFileError, match="published size"):
        reverie.load(tmp_path / "DiT-tiny.safetensors")
    monkeypatch.setitem(dit_original.HEADS, (2, 16), 4)
    model = reverie.load(tmp_path / "DiT-tiny.safetensors")
    assert isinstance(model, DiffusionTransformer)
    assert model.config.backbone == DitConfig(size=8, width=16, depth=2, heads=4, classes=10)
    assert model.config.guided_channels == 3
    # Back under their names, positions too.
    table = dit_original.read_alone(entries, None, what="DiT").table
    back = remap.apply(remap.invert(table), model.state_dict())
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors if name != "pos_embed")
    assert torch.allclose(back["pos_embed"], tensors["pos_embed"], atol=1e-6)

    (tmp_path / "SiT-tiny.safetensors").write_bytes((tmp_path / "DiT-tiny.safetensors").read_bytes())
    assert isinstance(reverie.load(tmp_path / "SiT-tiny.safetensors"), Sit)
    config = SitConfig(backbone=model.config.backbone)
    assert reverie.load(tmp_path / "DiT-tiny.safetensors", config=config).config == config


def test_checkpoints_that_do_not_say_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setitem(dit_original.HEADS, (2, 16), 4)
    their_file(tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="DiT's or SiT's"):
        reverie.load(tmp_path / "model.safetensors")
    their_file(tmp_path / "DiT.safetensors", positions=their_positions(4, 16).flip(1))
    with pytest.raises(ModelFileError, match="pos_embed does not hold"):
        reverie.load(tmp_path / "DiT.safetensors")
    short = {
        n: Entry(dtype=torch.float32, shape=s, begin=0, end=0) for n, s in THEIRS.items() if "final" not in n
    }
    with pytest.raises(ModelFileError, match="final_layer"):
        dit_original.read_alone(short, None, what="DiT")
