"""BERT's head (Devlin et al. 2018, 1810.04805): from features to the next, or a missing, word."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reverie.nn.linear import Linear, linear
from reverie.nn.mlp import ACTIVATIONS


class Words(nn.Module):
    """features `b n d` -> logits `b n v`, by the embedding `v d` that the words are read with, and a bias."""

    def __init__(self, width: int, vocab: int, *, activation: str, eps: float):
        super().__init__()
        self.dense = Linear(width, width)
        self.act = ACTIVATIONS[activation]()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        return linear(self.norm(self.act(self.dense(features))), embedding, self.bias)
