"""Contrastive losses between two sets of unit vectors, at any size of batch.

Memory: the logits stand for a few rows at a time (`AT_ONCE`), so it is linear in the batch. The gradient is computed
beside the loss, row by row, exactly; backward only scales it.

Several processes, each with an equal part of one batch, are seen through `Peers`. A loss is then the mean over this
process's own rows, against the columns of all. The mean of these losses over the processes is the loss of the whole
batch, and the mean of the parameters' gradients is its gradient: the mean that DDP and FSDP take. For this each
process's gradients count for the vectors of the others too, so all must weigh their losses alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LARGEST_SCALE = 100.0  # CLIP, section 2.5: logits are never scaled by more
AT_ONCE = 2**21  # logits that exist at a time: 8 MB each for the cosines, the logits and their gradient


def _itself(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The processes that share a batch, as `train.parallel` gives them; by default there is no other.

    `gather`: `b ...` of each -> `B ...`, the same everywhere, in the order of ranks; gradients of `B ...` are summed
    over the processes on the way back. `pass_on`: sends a tensor to the next process and gives the one that the
    previous has sent, without gradient; after `count` times it is home.
    """

    rank: int = 0
    count: int = 1
    gather: Callable[[Tensor], Tensor] = _itself
    pass_on: Callable[[Tensor], Tensor] = _itself


ALONE = Peers()


def bounded(log_scale: Tensor) -> Tensor:
    """What cosines are multiplied by, from the logarithm that is learnt."""
    return log_scale.exp().clamp(max=LARGEST_SCALE)


def info_nce(
    a: Tensor, b: Tensor, scale: Tensor, *, label: Tensor | None = None, peers: Peers = ALONE
) -> Tensor:
    """CLIP's loss (2103.00020, figure 3): symmetric cross-entropy over scaled cosines of `a b d` and `b b d`.

    Items with equal `label b` are right for each other, such as two drawings of one thing: the targets share the
    weight equally (UniCL, 2204.03610, section 3.2). Without it only a pair's own other half is right. Every process
    gathers the vectors of all.
    """
    label = _labels(a, label, peers)
    labels, grad = peers.gather(label), torch.is_grad_enabled()
    forward: Tensor = _Softmax.apply(a, peers.gather(b), scale, label, labels, grad)
    backward: Tensor = _Softmax.apply(b, peers.gather(a), scale, label, labels, grad)
    return (forward + backward) / 2


def sigmoid_loss(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *, label: Tensor | None = None, peers: Peers = ALONE
) -> Tensor:
    """SigLIP's loss (2303.15343, algorithm 1): for every pair of `a b d` and `b b d` whether it belongs together.

    `label` as for `info_nce`. The sum over all pairs is divided by the number of items. The `b` of all processes go
    round in a ring (section 3.3), each with its gradient, so that none holds more than one part of the batch.
    """
    label, grad = _labels(a, label, peers), torch.is_grad_enabled()
    loss: Tensor = _Sigmoid.apply(a, b, scale, bias, label, peers, grad)
    return loss


def distilled_info_nce(
    rows: Tensor,
    columns: Tensor,
    slow_rows: Tensor,
    temperature: Tensor,
    right: Tensor,
    *,
    alpha: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """One direction of ALBEF's and BLIP's contrast with soft targets (2107.07651, section 3.3), and its logits `b m`.

    `rows b d` are compared with `columns m d`, which a slow copy of the other tower made, of this batch and of a queue
    of former ones. The targets: 1 - alpha on the columns that are `right b m`, in equal shares, and alpha by what the
    slow copy of this tower, `slow_rows b d`, finds alike. No gradient goes to the slow copies.
    """
    columns = columns.detach()
    logits = _cosines(rows, columns) / temperature
    with torch.no_grad():
        soft = (_cosines(slow_rows, columns) / temperature).softmax(1)
        target = alpha * soft + (1 - alpha) * right / right.sum(1, keepdim=True)
    return -(target * logits.log_softmax(1)).sum(1).mean(), logits


@torch.no_grad()
def accuracy(a: Tensor, b: Tensor, *, label: Tensor | None = None, peers: Peers = ALONE) -> Tensor:
    """The share of `a b d` whose nearest among the `b` of all processes is right for it."""
    label = _labels(a, label, peers)
    columns, there = b, label
    best, right = torch.full_like(a[:, 0], -torch.inf), torch.zeros_like(label, dtype=torch.bool)
    for hop in range(peers.count):
        if hop:
            columns, there = peers.pass_on(columns), peers.pass_on(there)
        for rows in _pieces(len(a), len(columns)):
            cosine, at = (a[rows] @ columns.T).max(1)
            nearer = cosine > best[rows]
            right[rows] = torch.where(nearer, there[at] == label[rows], right[rows])
            best[rows] = torch.where(nearer, cosine.to(best), best[rows])
    return right.float().mean()


def _labels(a: Tensor, label: Tensor | None, peers: Peers) -> Tensor:
    """`label`, or a number for each item that no other has."""
    return torch.arange(len(a), device=a.device) + peers.rank * len(a) if label is None else label


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows with at most `AT_ONCE` logits, but one row at least."""
    size = max(AT_ONCE // max(columns, 1), 1)
    return (slice(start, start + size) for start in range(0, rows, size))


def wide(x: Tensor) -> Tensor:
    """In fp32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """In the format of the matrix product (bf16 under autocast); all that follows is in fp32 or wider."""
    return wide(rows @ columns.T)


class _Gradients:
    """Of rows, columns and scale, added up from pieces of d loss / d logit, in fp32 or wider."""

    def __init__(self, rows: Tensor, columns: Tensor):
        wide = torch.promote_types(rows.dtype, torch.float32)
        self.rows, self.columns = (torch.zeros_like(x, dtype=wide) for x in (rows, columns))
        self.scale = rows.new_zeros((), dtype=wide)

    def add(
        self, part: slice, slope: Tensor, cosine: Tensor, rows: Tensor, columns: Tensor, scale: Tensor
    ) -> None:
        self.scale += (slope * cosine).sum()
        slope = (slope * scale).to(rows.dtype)
        self.rows[part] += slope @ columns
        self.columns += slope.T @ rows[part]


class _Softmax(torch.autograd.Function):
    """The mean over rows of the cross-entropy of their logits to `columns`; d loss / d logit = (p - target) / rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, label: Tensor, labels: Tensor, grad: bool
    ) -> Tensor:
        gradients = _Gradients(rows, columns)
        total = torch.zeros_like(gradients.scale)
        for part in _pieces(len(rows), len(columns)):
            cosine = _cosines(rows[part], columns)
            logits = scale * cosine
            right = rearrange(label[part], "r -> r 1") == labels
            target = right.to(logits.dtype) / right.sum(1, keepdim=True)
            norm = logits.logsumexp(1, keepdim=True)
            total += norm.sum() - (target * logits).sum()
            if grad:
                slope = logits.sub_(norm).exp_().sub_(target).div_(len(rows))
                gradients.add(part, slope, cosine, rows, columns, scale)
        return _kept(ctx, gradients, (rows, columns, scale), total / len(rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return *(slope * gradient for gradient in ctx.saved_tensors), None, None, None


class _Sigmoid(torch.autograd.Function):
    """The sum over pairs of softplus(-z logit), z being 1 or -1, by rows; d loss / d logit = (p - right) / rows."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, label: Tensor, peers: Peers, grad: bool
    ) -> Tensor:
        gradients, columns, labels = _Gradients(a, b), b, label
        total, shift = torch.zeros_like(gradients.scale), torch.zeros_like(gradients.scale)
        for _ in range(peers.count):
            for part in _pieces(len(a), len(columns)):
                cosine = _cosines(a[part], columns)
                logits = scale * cosine + bias
                right = rearrange(label[part], "r -> r 1") == labels
                total += F.softplus(torch.where(right, -logits, logits)).sum()
                if grad:
                    slope = logits.sigmoid_().sub_(right.to(logits.dtype)).div_(len(a))
                    shift += slope.sum()
                    gradients.add(part, slope, cosine, a, columns, scale)
            columns, labels = peers.pass_on(columns), peers.pass_on(labels)
            gradients.columns = peers.pass_on(gradients.columns)
        return _kept(ctx, gradients, (a, b, scale), total / len(a), (shift, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return *(slope * gradient for gradient in ctx.saved_tensors), None, None, None


def _kept(
    ctx: Any, gradients: _Gradients, like: tuple[Tensor, ...], loss: Tensor, *more: tuple[Tensor, Tensor]
) -> Tensor:
    """`loss`, its gradients being kept in the shape and format of what they are of."""
    found = (gradients.rows, gradients.columns, gradients.scale)
    pairs = (*zip(found, like, strict=True), *more)
    ctx.save_for_backward(*(gradient.to(x.dtype).expand_as(x) for gradient, x in pairs))
    return loss
