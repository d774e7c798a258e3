import pytest
import torch
from torch import nn

from reverie.errors import InputError
from reverie.train import adamw
from reverie.train.optimizers import layer_factors, no_decay_names


class Tower(nn.Module):
    no_decay = frozenset({"place", "head"})

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.place = nn.Parameter(torch.zeros(1, 6, 4))
        self.body = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()
        self.out = self.tower.words.weight  # tied: comes first among the names
        self.temperature = nn.Parameter(torch.zeros(1))


def test_only_matrices_decay():
    names = no_decay_names(Both())
    assert names == {
        "out",
        "temperature",
        "tower.place",
        "tower.body.bias",
        "tower.norm.weight",
        "tower.norm.bias",
        "tower.head.weight",
        "tower.head.bias",
    }


def test_groups_hold_every_trainable_parameter_once():
    model = Both()
    optimizer = adamw(model, lr=1e-3, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6)
    decayed, exempt = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(model.tower.body.weight)]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.2, 0.0)
    together = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["fused"]


def test_a_step_without_gradient_signal_only_decays_matrices():
    torch.manual_seed(0)
    model = Both()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, lr=0.5, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if name == "tower.body.weight" else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_a_misspelt_exception_is_noticed():
    class Wrong(nn.Linear):
        no_decay = ("wieght",)

    with pytest.raises(AssertionError, match="wieght"):
        adamw(Wrong(2, 2), lr=1.0)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.place = nn.Parameter(torch.zeros(4))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = Stack()
        self.head = nn.Linear(4, 4)


def test_learning_rates_fall_from_block_to_block():
    factors = layer_factors(Towers(), 0.5)
    expected = {
        "stem": 1 / 16,
        "place": 1 / 16,
        "blocks.0": 1 / 8,
        "blocks.1": 1 / 4,
        "blocks.2": 1 / 2,
        "norm": 1.0,
    }
    for name, factor in expected.items():
        found = {value for key, value in factors.items() if key.startswith(f"image.{name}")}
        assert found == {factor}, name
    assert not any(name.startswith("head") for name in factors)
    assert set(layer_factors(Towers(), 1.0).values()) == {1.0}


def test_a_smaller_factor_is_a_smaller_step():
    """AdamW's first step is the learning rate, whatever the gradient."""
    model = Towers()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = layer_factors(model, 0.5)
    optimizer = adamw(model, lr=0.1, weight_decay=0.0, eps=0.0, factors=factors)
    assert optimizer.param_groups[0]["lr"] == 0.1
    together = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        moved = (p.detach() - before[name]).abs()
        torch.testing.assert_close(
            moved, torch.full_like(p, 0.1 * factors.get(name, 1.0)), rtol=1e-4, atol=1e-6
        )


def test_falling_rates_need_blocks_and_a_factor():
    with pytest.raises(InputError, match="no blocks"):
        layer_factors(Both(), 0.5)
    for decay in (0.0, -1.0, 1.5):
        with pytest.raises(InputError, match=f"layer decay is {decay}"):
            layer_factors(Towers(), decay)
