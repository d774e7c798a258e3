"""Wan 2.1 against diffusers at small random weights: its transformer under both namings, its words, its pipeline."""

import json
from dataclasses import asdict

import pytest
import torch

from reverie.backbones.wan import SHAPES, WanDit, WanDitConfig
from reverie.weights import files, remap, wan_diffusers
from reverie.weights.store import config_from

pytestmark = pytest.mark.reference
diffusers = pytest.importorskip("diffusers")

# heads, channels of a head, the feed-forward's channels, blocks, the affine norm; frames, rows, columns, words, eps
MODELS = {
    "two heads, odd frames and rows": (2, 32, 96, 2, True, 3, 6, 10, 9, 1e-6),
    "uneven shares of a head, a picture": (3, 44, 200, 3, True, 1, 4, 4, 64, 1e-6),
    "one head, no norm before the words, other eps": (1, 12, 64, 1, False, 5, 2, 6, 20, 1e-4),
}


def shaken(model):
    """Far from initialisation, where biases are zero and norms are the identity."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.08)
    return model.eval()


def distance(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def their_transformer(heads, head, hidden, depth, norm, eps):
    return shaken(
        diffusers.WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head,
            ffn_dim=hidden,
            num_layers=depth,
            cross_attn_norm=norm,
            text_dim=48,
            freq_dim=64,
            eps=eps,
        )
    )


def our_transformer(record, tensors):
    values = wan_diffusers.backbone(record)
    ours = WanDit(config_from(WanDitConfig, json.loads(json.dumps(values)), where="config.json")).eval()
    table = wan_diffusers.table(values, original=record["_class_name"] == "WanModel", ours="")
    ours.load_state_dict(remap.apply(table, tensors, expected=files.expectation(ours.state_dict())))
    return ours


def original_names(tensors, depth):
    """The original's names, by diffusers' own converter turned round: what it makes of a name leads back to it."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = [f"{part}.{p}" for part in (
        "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
        "time_projection.1", "head.head") for p in ("weight", "bias")] + ["head.modulation"]  # fmt: skip
    for i in range(depth):
        names += [f"blocks.{i}.{part}.{p}" for part in (
            "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k",
            "cross_attn.v", "cross_attn.o", "norm3", "ffn.0", "ffn.2") for p in ("weight", "bias")]  # fmt: skip
        names += [f"blocks.{i}.{own}.norm_{x}.weight" for own in ("self_attn", "cross_attn") for x in "qk"]
        names.append(f"blocks.{i}.modulation")
    theirs = {
        name: next(iter(convert_wan_transformer_to_diffusers({name: torch.zeros(1)}))) for name in names
    }
    return {name: tensors[their] for name, their in theirs.items() if their in tensors}


def inputs(f, h, w, words, seed=1):
    g = torch.Generator().manual_seed(seed)
    context = torch.randn(2, words, 48, generator=g)
    context[0, words // 2 :] = 0
    context[1, words // 3 :] = 0
    return torch.randn(2, 16, f, h, w, generator=g), torch.tensor([937.0, 421.0]), context


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("original", [False, True], ids=["diffusers' names", "the original's names"])
def test_the_transformer_gives_the_same_velocity_and_gradients(name, original):
    heads, head, hidden, depth, norm, f, h, w, words, eps = MODELS[name]
    theirs = their_transformer(heads, head, hidden, depth, norm, eps)
    record, tensors = json.loads(theirs.to_json_string()), theirs.state_dict()
    if original:
        tensors = original_names(tensors, depth)
        assert len(tensors) == len(theirs.state_dict())
        record = {
            "_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v", "dim": heads * head,
            "num_heads": heads, "ffn_dim": hidden, "freq_dim": 64, "num_layers": depth, "eps": eps, "in_dim": 16,
            "out_dim": 16, "text_len": 512, "text_dim": 48, "cross_attn_norm": norm,
        }  # fmt: skip
    ours = our_transformer(record, tensors)
    x, t, context = inputs(f, h, w, words)

    wanted = theirs(x, t, context, return_dict=False)[0]
    found = ours(x, t.double() / 1000, context)
    assert found.shape == wanted.shape
    assert distance(found, wanted) < 1e-5
    with torch.no_grad():
        assert distance(ours(x, t / 1000, ours.prepare(context)), wanted) < 1e-5

    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    wanted.backward(grad)
    found.backward(grad)
    table = wan_diffusers.table(asdict(ours.config), ours="")
    gradients = remap.apply(table, {key: p.grad for key, p in theirs.named_parameters()})
    for key, parameter in ours.named_parameters():
        # What is added to all keys moves no softmax: both have rounding there, and nothing else.
        if distance(parameter.grad, gradients[key]) >= 1e-4:
            assert "kv.bias" in key or "norm_k" in key or "qkv.bias" in key, key
            scale = max(g.abs().max() for g in gradients.values())
            assert (parameter.grad - gradients[key]).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("original", [False, True])
def test_the_way_back_is_bit_equal(original):
    theirs = their_transformer(2, 32, 96, 2, True, 1e-6)
    tensors = theirs.state_dict()
    ours = our_transformer(json.loads(theirs.to_json_string()), tensors)
    record, table = wan_diffusers.write(asdict(ours.config), original=original, ours="")
    back = remap.apply(remap.invert(table), ours.state_dict())
    wanted = original_names(tensors, 2) if original else tensors
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], wanted[key]) for key in wanted)
    assert config_from(WanDitConfig, wan_diffusers.backbone(record), where="config.json") == ours.config
    if not original:
        again = diffusers.WanTransformer3DModel.from_config(record)
        assert dict(again.config) == {**dict(theirs.config), **dict(again.config)}
        again.load_state_dict(back)


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_have_their_parameters(name):
    config = SHAPES[name]
    record, _ = wan_diffusers.write(asdict(config))
    with torch.device("meta"):
        theirs, ours = diffusers.WanTransformer3DModel.from_config(record), WanDit(config)
    counts = [sum(p.numel() for p in model.parameters()) for model in (theirs, ours)]
    assert counts[0] == counts[1]
    assert round(counts[0] / 1e9, 1) == {"wan2.1-t2v-1.3b": 1.4, "wan2.1-t2v-14b": 14.3}[name]
