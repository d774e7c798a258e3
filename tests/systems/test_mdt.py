"""MDT as a system: two passes, weights of the noise, guidance, the authors' names and an arithmetic of its own."""

import dataclasses
import math

import pytest
import torch

import reverie
from reverie.backbones.mdt import MDT_MODELS, MdtConfig
from reverie.codecs.vae import Vae, VaeConfig
from reverie.errors import InputError
from reverie.objectives.denoising import min_snr
from reverie.processes.gaussian import Ddpm
from reverie.systems.mdt import MaskedDiffusionTransformer, MaskedDiffusionTransformerConfig
from reverie.weights import files, mdt_original, remap
from reverie.weights.files import Entry, ModelFileError

BACKBONE = MdtConfig(channels=4, size=8, patch=2, width=24, depth=5, decoder=1, heads=3, classes=3)
FIRST = dataclasses.replace(BACKBONE, decoder=2, skips=False, masked=(0.3, 0.3))
NAMES = ("cat", "crane, bird", "crane, machine")


def made(backbone=BACKBONE, **changes):
    torch.manual_seed(0)
    model = MaskedDiffusionTransformer(MaskedDiffusionTransformerConfig(backbone=backbone, **changes)).eval()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(count=16, **more):
    torch.manual_seed(1)
    return {
        "latents": torch.randn(count, 4, 8, 8) * 0.3, "noise": torch.randn(count, 4, 8, 8),
        "masked_noise": torch.randn(count, 4, 8, 8), "classes": torch.randint(3, (count,)),
        "drop": torch.arange(count) < 3, "uniform": torch.rand(count),
        "keep": torch.stack([torch.randperm(16)[:10] for _ in range(count)]), **more,
    }  # fmt: skip


def test_two_passes_count_alike(monkeypatch):
    model, data = made(), batch()
    whole = model.loss({name: part for name, part in data.items() if name != "keep"})
    assert "masked_mse" not in whole
    both = model.loss(data)
    assert torch.equal(whole["mse"] + whole["bound"], whole["loss"])
    assert torch.allclose(both["loss"], whole["loss"] + both["masked_mse"] + both["masked_bound"])
    asked = []

    def exact(x, t, classes, keep=None):
        asked.append((x, t, classes, keep))
        noise = data["noise" if keep is None else "masked_noise"]
        return torch.cat([noise, torch.full_like(x, -1.0)], dim=1)

    monkeypatch.setattr(model.backbone, "forward", exact)
    found = model.loss(data | {"t": torch.full((16,), 500)})
    assert found["mse"] == found["masked_mse"] == 0
    assert torch.equal(asked[0][1], asked[1][1])  # the same times and classes
    assert torch.equal(asked[0][2], asked[1][2])
    assert (asked[0][2][:3] == 3).all()
    assert asked[0][3] is None
    assert torch.equal(asked[1][3], data["keep"])
    point = Ddpm().at(500)  # the same data, other noise
    for (x, *_), noise in zip(asked, (data["noise"], data["masked_noise"]), strict=True):
        assert torch.allclose(x, point.alpha * data["latents"] + point.sigma * noise, atol=1e-6)


def test_no_step_counts_for_more_than_gamma(monkeypatch):
    """A noise that is wrong by one everywhere costs the weight of its step: gamma / snr where the signal is strong."""
    data = batch(2, t=torch.tensor([20, 900]))
    del data["keep"]

    def wrong(x, t, classes, keep=None):
        return torch.cat([data["noise"] + 1, torch.full_like(x, -1.0)], dim=1)

    snr = [(point.alpha / point.sigma) ** 2 for point in (Ddpm().at(20), Ddpm().at(900))]
    for gamma, expected in ((5.0, (5 / snr[0] + 1) / 2), (None, 1.0)):
        model = made(gamma=gamma)
        monkeypatch.setattr(model.backbone, "forward", wrong)
        assert float(model.loss(data)["mse"]) == pytest.approx(expected, rel=1e-3)
    assert snr[1] < 5 < snr[0]
    at = Ddpm().at(torch.tensor([20, 900]))
    assert torch.allclose(min_snr(at, gamma=1.0), torch.tensor([1 / snr[0], 1.0]).to(at.alpha), rtol=1e-4)


def test_pictures_depend_on_seed_and_class_alone():
    model = made(backbone=dataclasses.replace(BACKBONE, channels=3), names=NAMES, steps=3, clip=1.0)
    both = model.generate_image([0, 1], seed=5)
    assert both.shape == (2, 3, 8, 8)
    assert torch.allclose(model.generate_image(["bird"], seed=6), both[1:], atol=1e-5)
    assert not torch.allclose(model.generate_image([2], seed=6), both[1:], atol=1e-3)
    assert model.generate_image([0], size=(8, 8)).isfinite().all()
    for wrong in (
        {"size": (12, 8)},
        {"size": (16, 16)},
        {"steps": 0},
        {"sampler": "heun"},
        {"guidance": math.nan},
    ):
        with pytest.raises(InputError):
            model.generate_image([0], **wrong)
    with pytest.raises(InputError):
        model.generate_image(["crane"])
    with pytest.raises(InputError, match="power"):
        dataclasses.replace(model.config, power=0.0)


def test_guidance_grows_towards_the_data():
    """One step from index t: x0 moves from the plain towards the guided by (1 - cos(pi (1 - t / 1000)^4)) / 2."""
    weigh = made().weigh(3.8)
    for t, expected in ((999, 1.0), (500, 1 + 2.8 * (1 - math.cos(math.pi / 16)) / 2), (0, 3.8)):
        assert weigh(Ddpm().at(t)) == pytest.approx(expected, abs=1e-6)
    guided, plain = (
        made(clip=1.0).sample(torch.tensor([0]), torch.ones(1, 4, 8, 8), steps=4, guidance=w, sampler="ddim")
        for w in (3.8, 1.0)
    )
    assert not torch.allclose(guided, plain, atol=1e-3)


def test_a_codec_and_a_folder(tmp_path):
    model = made(names=NAMES, steps=2)
    with pytest.raises(InputError, match="attach"):
        model.generate_image([0])
    model.attach(Vae(VaeConfig(widths=(8, 8), depth=1, groups=4)).eval())
    assert model.generate_image([0], size=(16, 16)).shape == (1, 3, 16, 16)
    reverie.save(model, tmp_path / "kept")
    again = reverie.load(tmp_path / "kept")
    assert isinstance(again, MaskedDiffusionTransformer)
    assert again.config == model.config
    assert torch.equal(again.generate_image(["cat"]), model.generate_image(["cat"]))
    before = model.generate_image(["cat"])
    reverie.save(model.drop_interpolater(), tmp_path / "small")
    again = reverie.load(tmp_path / "small")
    assert again.config.backbone.masked is None
    assert torch.equal(again.generate_image(["cat"]), before)


# What a checkpoint of the authors holds: https://github.com/sail-sg/MDT/blob/main/masked_diffusion/models.py ----------


def their_tensors(backbone):
    """Random weights under their names."""
    torch.manual_seed(0)
    width, side, heads = backbone.width, backbone.grid, backbone.heads
    numbers = backbone.patch**2 * backbone.channels
    shapes = {
        "pos_embed": (1, side**2, width), "decoder_pos_embed": (1, side**2, width), "mask_token": (1, 1, width),
        "x_embedder.proj.weight": (width, backbone.channels, backbone.patch, backbone.patch),
        "x_embedder.proj.bias": (width,), "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (backbone.classes + 1, width),
        "final_layer.linear.weight": (2 * numbers, width), "final_layer.linear.bias": (2 * numbers,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }  # fmt: skip
    half = (backbone.depth - backbone.decoder) // 2
    stacks = {"en_inblocks": half, "en_outblocks": half, "de_blocks": backbone.decoder, "sideblocks": 1}
    if not backbone.skips:
        stacks = {"blocks": backbone.depth, "sideblocks": 1}
    for stack, blocks in stacks.items():
        for i in range(blocks):
            for name, *shape in (
                ("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("mlp.fc1", 4 * width, width),
                ("mlp.fc2", width, 4 * width), ("adaLN_modulation.1", 6 * width, width),
                *([("skip_linear", width, 2 * width)] if stack in ("en_outblocks", "de_blocks") else []),
            ):  # fmt: skip
                shapes[f"{stack}.{i}.{name}.weight"], shapes[f"{stack}.{i}.{name}.bias"] = (
                    tuple(shape),
                    shape[:1],
                )
            shapes[f"{stack}.{i}.attn.rel_pos_bias.relative_position_bias_table"] = (
                (2 * side - 1) ** 2 + 3,
                heads,
            )
    tensors = {name: torch.randn(shape) * (0.2 if len(shape) < 2 else 0.7 * shape[-1] ** -0.5)
               for name, shape in shapes.items()}  # fmt: skip
    index = torch.tensor([
        [(i // side - j // side + side - 1) * (2 * side - 1) + i % side - j % side + side - 1 for j in range(side**2)]
        for i in range(side**2)
    ])  # fmt: skip
    for stack, blocks in stacks.items():
        for i in range(blocks):
            tensors[f"{stack}.{i}.attn.rel_pos_bias.relative_position_index"] = index
    return tensors


class Arithmetic:
    """The paper's arithmetic on their tensors, one picture, one block and one head at a time, in double precision."""

    def __init__(self, tensors, backbone):
        self.w = {name: value.double() for name, value in tensors.items() if value.is_floating_point()}
        self.index = next(value for name, value in tensors.items() if not value.is_floating_point())
        self.backbone = backbone

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, x, shift, scale):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def block(self, name, x, c, places, skip=None):
        if skip is not None:
            x = self.linear(f"{name}.skip_linear", torch.cat([x, skip], -1))
        silu = c / (1 + (-c).exp())
        shift1, scale1, gate1, shift2, scale2, gate2 = self.linear(f"{name}.adaLN_modulation.1", silu).chunk(
            6
        )
        q, k, v = self.linear(f"{name}.attn.qkv", self.norm(x, shift1, scale1)).chunk(3, -1)
        table = self.w[f"{name}.attn.rel_pos_bias.relative_position_bias_table"]
        each, heads = q.shape[-1] // self.backbone.heads, []
        for head in range(self.backbone.heads):
            mine = slice(head * each, (head + 1) * each)
            scores = q[:, mine] @ k[:, mine].T / math.sqrt(each)
            scores = scores + table[self.index[places][:, places], head]
            heads.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v[:, mine])
        x = x + gate1 * self.linear(f"{name}.attn.proj", torch.cat(heads, -1))
        y = self.linear(f"{name}.mlp.fc1", self.norm(x, shift2, scale2))
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        return x + gate2 * self.linear(f"{name}.mlp.fc2", y)

    def __call__(self, x, t, y, keep=None):
        side, patch, channels = self.backbone.grid, self.backbone.patch, self.backbone.channels
        every = torch.arange(side**2)
        rows = [x.double()[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].reshape(-1)
                for i in range(side) for j in range(side)]  # fmt: skip
        kernel = self.w["x_embedder.proj.weight"].reshape(self.backbone.width, -1)
        entered = torch.stack(rows) @ kernel.T + self.w["x_embedder.proj.bias"] + self.w["pos_embed"][0]
        angles = t.double() * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
        c = self.linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))
        c = (
            self.linear("t_embedder.mlp.2", c / (1 + (-c).exp()))
            + self.w["y_embedder.embedding_table.weight"][y]
        )
        here = every if keep is None else keep
        tokens, waiting = entered[here], []
        if self.backbone.skips:
            half = (self.backbone.depth - self.backbone.decoder) // 2
            for i in range(half):
                tokens = self.block(f"en_inblocks.{i}", tokens, c, here)
                waiting.append(tokens)
            for i in range(half):
                tokens = self.block(f"en_outblocks.{i}", tokens, c, here, skip=waiting[-1 - i])
            decoder = [f"de_blocks.{i}" for i in range(self.backbone.decoder)]
        else:
            first = self.backbone.depth - self.backbone.decoder
            for i in range(first):
                tokens = self.block(f"blocks.{i}", tokens, c, here)
            decoder = [f"blocks.{i}" for i in range(first, self.backbone.depth)]
        there = self.w["decoder_pos_embed"][0].clone()
        if keep is None:
            there = there + tokens
        else:
            gone = [n for n in range(side**2) if n not in keep.tolist()]
            there[keep] += tokens
            there[gone] += self.w["mask_token"][0, 0]
            there[gone] = self.block("sideblocks.0", there, c, every)[gone]
        for name in decoder:
            there = self.block(name, there, c, every, skip=entered if self.backbone.skips else None)
        silu = c / (1 + (-c).exp())
        shift, scale = self.linear("final_layer.adaLN_modulation.1", silu).chunk(2)
        there = self.linear("final_layer.linear", self.norm(there, shift, scale))
        out = torch.zeros(2 * channels, side * patch, side * patch, dtype=torch.float64)
        for n, row in enumerate(there):
            i, j = n // side * patch, n % side * patch
            out[:, i : i + patch, j : j + patch] = row.reshape(patch, patch, 2 * channels).permute(2, 0, 1)
        return out


@pytest.mark.parametrize("backbone", [BACKBONE, FIRST], ids=["version 2", "version 1"])
def test_their_tensors_give_the_papers_numbers_and_go_back_bit_equal(backbone, tmp_path):
    tensors = their_tensors(backbone)
    files.write(tmp_path / "mdt.safetensors", tensors)
    model = reverie.load(tmp_path / "mdt.safetensors")
    assert isinstance(model, MaskedDiffusionTransformer)
    assert model.config.backbone == backbone
    assert model.config.gamma == (5.0 if backbone.skips else None)
    assert model.config.guided_channels == 3
    reference = Arithmetic(tensors, backbone)
    data = batch(3)
    x, t, classes, keep = data["noise"], torch.tensor([0, 400, 999]), torch.tensor([1, 2, 3]), data["keep"]
    for kept in (None, keep):
        ours = model.backbone(x, t, classes, keep=kept)
        theirs = torch.stack(
            [reference(x[i], t[i], classes[i], None if kept is None else kept[i]) for i in range(3)]
        )
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
    table = mdt_original.table(dataclasses.asdict(model.config.backbone))
    back = remap.apply(remap.invert(table), model.state_dict())
    assert back.keys() == tensors.keys()
    assert all(remap.same(back[name], tensors[name]) for name in tensors)


def test_a_config_says_what_names_and_shapes_do_not(tmp_path):
    path = tmp_path / "mdt.safetensors"
    files.write(path, their_tensors(FIRST))
    deeper = dataclasses.replace(FIRST, decoder=3)
    config = MaskedDiffusionTransformerConfig(backbone=deeper, names=NAMES)
    assert reverie.load(path, config=config).config == config
    alone = dataclasses.replace(FIRST, masked=None)
    model = reverie.load(path, config=MaskedDiffusionTransformerConfig(backbone=alone))
    assert not any("interpolater" in name or "missing" in name for name in model.state_dict())
    whole = reverie.load(path)
    x, t, classes = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.tensor([0])
    assert torch.equal(model.backbone(x, t, classes), whole.backbone(x, t, classes))
    with pytest.raises(ModelFileError):  # of another size
        reverie.load(path, config="MDT-S/2")
    with pytest.raises(ModelFileError, match="MDT"):
        reverie.load(path, config="DiT-S/2")
    assert "MDTv2-XL/2" in MDT_MODELS


def test_files_that_are_no_whole_mdt(tmp_path):
    tensors = their_tensors(BACKBONE)
    entries = {
        name: Entry(dtype=value.dtype, shape=tuple(value.shape), begin=0, end=0)
        for name, value in tensors.items()
    }
    assert mdt_original.is_theirs(entries)
    short = {name: entry for name, entry in entries.items() if "final" not in name}
    with pytest.raises(ModelFileError, match="final_layer"):
        mdt_original.read_alone(short, None, what="MDT")
    wrong = dict(tensors)
    wrong["de_blocks.0.attn.rel_pos_bias.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    files.write(tmp_path / "a.safetensors", wrong)
    with pytest.raises(ModelFileError, match="relative_position_index does not hold"):
        reverie.load(tmp_path / "a.safetensors")
    name = "de_blocks.0.attn.rel_pos_bias.relative_position_index"
    larger = entries | {name: dataclasses.replace(entries[name], shape=(17, 17))}
    with pytest.raises(ModelFileError, match="distances"):
        mdt_original.read_alone(larger, None, what="MDT")
