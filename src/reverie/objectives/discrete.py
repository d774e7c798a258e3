"""What autoencoders with discrete codes pay for: the likelihood of colours, and how the codes are chosen.

DALL-E (Ramesh et al. 2021, 2102.12092, appendix A): the negative evidence lower bound is

    -ln p(x | choice) + beta KL(q(choice | x) || uniform)

and VQ-VAE (van den Oord et al. 2017, 1711.00937, equation 3):

    |sg(features) - vectors|^2 + beta |features - sg(vectors)|^2
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logit_laplace(x: Tensor, mean: Tensor, log_scale: Tensor, *, least: float = 0.0) -> Tensor:
    """-ln f(x) of colours in (0, 1), the mean over all numbers, in nats; all of one shape. b is `least` or more.

    f(x | m, b) = exp(-|logit(x) - m| / b) / (2 b x (1 - x)), DALL-E's appendix A.3: its mass lies inside (0, 1), as
    that of colours, which the Laplace and the normal distributions do not know.
    """
    if least > 0:
        log_scale = log_scale.clamp(min=math.log(least))
    apart = (torch.logit(x) - mean).abs() * (-log_scale).exp()
    return (apart + math.log(2) + log_scale + x.log() + torch.log1p(-x)).mean()


def from_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in nats, of logits `b v h w`, the mean over the places: 0 to ln v."""
    log = logits.float().log_softmax(1)
    return (log.exp() * log).sum(1).mean() + math.log(logits.shape[1])


def commitment(features: Tensor, vectors: Tensor, *, beta: float = 0.25, learned: bool = False) -> Tensor:
    """beta |features - sg(vectors)|^2, the mean; with `learned` also what moves the vectors to the features."""
    loss = beta * (features - vectors.detach()).square().mean()
    return loss + (features.detach() - vectors).square().mean() if learned else loss
