"""Likelihoods that are densities, divergences that are known, and gradients that go where they should."""

import math

import pytest
import torch

from reverie.objectives.discrete import commitment, from_uniform, logit_laplace
from reverie.objectives.masked import masked_loss


def test_the_logit_laplace_density_integrates_to_one():
    x = torch.linspace(1e-4, 1 - 1e-4, 4001, dtype=torch.float64)
    for mean, scale in ((0.0, 0.5), (1.3, 0.2), (-2.0, 1.0)):
        about = torch.tensor(mean, dtype=torch.float64), torch.tensor(math.log(scale), dtype=torch.float64)
        density = torch.stack([-logit_laplace(one, *about) for one in x]).exp()
        assert float(torch.trapezoid(density, x)) == pytest.approx(1, abs=1e-2)


def test_a_smallest_scale_bounds_the_likelihood():
    x = torch.full((4,), 0.5)
    mean = torch.zeros(4)
    assert logit_laplace(x, mean, torch.full((4,), -20.0)) < -15
    bounded = logit_laplace(x, mean, torch.full((4,), -20.0), least=0.1)
    assert float(bounded) == pytest.approx(math.log(2 * 0.1 * 0.25), abs=1e-5)


def test_divergence_from_the_uniform_distribution():
    assert float(from_uniform(torch.zeros(2, 8, 3, 3))) == pytest.approx(0, abs=1e-6)
    sure = torch.zeros(1, 8, 2, 2)
    sure[:, 3] = 50
    assert float(from_uniform(sure)) == pytest.approx(math.log(8), abs=1e-5)


def test_commitment_moves_features_and_only_learned_vectors():
    for learned in (False, True):
        a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
        commitment(a, b, beta=0.25, learned=learned).backward()
        torch.testing.assert_close(a.grad, 0.5 * (a - b).detach() / 3)
        assert (b.grad is not None) == learned


def test_only_hidden_codes_count():
    logits, codes = torch.randn(2, 6, 5), torch.randint(5, (2, 6))
    away = torch.zeros(2, 6, dtype=torch.bool)
    away[0, 2] = away[1, 4] = True
    wanted = torch.nn.functional.cross_entropy(logits[away], codes[away])
    torch.testing.assert_close(masked_loss(logits, codes, away, smoothing=0.0), wanted)
    assert float(masked_loss(logits, codes, torch.zeros_like(away))) == 0
