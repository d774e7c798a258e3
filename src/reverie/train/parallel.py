"""Several processes on one batch, as torchrun starts them: the one file that knows torch.distributed.

    with processes() as peers:                       # alone, nothing happens
        loss = info_nce(image, text, scale, peers=peers)

Convention: rank r has the r-th of equal parts of the batch. gloo on CPUs; on GPUs nccl, a process to each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from reverie.objectives.contrastive import ALONE, Peers


@contextmanager
def processes() -> Iterator[Peers]:
    """Joins the processes that torchrun started with this one, and leaves them at the end."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield peers()
    finally:
        dist.destroy_process_group()


def peers() -> Peers:
    """What a contrastive loss needs of the processes that this one has joined, if any."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    return Peers(rank=dist.get_rank(), count=dist.get_world_size(), gather=_Gather.apply, pass_on=_pass_on)


class _Gather(torch.autograd.Function):
    """`b ...` -> `B ...`, in the order of ranks. Back: the sum over processes of their gradients of this `b ...`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        count = dist.get_world_size()
        every = x.new_empty(count * len(x), *x.shape[1:])
        dist.all_gather(list(every.chunk(count)), x.contiguous())
        return every

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        parts = list(gradient.contiguous().chunk(dist.get_world_size()))
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own


def _pass_on(x: Tensor) -> Tensor:
    rank, count = dist.get_rank(), dist.get_world_size()
    x = x.contiguous()
    received = torch.empty_like(x)
    there = dist.P2POp(dist.isend, x, (rank + 1) % count)
    here = dist.P2POp(dist.irecv, received, (rank - 1) % count)
    for work in dist.batch_isend_irecv([there, here]):
        work.wait()
    return received
