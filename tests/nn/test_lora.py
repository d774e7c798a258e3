"""Adapters: nothing at first, the same merged as beside the weights, theirs alone trained and stored."""

import copy

import pytest
import torch
from torch import nn

from reverie.errors import InputError
from reverie.nn.block import Block
from reverie.nn.lora import adapted, add_lora, load_lora, lora_state, merge_lora


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net():
    torch.manual_seed(0)
    return Net().eval()


def trained(model):
    """As training would leave the adapters: neither half is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in adapted(model):
            layer.lora.up.copy_(torch.randn(layer.lora.up.shape, generator=generator) * 0.3)
    return model


X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2))


def test_a_new_adapter_changes_nothing_but_what_is_trained():
    plain, model = net(), net()
    names = add_lora(model, ["blocks.*"], rank=4, seed=3)
    assert len(names) == 8
    assert torch.equal(model(X), plain(X))
    assert set(plain.state_dict()) < set(model.state_dict()), "the old names stay"
    for name, layer in model.named_modules():
        assert type(layer) is type(dict(plain.named_modules()).get(name, layer))
    model(X).square().sum().backward()
    takes = {name for name, p in model.named_parameters() if p.grad is not None}
    assert takes == {f"{name}.lora.{part}" for name in names for part in ("up", "down")}


def test_patterns_choose_layers_and_draws_do_not_depend_on_the_choice():
    one, all_of_them = net(), net()
    assert add_lora(one, ["*.attention.qkv", "head"], rank=2, seed=5) == [
        "blocks.0.attention.qkv",
        "blocks.1.attention.qkv",
        "head",
    ]
    add_lora(all_of_them, ["*"], rank=2, seed=5)
    assert torch.equal(one.head.lora.down, all_of_them.head.lora.down)
    assert not torch.equal(one.blocks[0].attention.qkv.lora.down, one.blocks[1].attention.qkv.lora.down)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@torch.no_grad()
def test_merged_is_unmerged(dtype, off):
    plain, model = net().to(dtype), net().to(dtype)
    add_lora(model, ["*"], rank=4, alpha=6, seed=3)
    trained(model)
    x = X.to(dtype)
    beside, weight = model(x), plain.head.weight
    expected = weight + 6 / 4 * model.head.lora.up @ model.head.lora.down
    assert not torch.allclose(beside, plain(x), atol=0.1)
    merge_lora(model)
    torch.testing.assert_close(model(x), beside, rtol=off, atol=off)
    torch.testing.assert_close(model.head.weight, expected, rtol=off, atol=off)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert not any(layer._forward_hooks for layer in model.modules())


@torch.no_grad()
def test_a_copy_is_a_copy():
    model = net()
    add_lora(model, ["*"], rank=2)
    trained(model)
    before = model(X)
    other = copy.deepcopy(model)
    merge_lora(other)
    torch.testing.assert_close(other(X), before)
    assert torch.equal(model(X), before)
    assert len(list(adapted(model))) == 9


def test_the_adapters_alone_are_stored_and_come_back():
    model = net()
    names = add_lora(model, ["blocks.1.*", "head"], rank=3, alpha=9, seed=4)
    trained(model)
    stored = lora_state(model)
    assert set(stored) == {f"{name}.lora.{part}" for name in names for part in ("down", "up", "alpha")}
    other = net()
    assert sorted(load_lora(other, stored)) == sorted(names)
    assert torch.equal(other(X), model(X))
    trainable = {name for name, p in other.named_parameters() if p.requires_grad}
    assert trainable == {name for name in stored if not name.endswith("alpha")}


def test_autocast_keeps_the_type_of_the_layer():
    model = net()
    add_lora(model, ["head"], rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.head(X).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    model = net()
    with pytest.raises(InputError, match="rank is 0"):
        add_lora(model, ["*"], rank=0)
    with pytest.raises(InputError, match="no linear layer of Net has a name like tail"):
        add_lora(model, ["tail"], rank=1)
    assert all(p.requires_grad for p in model.parameters())
    add_lora(model, ["head"], rank=2)
    with pytest.raises(InputError, match="head is adapted already"):
        add_lora(model, ["*"], rank=1)
    stored = lora_state(model)
    for change, told in (
        ({"tail.lora.up": torch.zeros(5, 2)}, "tail.lora.up is no adapter"),
        ({"head.lora.up": torch.zeros(6, 2)}, r"\(6, 2\)"),
        ({"head.lora.up": torch.zeros(5, 3)}, r"\(5, 3\)"),
        ({"head.weight": torch.zeros(5, 2)}, "head.weight is no adapter"),
    ):
        with pytest.raises(InputError, match=told):
            load_lora(net(), stored | change)
    with pytest.raises(InputError, match="head lacks alpha, up"):
        load_lora(net(), {"head.lora.down": stored["head.lora.down"]})
