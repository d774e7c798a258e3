"""The linear layer against torch's: every way of computing it, its gradients, its names."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reverie.nn import linear as room
from reverie.nn.attention import attend
from reverie.nn.linear import FEW, PART, WIDE, Linear, PatchLinear, linear


def some(positions, outputs, *, inputs=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((positions, inputs), (outputs, inputs), (outputs,))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.fixture
def without_bf16(monkeypatch):
    monkeypatch.setattr(room, "cpu_has_bf16", lambda: False)


@pytest.mark.parametrize("positions", [1, FEW[0], FEW[1] - 1, FEW[1]])
@pytest.mark.parametrize("outputs", [8, WIDE, WIDE + PART // 2 + 1])
@pytest.mark.parametrize("biased", [True, False])
def test_in_parts_or_whole_it_is_torch_s(positions, outputs, biased):
    x, weight, bias = some(positions, outputs)
    out = linear(x, weight, bias if biased else None)
    expected = F.linear(x, weight, bias if biased else None)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    wanted = (x, weight, bias) if biased else (x, weight)
    up = torch.linspace(-1, 1, out.numel()).view_as(out)
    for one, other in zip(
        torch.autograd.grad(out, wanted, up), torch.autograd.grad(expected, wanted, up), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_few_positions_and_many_outputs_are_computed_in_parts(monkeypatch):
    seen = []
    monkeypatch.setattr(room.F, "linear", lambda x, w, b: seen.append(len(w)) or x.new_zeros(len(x), len(w)))
    linear(*some(FEW[0], WIDE + 1))
    assert seen == [PART, PART, PART, 1]
    with torch.autocast("cpu", torch.bfloat16):  # which rounds whole weights, and keeps them rounded
        linear(*some(FEW[0], WIDE + 1))
    assert seen[4:] == [WIDE + 1]


@pytest.mark.usefixtures("without_bf16")
@pytest.mark.parametrize("positions", [3, 300])
@pytest.mark.parametrize("outputs", [8, PART + 9])
def test_bf16_is_rounded_once_where_the_processor_has_none(positions, outputs):
    x, weight, bias = some(positions, outputs, dtype=torch.bfloat16)
    out = linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(out, exact.bfloat16(), atol=0, rtol=2**-7)  # the last bit, when a tie is near
    up = torch.linspace(-1, 1, out.numel()).view_as(out)
    ours = torch.autograd.grad(out, (x, weight, bias), up.bfloat16())
    theirs = torch.autograd.grad(exact, (x, weight, bias), up.bfloat16().double())
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, atol=0.1, rtol=0.02)


@pytest.mark.usefixtures("without_bf16")
def test_bf16_products_are_not_done_in_bf16_where_the_processor_has_none(monkeypatch):
    """Neither in the layer nor in attention: the public operations receive fp32."""
    dtypes = []
    real, fused = F.linear, F.scaled_dot_product_attention
    monkeypatch.setattr(room.F, "linear", lambda x, *rest: dtypes.append(x.dtype) or real(x, *rest))
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, *rest, **k: dtypes.append(q.dtype) or fused(q, *rest, **k),
    )
    assert linear(*some(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    q = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert attend(q, q, q).dtype == torch.bfloat16
    assert dtypes == [torch.float32] * 2


@pytest.mark.parametrize("native", [True, False])
def test_under_autocast_torch_decides(monkeypatch, native):
    monkeypatch.setattr(room, "cpu_has_bf16", lambda: native)
    x, weight, bias = some(30, WIDE)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=0.05, rtol=0.02)
        assert linear(x.bfloat16(), weight, bias).dtype == torch.bfloat16


def test_the_layer_is_torch_s_in_name_and_start():
    torch.manual_seed(0)
    ours = Linear(6, 4)
    torch.manual_seed(0)
    theirs = nn.Linear(6, 4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(ours.state_dict()[name].equal(value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_the_convolution(bias):
    torch.manual_seed(0)
    ours, theirs = PatchLinear(3, 10, 4, bias=bias), nn.Conv2d(3, 10, 4, stride=4, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
