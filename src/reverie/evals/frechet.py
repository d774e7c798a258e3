"""The Frechet distance of two sets of features (Dowson and Landau 1982), as Heusel et al. 2017 (1706.08500) use it.

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

of the Gaussians with the sets' means and covariances. The features here are those of our own encoders; numbers on
Inception's features ("FID") or I3D's ("FVD") are other numbers, and none of them can be compared with these.

No square root of a matrix is taken: with S_a = A' A and S_b = B' B, A and B the centred samples over sqrt(n - 1), the
eigenvalues of S_a S_b are the squared singular values of A B', so the trace is their sum. It is exact, and stable where
there are fewer samples than features and both covariances are singular.

It is biased: from finite samples it comes out too high, by about a constant over their number (Chong and Forsyth,
1911.07023), so only numbers from equally many samples compare; real samples of that number, beside it, are its floor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reverie.errors import InputError


@torch.no_grad()
def frechet(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """The distance of `n d` and `m d`: `distance` = `means` + `covariances`, and the numbers `samples`, `reference`.

    InputError: fewer than two of either, unlike widths, or features that are not finite.
    """
    for name, some in (("samples", samples), ("reference", reference)):
        if some.ndim != 2 or len(some) < 2:
            raise InputError(f"{name} are of shape {tuple(some.shape)}: give features `n d`, n 2 or more.")
        if not some.isfinite().all():
            raise InputError(f"some features of the {name} are not finite: the encoder is broken.")
    if samples.shape[1] != reference.shape[1]:
        raise InputError(
            f"features of width {samples.shape[1]} and {reference.shape[1]} have no distance: use one encoder."
        )
    (mean_a, root_a), (mean_b, root_b) = _gaussian(samples), _gaussian(reference)
    means = float(((mean_a - mean_b) ** 2).sum())
    common = float(torch.linalg.svdvals(root_a @ root_b.T).sum())
    covariances = float((root_a**2).sum() + (root_b**2).sum()) - 2 * common
    return {
        "distance": means + max(covariances, 0.0),
        "means": means,
        "covariances": max(covariances, 0.0),
        "samples": len(samples),
        "reference": len(reference),
    }


def _gaussian(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean `d`, and R `min(n, d) d` with R' R the covariance."""
    rows = rows.double().cpu()
    mean = rows.mean(0)
    return mean, torch.linalg.qr((rows - mean) / math.sqrt(len(rows) - 1), mode="r").R
