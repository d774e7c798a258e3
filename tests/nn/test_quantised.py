"""Eight-bit layers: near the layer that they were, exact where that is on the grid, gradients to what comes in."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reverie.nn.linear import Linear, linear
from reverie.nn.quantised import Int8Linear, repeated, replace, to_int8


@pytest.mark.parametrize("positions", [1, 30, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_layer_of_its_rounded_weights(positions, bias):
    torch.manual_seed(0)
    layer = Linear(40, 1100, bias=bias)
    small = Int8Linear.of(layer)
    x = torch.randn(2, positions, 40, requires_grad=True)
    exact = F.linear(x, small.weight.float() * small.scale[:, None], layer.bias)
    assert (small(x) - exact).abs().max() < 1e-5
    off = ((small(x) - layer(x)).norm() / layer(x).norm()).item()
    assert 0 < off < 0.01
    assert small.weight.element_size() == 1
    (wanted,) = torch.autograd.grad(exact.sum(), x)
    (found,) = torch.autograd.grad(small(x).sum(), x)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_weights_on_the_grid_stay_and_zero_rows_too():
    grid = torch.randint(-126, 127, (5, 9)).float()
    grid[:, 0] = 127
    grid[3] = 0
    weight, scale = to_int8(grid * 0.25)
    assert torch.equal(weight.float() * scale[:, None], grid * 0.25)


def test_only_the_layers_of_repeated_blocks_are_taken():
    system = nn.ModuleDict(
        {"embed": Linear(4, 4), "blocks": nn.ModuleList([nn.Sequential(Linear(4, 4), nn.GELU())])}
    )
    assert list(repeated(system)) == ["blocks.0.0"]
    replace(system, "blocks.0.0", Int8Linear.of(system["blocks"][0][0]))
    assert not repeated(system)
    assert system["blocks"][0](torch.ones(1, 4)).shape == (1, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_weight_beside_fp32_signals_rounds_nothing_else(dtype, monkeypatch):
    monkeypatch.setattr("reverie.nn.linear.cpu_has_bf16", lambda: False)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 7, 40), torch.randn(1100, 40).to(dtype), torch.randn(1100)
    out = linear(x, weight, bias)
    assert out.dtype == torch.float32
    assert (out - F.linear(x, weight.float(), bias)).abs().max() < 1e-5
