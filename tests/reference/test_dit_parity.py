"""Our DiT against diffusers' DiTTransformer2DModel and DiTPipeline at small random weights, without a download."""

from dataclasses import asdict

import pytest
import torch

from reverie.backbones.dit import Dit, DitConfig, Modulations
from reverie.errors import InputError
from reverie.weights import dit_diffusers, files, remap
from reverie.weights.files import ModelFileError

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.reference

SHAPES = {
    "a patch of 2, learned sigma": {"out_channels": 8},
    "a patch of 4, no sigma, other eps": {"patch_size": 4, "sample_size": 16, "norm_eps": 1e-3},
    "one block, three channels, a patch of 1": {"num_layers": 1, "in_channels": 3, "patch_size": 1},
}


def away(model):
    """Far from initialisation, where modulations are zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def their_transformer(**shape):
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8,
        "num_embeds_ada_norm": 10, **shape,
    }  # fmt: skip
    model = diffusers.DiTTransformer2DModel(**config).eval()
    away(model)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return model


def record_of(model):
    return {key: value for key, value in model.config.items() if not key.startswith("_")} | {
        "_class_name": type(model).__name__
    }


def ours_from(theirs):
    foreign = dit_diffusers.read(record_of(theirs))
    model = Dit(DitConfig(**foreign.values)).eval()
    expected = files.expectation(model.state_dict())
    model.load_state_dict(remap.apply(foreign.table, theirs.state_dict(), expected=expected))
    return model


def near(ours, theirs, most=1e-5):
    assert ours.shape == theirs.shape
    return (ours - theirs).norm() / theirs.norm() < most


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_predictions_and_gradients_are_equal(shape):
    theirs = their_transformer(**shape)
    ours = ours_from(theirs)
    channels = ours.config.channels
    for side in (8, 12) if "sample_size" not in shape else (16, 24):
        x = torch.randn(3, channels, side, side, requires_grad=True)
        t, classes = torch.tensor([0, 400, 999]), torch.tensor([1, 9, 10])
        a, b = theirs(x, timestep=t, class_labels=classes).sample, ours(x, t, classes)
        assert near(b, a)
        one = ours(x[:1], t[:1], classes[:1])  # one item alone is normalised in another way
        assert near(one, a[:1])
        probe = torch.randn_like(a)
        assert near(*(torch.autograd.grad((out * probe).sum(), x, retain_graph=True)[0] for out in (b, a)), 1e-4)
    (b * probe).sum().backward()
    (a * probe).sum().backward()
    expected = remap.apply(
        # The gradient of what is shared is the sum of the gradients of their copies.
        [rule for rule in dit_diffusers.table(ours.config.depth) if not rule.copies],
        {name: p.grad for name, p in theirs.named_parameters() if "norm1.emb." not in name},
    )
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, gradient in expected.items():
        assert near(gradients.pop(name), gradient, 1e-4), name
    copies = [dict(block.norm1.emb.named_parameters()) for block in theirs.transformer_blocks]
    assert near(gradients["classes.weight"], sum(one["class_embedder.embedding_table.weight"].grad for one in copies), 1e-4)
    assert near(gradients["time.2.bias"], sum(one["timestep_embedder.linear_2.bias"].grad for one in copies), 1e-4)


def test_modulations_for_all_steps_are_those_of_each(monkeypatch):
    ours = ours_from(their_transformer(out_channels=8))
    x, classes = torch.randn(4, 4, 8, 8), torch.tensor([3, 10, 3, 10])
    times = [999.0, 500.0, 7.0, 7.0, 3.0]
    monkeypatch.setattr("reverie.backbones.dit.TABLE_BYTES", 2 * 4 * 2 * 20 * 24)  # room for two steps of two classes
    modulations = Modulations(ours, times, classes)
    assert modulations.together == 2
    for t in times:
        one = ours(x, torch.full((4,), t), classes)
        assert near(ours(x, None, None, modulations=modulations.at(t)), one)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_way_back_is_bit_equal(shape, tmp_path):
    theirs = their_transformer(**shape)
    ours = ours_from(theirs)
    record, table = dit_diffusers.write(asdict(ours.config))
    back = remap.apply(remap.invert(table), ours.state_dict())
    state = theirs.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    again = diffusers.DiTTransformer2DModel.from_config(record)
    assert {k: v for k, v in again.config.items() if k != "dropout"}.items() >= {
        k: v for k, v in theirs.config.items() if k not in ("_use_default_values", "out_channels", "dropout")
    }.items()
    assert dit_diffusers.read(record).values == dit_diffusers.read(record_of(theirs)).values


def test_embeddings_that_differ_between_blocks_are_refused():
    theirs = their_transformer()
    with torch.no_grad():
        theirs.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[4, 5] += 1e-3
    with pytest.raises(ModelFileError, match="copies of one tensor"):
        ours_from(theirs)


def test_what_diffusers_cannot_have_is_refused():
    with pytest.raises(InputError, match="waves"):
        dit_diffusers.write(asdict(DitConfig()))
    with pytest.raises(ModelFileError, match="norm_type"):
        dit_diffusers.read({"norm_type": "layer_norm"})
