"""The activations against torch's, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from reverie.nn.mlp import ACTIVATIONS

FORMULAS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients(name):
    x = torch.cat(
        [torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -50.0, 50.0, 1e4, 0.0])]
    ).requires_grad_()
    exact = x.detach().double().requires_grad_()
    out, wanted = ACTIVATIONS[name]()(x), FORMULAS[name](exact)
    torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=1e-5)
    weight = torch.linspace(-1, 1, len(x))
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)
