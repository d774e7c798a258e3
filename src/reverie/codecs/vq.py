"""An autoencoder with a learned codebook: VQ-VAE (van den Oord et al. 2017, 1711.00937) with the networks of VQGAN
("Taming Transformers for High-Resolution Image Synthesis", Esser et al. 2020, 2012.09841).

    picture --- codecs/vae.py's encoder --- features --- the nearest vector of the codebook --- codes
    codes --- vectors --- codecs/vae.py's decoder --- picture

Gradients pass the choice as if it were not there (straight-through). The codebook follows the features that chose it,
as a moving average (1711.00937, appendix A.1); a vector that none chooses any more begins anew at a feature of the
batch (Jukebox, 2005.00341, section 3): `MovingCodebook`. Or it learns by gradients, as VQGAN's does. With
`choice="argmax"` a 1 x 1 convolution says how likely each code is, as in taming-transformers' Gumbel models.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reverie.codecs.dvae import check_codes, check_picture
from reverie.codecs.vae import Decoder, Encoder, VaeConfig
from reverie.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class VqConfig:
    kind: Literal["vq"] = "vq"
    vocab: int = 1024
    dim: int = 256  # numbers of a vector of the codebook
    channels: int = 256  # between the networks and the codebook
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)  # of the levels; each but the last halves the side
    depth: int = 2  # residual blocks of a level going down; one more going up
    groups: int = 32  # of the normalisation
    attention: int = 1  # of the lowest levels, how many attend after each block
    middle: bool = True  # whether the middle attends
    choice: Literal["nearest", "argmax"] = "nearest"

    def __post_init__(self) -> None:
        if min(self.vocab, self.dim) < 1:
            raise InputError(f"vocab {self.vocab} and dim {self.dim} must be 1 or more.")
        self.networks()

    def networks(self) -> VaeConfig:
        """What the encoder and the decoder are built from. InputError: they cannot be."""
        return VaeConfig(
            channels=self.channels, widths=self.widths, depth=self.depth, groups=self.groups,
            attention=self.attention, middle=self.middle,
        )  # fmt: skip


class VqVae(nn.Module):
    """`encode`: `b 3 h w` in [-1, 1] -> codes `b h/s w/s`; `decode` back. `codebook v d`."""

    def __init__(self, config: VqConfig):
        super().__init__()
        networks = config.networks()
        self.config, self.vocab, self.stride = config, config.vocab, 2 ** (len(config.widths) - 1)
        self.encoder = Encoder(networks, out=config.channels)
        self.decoder = Decoder(networks)
        by_logits = config.choice == "argmax"
        self.quant = nn.Conv2d(config.channels, config.channels if by_logits else config.dim, 1)
        self.choose = nn.Conv2d(config.channels, config.vocab, 1) if by_logits else None
        self.codebook = nn.Parameter(torch.empty(config.vocab, config.dim))
        nn.init.uniform_(self.codebook, -1 / config.vocab, 1 / config.vocab)
        self.unquant = nn.Conv2d(config.dim, config.channels, 1)

    def features(self, image: Tensor) -> Tensor:
        """What the codes are chosen by, `b d h/s w/s`; of a model that chooses by logits, these, `b v h/s w/s`."""
        check_picture(image, self.stride)
        x = self.quant(self.encoder(image))
        return x if self.choose is None else self.choose(x)

    def chosen(self, features: Tensor) -> Tensor:
        """The codes of `features`, int64 `b h w`."""
        if self.choose is not None:
            return features.argmax(1)
        flat = rearrange(features, "b d h w -> (b h w) d")
        # |f - e|^2 without |f|^2, which is the same for all.
        far = torch.addmm(self.codebook.square().sum(1), flat, self.codebook.T.to(flat), beta=1, alpha=-2)
        b, _, h, w = features.shape
        return rearrange(far.argmin(1), "(b h w) -> b h w", b=b, h=h, w=w)

    def vectors(self, codes: Tensor) -> Tensor:
        """Those of the codebook, `b d h w`."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def draw(self, vectors: Tensor) -> Tensor:
        """`b d h w` -> pictures, about [-1, 1]."""
        return self.decoder(self.unquant(vectors))

    def encode(self, image: Tensor) -> Tensor:
        """Pictures -> codes. InputError: sides that are no multiples of the stride."""
        return self.chosen(self.features(image))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `b h w` -> pictures, about [-1, 1]. InputError: codes that the codebook has not."""
        check_codes(codes, self.vocab)
        return self.draw(self.vectors(codes))


def passed(features: Tensor, vectors: Tensor) -> Tensor:
    """`vectors` in value, of which gradients go to `features`: the straight-through estimator."""
    return features + (vectors - features).detach()


class MovingCodebook(nn.Module):
    """How often each vector was chosen of late and by what; `advance` moves the codebook there.

    It keeps nothing of a batch but `counts` and `sums`, so that a step that was skipped leaves no trace.

    decay: of the averages. patience: after so many steps without being chosen a vector begins anew.
    """

    counts: Tensor
    sums: Tensor
    idle: Tensor

    def __init__(self, vocab: int, dim: int, *, decay: float = 0.99, patience: int = 100):
        super().__init__()
        self.decay, self.patience = decay, patience
        self.register_buffer("counts", torch.zeros(vocab))
        self.register_buffer("sums", torch.zeros(vocab, dim))
        self.register_buffer(
            "idle", torch.full((vocab,), patience)
        )  # all begin at features of the first batch

    @torch.no_grad()
    def advance(self, codebook: Tensor, features: Tensor, codes: Tensor, generator: torch.Generator) -> int:
        """After a step: `features n d` chose `codes n`, of all processes. How many vectors began anew."""
        vocab = len(codebook)
        found = torch.bincount(codes, minlength=vocab).to(self.counts)
        total = torch.zeros_like(self.sums).index_add_(0, codes, features.to(self.sums))
        self.counts.lerp_(found, 1 - self.decay)
        self.sums.lerp_(total, 1 - self.decay)
        self.idle.add_(1)
        self.idle[found > 0] = 0
        # Laplace smoothing, as in the paper: a vector that is hardly chosen is not divided by next to nothing.
        whole = self.counts.sum()
        smooth = (self.counts + 1e-5) / (whole + vocab * 1e-5) * whole
        moved = self.counts > 0
        codebook[moved] = (self.sums / smooth[:, None])[moved].to(codebook)
        dead = (self.idle >= self.patience).nonzero()[:, 0]
        if len(dead):
            places = torch.randint(len(features), (len(dead),), generator=generator).to(features.device)
            begin = features[places].to(codebook)
            codebook[dead] = begin
            self.counts[dead], self.sums[dead] = 1.0, begin.to(self.sums)
            self.idle[dead] = 0
        return len(dead)
