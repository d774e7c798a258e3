"""The Frechet distance: equal to its formula on Gaussians whose moments are known exactly."""

import math

import numpy as np
import pytest
import torch

from reverie.errors import InputError
from reverie.evals.frechet import frechet


def gaussian(n: int, mean: np.ndarray, covariance: np.ndarray, *, seed: int) -> torch.Tensor:
    """`n d` whose sample mean and sample covariance are exactly those given."""
    d = len(mean)
    noise = np.random.default_rng(seed).standard_normal((n, d))
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(noise.T @ noise / (n - 1))).T
    values, vectors = np.linalg.eigh(covariance)
    return torch.from_numpy(white @ (vectors * np.sqrt(values.clip(0))).T + mean)


def spd(d: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((d, d))
    return root @ root.T / d


def by_formula(a: torch.Tensor, b: torch.Tensor) -> float:
    """With a square root by eigenvectors, of S_a^(1/2) S_b S_a^(1/2), whose trace is that of (S_a S_b)^(1/2)."""
    one, other = (np.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    values, vectors = np.linalg.eigh(one)
    half = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(half @ other @ half).clip(0)).sum()
    gap = a.double().mean(0) - b.double().mean(0)
    return float((gap**2).sum()) + np.trace(one) + np.trace(other) - 2 * cross


def test_diagonal_gaussians_have_their_closed_form():
    """Sum of (mean_a - mean_b)^2 + (sigma_a - sigma_b)^2."""
    one, other = np.array([0.5, 1.0, 2.0]), np.array([1.5, 1.0, 0.25])
    shift = np.array([0.3, -1.0, 2.0])
    a = gaussian(50, np.zeros(3), np.diag(one**2), seed=0)
    b = gaussian(70, shift, np.diag(other**2), seed=1)
    found = frechet(a, b)
    assert found["means"] == pytest.approx((shift**2).sum())
    assert found["covariances"] == pytest.approx(((one - other) ** 2).sum())
    assert found["distance"] == pytest.approx(found["means"] + found["covariances"])
    assert (found["samples"], found["reference"]) == (50, 70)


def test_one_covariance_leaves_the_means_alone():
    same = spd(6, 3)
    found = frechet(gaussian(40, np.zeros(6), same, seed=4), gaussian(90, np.full(6, 0.5), same, seed=5))
    assert found["distance"] == pytest.approx(6 * 0.25)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (20, 300), (12, 9)])
def test_equals_the_formula_also_where_covariances_are_singular(n: int, m: int):
    """Covariances that do not commute; with fewer samples than the 24 features they have no inverse."""
    rng = np.random.default_rng(6)
    a = torch.from_numpy(rng.standard_normal((n, 24)) @ spd(24, 7))
    b = torch.from_numpy(rng.standard_normal((m, 24)) @ spd(24, 8) + 0.2)
    assert frechet(a, b)["distance"] == pytest.approx(by_formula(a, b), rel=1e-6)


def test_a_set_is_at_no_distance_from_itself_and_sides_do_not_matter():
    a, b = (torch.randn(30, 50, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    assert frechet(a, a)["distance"] == pytest.approx(0.0, abs=1e-9)
    assert frechet(a, b)["distance"] == pytest.approx(frechet(b, a)["distance"])
    turn = torch.linalg.qr(torch.randn(50, 50, generator=torch.Generator().manual_seed(3)).double()).Q
    assert frechet(a.double() @ turn + 2, b.double() @ turn + 2)["distance"] == pytest.approx(
        frechet(a, b)["distance"]
    )


def test_its_bias_falls_as_one_over_the_number_of_samples():
    """Two sets from one Gaussian lie at 0; what is found instead halves when the sets double."""
    draw = torch.Generator().manual_seed(9)
    found = []
    for n in (200, 400, 800):
        several = [frechet(*torch.randn(2, n, 8, generator=draw))["distance"] for _ in range(20)]
        found.append(sum(several) / len(several))
    assert found[0] > found[1] > found[2] > 0
    assert math.log2(found[0] / found[2]) / 2 == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(1, 4), torch.zeros(5, 4)),
        (torch.zeros(5, 4), torch.zeros(5, 3)),
        (torch.full((5, 4), torch.nan), torch.zeros(5, 4)),
        (torch.zeros(5), torch.zeros(5, 4)),
    ],
)
def test_what_has_no_distance_is_refused(a: torch.Tensor, b: torch.Tensor):
    with pytest.raises(InputError):
        frechet(a, b)
