"""Adversarial losses: a discriminator tells drawn from real, and a generator learns to pass (Goodfellow et al. 2014).

The hinge form (Lim and Ye 2017, 1705.02894; Tran et al. 2017) of VQGAN (Esser et al. 2020, 2012.09841, section 3.2) and
latent diffusion (Rombach et al. 2021, 2112.10752, appendix G), with their adaptive weight. Logits have any shape, one
for a patch: high for real.
"""

from __future__ import annotations

import torch
from torch import Tensor


def discriminator_hinge(real: Tensor, drawn: Tensor) -> Tensor:
    """What the discriminator pays: nothing where real is above 1 and drawn below -1; 1 where it knows nothing."""
    return 0.5 * ((1 - real).relu().mean() + (1 + drawn).relu().mean())


def generator_hinge(drawn: Tensor) -> Tensor:
    """What the generator pays: the less, the more real its drawings look."""
    return -drawn.mean()


def adaptive_weight(main: Tensor, adversarial: Tensor, last: Tensor, *, most: float = 1e4) -> Tensor:
    """The factor that makes both losses pull equally hard at the generator's last layer: |d main| / |d adversarial|.

    Equation 7 of VQGAN. `last` is a weight that both depend on; `most` bounds the factor where the second gradient
    vanishes. A number without gradient; the graphs of both losses are kept.
    """
    (ours,) = torch.autograd.grad(main, last, retain_graph=True)
    (theirs,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (ours.norm() / (theirs.norm() + 1e-4)).clamp(0, most).detach()
