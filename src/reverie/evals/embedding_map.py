"""Embeddings laid out on a page, so that what is alike lies together: t-SNE (van der Maaten and Hinton, 2008), exact.

Each vector's neighbours are given probabilities by a Gaussian whose width is chosen for the `perplexity`; on the page
the probabilities are by Student's t of one degree of freedom; their divergence goes downhill by gradient descent with
momentum. Time and memory grow with the square of the number: 1,500 vectors take some ten seconds on one thread.
Near and far mean something within a cluster; the distance between clusters and their sizes mean little.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reverie import rng

EXAGGERATION, EARLY = 12.0, 250  # the first steps pull clusters together
GRAIN = 1e-4  # the spread of the start; small, so that neighbours decide and not the start


def principal(vectors: Tensor, axes: int) -> Tensor:
    """The coordinates of vectors `n d` along their `axes` principal axes, in double: `n axes`, zeros where none is.

    The sign of an axis is that which makes the largest part of it positive, so the same vectors give the same picture.
    """
    assert vectors.ndim == 2, vectors.shape
    centred = vectors.double() - vectors.double().mean(0)
    _, _, rows = torch.linalg.svd(centred, full_matrices=False)
    rows = rows[:axes]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    found = centred @ (rows * torch.where(largest < 0, -1.0, 1.0)).T
    return torch.nn.functional.pad(found, (0, axes - found.shape[1]))


@torch.no_grad()
def tsne(
    vectors: Tensor, *, perplexity: float = 30.0, axes: int = 30, steps: int = 750, seed: int = 0
) -> Tensor:
    """Places on a page of vectors `n d`, n at least 1: float32 `n 2`, around zero. The same on every call.

    perplexity: about how many neighbours count; fewer where there are few. axes: what is kept of the vectors first.
    """
    n = len(vectors)
    assert n > 0, "nothing has no place"
    reduced = principal(vectors, axes)
    start = reduced[:, :2] / reduced[:, 0].std(correction=0).clamp_min(1e-12)
    start += 0.01 * torch.randn(
        n, 2, dtype=torch.double, generator=rng.generator(seed, "tsne")
    )  # parts what is equal
    if n < 5:  # too few for neighbourhoods
        return (start - start.mean(0)).float()
    joint = _joint(reduced, min(perplexity, (n - 1) / 3)).float()
    page = (start * GRAIN).float()
    speed, gains = torch.zeros_like(page), torch.ones_like(page)
    rate = max(n / EXAGGERATION / 4, 50.0)  # Belkina et al. 2019
    for step in range(steps):
        early = step < EARLY
        square = page.square().sum(1)
        near = (
            torch.addmm(square[:, None] + square, page, page.T, alpha=-2).clamp_min_(0).add_(1).reciprocal_()
        )
        near.fill_diagonal_(0)
        force = torch.sub(joint, near, alpha=1 / (float(near.sum()) * (EXAGGERATION if early else 1.0))).mul_(
            near
        )
        pull = (EXAGGERATION if early else 1.0) * 4 * (force.sum(1, keepdim=True) * page - force @ page)
        gains = torch.where(pull.sign() != speed.sign(), gains + 0.2, gains * 0.8).clamp_min_(0.01)
        speed = (0.5 if early else 0.8) * speed - rate * gains * pull
        page = page + speed
        page -= page.mean(0)
    return page


def _joint(points: Tensor, perplexity: float) -> Tensor:
    """The probability that two of the points are neighbours: `n n`, symmetric, together 1, none on the diagonal."""
    n = len(points)
    square = points.square().sum(1)
    far = (square[:, None] + square - 2 * points @ points.T).clamp_min(0)
    far = far / far.sum().clamp_min(1e-300) * n * (n - 1)  # whatever the scale of the vectors
    own = torch.eye(n, dtype=torch.bool)
    far = far - far.masked_fill(own, torch.inf).amin(
        1, keepdim=True
    )  # so that the nearest counts, however far
    low, high = torch.full((n, 1), -40.0).double(), torch.full((n, 1), 40.0).double()
    for _ in range(60):  # the logarithm of 1 / (2 sigma^2), by halving
        middle = (low + high) / 2
        weight = torch.exp(-far * middle.exp()).masked_fill(own, 0)
        share = weight / weight.sum(1, keepdim=True)
        entropy = torch.special.entr(share).sum(1, keepdim=True)
        wide = entropy > np.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return (share + share.T) / (2 * n)


def seats(page: Tensor, columns: int, rows: int) -> list[tuple[int, int]]:
    """A cell (column, row) of its own for each place `n 2` on a page: the nearest that is free, in order."""
    n = len(page)
    assert n <= columns * rows, (n, columns, rows)
    places = page.double().numpy()
    low, high = places.min(0), places.max(0)
    reach = np.where(high > low, high - low, 1.0)
    part = np.where(high > low, (places - low) / reach, 0.5)
    wanted = part * (columns - 1, rows - 1)
    across, down = np.meshgrid(np.arange(columns), np.arange(rows))
    cells = np.stack([across.reshape(-1), down.reshape(-1)], 1)
    free = np.zeros(len(cells))
    found = []
    for at in wanted:
        best = int((((cells - at) ** 2).sum(1) + free).argmin())
        free[best] = np.inf
        found.append((int(cells[best, 0]), int(cells[best, 1])))
    return found
