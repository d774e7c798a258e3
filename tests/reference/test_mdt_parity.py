"""Our MDT against its authors' code, version 1 or 2, at small random weights: predictions, losses, gradients, samples.

Their code is no package of an index: check out https://github.com/sail-sg/MDT (branch main, or mdtv1) and set
PYTHONPATH to it. Without it these tests are left out; tests/systems/test_mdt.py has an arithmetic of its own.
"""

import dataclasses
import sys
import types
from unittest import mock

import pytest
import torch
from torch import nn

import reverie
from reverie.samplers import diffusion
from reverie.weights import files, mdt_original, remap

pytestmark = pytest.mark.reference


class PatchEmbed(nn.Module):
    """What their code takes of timm, which cannot be imported without torchvision."""

    def __init__(self, size, patch, channels, width, bias=True):
        super().__init__()
        self.num_patches, self.patch_size = (size // patch) ** 2, (patch, patch)
        self.proj = nn.Conv2d(channels, width, patch, patch, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer, drop=0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(in_features, hidden_features), nn.Linear(hidden_features, in_features)
        self.act = act_layer()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@pytest.fixture(scope="module")
def code():
    """Their `masked_diffusion`, with a stand-in for timm."""
    parts = {
        "timm": {}, "timm.models": {}, "timm.models.vision_transformer": {"PatchEmbed": PatchEmbed, "Mlp": Mlp},
        "timm.models.layers": {"trunc_normal_": nn.init.trunc_normal_},
    }  # fmt: skip
    modules = {}
    for name, contents in parts.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(contents)
    with mock.patch.dict(sys.modules, modules):
        pytest.importorskip("masked_diffusion.models")
        return pytest.importorskip("masked_diffusion")


@pytest.fixture(scope="module")
def pair(code, tmp_path_factory):
    """Theirs and ours with equal weights, far from initialisation, and what their masks were."""
    second = hasattr(code.models, "MDTv2")
    torch.manual_seed(0)
    theirs = (code.models.MDTv2 if second else code.models.MDT)(
        input_size=8, patch_size=2, hidden_size=48, depth=7, num_heads=4, num_classes=10, mask_ratio=0.3,
        decode_layer=3 if second else 2,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        for parameter in theirs.final_layer.linear.parameters():
            parameter.mul_(0.1)
    path = tmp_path_factory.mktemp("theirs") / "mdt.safetensors"
    files.write(path, theirs.state_dict())
    return theirs, reverie.load(path, trainable=True)


def near(ours, theirs, most=1e-5):
    assert ours.shape == theirs.shape
    return (ours - theirs).norm() / theirs.norm() < most


def keeping(theirs):
    """Their random masks, written down."""
    drawn, draw = [], theirs.random_masking

    def kept(x, share):
        drawn.append(draw(x, share))
        return drawn[-1]

    return drawn, mock.patch.object(theirs, "random_masking", kept)


def by_their_names(ours):
    rules = mdt_original.table(dataclasses.asdict(ours.config.backbone))
    return [rule for rule in rules if rule.value is None]


def test_predictions_are_equal(pair):
    theirs, ours = pair
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([1, 9, 10])
    assert near(ours.backbone(x, t, y), theirs(x, t, y))
    drawn, patch = keeping(theirs)
    with patch:
        masked = theirs(x, t, y, enable_mask=True)
    assert near(ours.backbone(x, t, y, keep=drawn[0][3]), masked)


def test_losses_and_gradients_are_equal(pair, code):
    theirs, ours = pair
    x0, noise, other = (torch.randn(3, 4, 8, 8) for _ in range(3))
    t, y = torch.tensor([0, 40, 900]), torch.tensor([1, 9, 10])
    process = code.create_diffusion("")
    drawn, patch = keeping(theirs)
    with patch:
        whole = process.training_losses(theirs, x0, t, {"y": y}, noise=noise)["loss"].mean()
        masked = process.training_losses(theirs, x0, t, {"y": y, "enable_mask": True}, noise=other)[
            "loss"
        ].mean()
    found = ours.loss({
        "latents": x0, "noise": noise, "masked_noise": other, "t": t, "classes": y, "keep": drawn[0][3],
        "drop": torch.zeros(3, dtype=torch.bool),
    })  # fmt: skip
    assert near(found["mse"] + found["bound"], whole)
    assert near(found["masked_mse"] + found["masked_bound"], masked)
    (whole + masked).backward()
    found["loss"].backward()
    expected = remap.apply(by_their_names(ours), {name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert near(parameter.grad, expected[name], 1e-4), name


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_with_guidance_are_equal(pair, code, sampler):
    theirs, ours = pair
    process = code.create_diffusion("12")
    z, classes, both = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([1, 2, 10, 10])
    fresh = [torch.randn(4, 4, 8, 8) for _ in range(12)]
    loop = process.ddim_sample_loop if sampler == "ddim" else process.p_sample_loop
    drawn = iter(fresh)
    with mock.patch.object(torch, "randn_like", side_effect=drawn), torch.no_grad():
        expected = loop(
            theirs.forward_with_cfg, (4, 4, 8, 8), torch.cat([z, z]), clip_denoised=False, device="cpu",
            model_kwargs={"y": both, "cfg_scale": 3.8, "scale_pow": 4.0},
        )[:2]  # fmt: skip
    with mock.patch.object(diffusion, "draw", side_effect=[noise[:2] for noise in fresh]):
        found = ours.sample(classes, z, steps=12, guidance=3.8, sampler=sampler)
    assert near(found, expected)
