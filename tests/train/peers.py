"""What every process of a group checks: `torchrun --nproc-per-node N peers.py`, or without torchrun `peers.py 1 2 4`.

The latter starts groups of so many by itself, as torchrun would, but torch is imported only once.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
import sys

import torch
import torch._dynamo  # checkpoints and DDP import it at their first call, in every process then
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from reverie.encoders.med import MedConfig
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.objectives.contrastive import ALONE, Peers, accuracy, info_nce, sigmoid_loss
from reverie.systems.blip import Blip, BlipConfig
from reverie.systems.blip_training import BlipTraining
from reverie.systems.clip import Clip, ClipConfig
from reverie.train.gradient_cache import cached
from reverie.train.parallel import processes

BATCH = 24


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 1:
        check()
    for count in map(int, sys.argv[1:]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        group = [
            multiprocessing.get_context("fork").Process(target=start, args=(rank,)) for rank in range(count)
        ]
        for process in group:
            process.start()
        for process in group:
            process.join()
        if any(process.exitcode for process in group):
            sys.exit(1)


def start(rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "checks"}
    check()


def check() -> None:
    with processes() as peers:
        count = int(os.environ["WORLD_SIZE"])
        assert peers.count == count
        assert (peers is ALONE) == (count == 1)
        mine = slice(peers.rank * BATCH // count, (peers.rank + 1) * BATCH // count)
        moves(peers, mine)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            for kind in ("softmax", "sigmoid"):
                for labelled in (False, True):
                    losses(peers, mine, kind, labelled, dtype, tolerance)
        for kind in ("softmax", "sigmoid"):
            for chunk in (0, 2):
                systems(peers, mine, kind, chunk)
        mixtures(peers, mine)
    assert not dist.is_initialized()
    sys.stdout.write(f"rank {peers.rank} of {count} agrees\n")  # at once, or two processes mix
    sys.stdout.flush()


def mean(x: Tensor, peers: Peers) -> Tensor:
    """Over the processes, as DDP and FSDP take it."""
    x = x.detach().clone()
    if peers.count > 1:
        dist.all_reduce(x)
    return x / peers.count


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, what
    error = (found - expected).norm() / expected.norm()
    assert error <= tolerance, f"{what}: {error}"


def moves(peers: Peers, mine: slice) -> None:
    """Everything everywhere in order; the sum of all gradients back; a ring that ends at home."""
    whole = torch.arange(BATCH * 2.0).reshape(BATCH, 2)
    part = whole[mine].clone().requires_grad_()
    every = peers.gather(part)
    assert torch.equal(every, whole)
    (every * whole * (peers.rank + 1)).sum().backward()
    assert torch.equal(part.grad, whole[mine] * sum(range(1, peers.count + 1)))
    x, seen = part.detach(), []
    for _ in range(peers.count):
        seen.append(x)
        x = peers.pass_on(x)
    assert torch.equal(x, part)
    assert torch.equal(torch.cat(seen).sort(0).values, whole)


def losses(
    peers: Peers, mine: slice, kind: str, labelled: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Loss, accuracy and gradients of the vectors, the scale and the bias are those of one process."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, BATCH, 8, generator=generator, dtype=dtype)
    a, b = F.normalize(a, dim=-1), F.normalize(a + b, dim=-1)
    label = torch.arange(BATCH) * 5 % 17 if labelled else None

    def run(part: slice, peers: Peers) -> list[Tensor]:
        given = [
            a[part].clone(),
            b[part].clone(),
            torch.tensor([8.0]).to(dtype),
            torch.tensor([-3.0]).to(dtype),
        ]
        given = [x.requires_grad_() for x in given]
        own = None if label is None else label[part]
        if kind == "softmax":
            loss = info_nce(*given[:3], label=own, peers=peers)
        else:  # around the ring: nobody gathers vectors
            loss = sigmoid_loss(*given, label=own, peers=dataclasses.replace(peers, gather=None))
        (loss * 3).backward()
        found = accuracy(a[part], b[part], label=own, peers=dataclasses.replace(peers, gather=None))
        return [loss, found, *(x.grad for x in given if x.grad is not None)]

    loss, share, rows, columns, *rest = run(mine, peers)
    one_loss, one_share, one_rows, one_columns, *one_rest = run(slice(None), ALONE)
    what = f"{kind} {labelled} {dtype}"
    close(mean(loss, peers), one_loss, tolerance, f"{what} loss")
    close(mean(share, peers), one_share, 1e-6, f"{what} accuracy")
    close(rows / peers.count, one_rows[mine], tolerance, f"{what} rows")
    close(columns / peers.count, one_columns[mine], tolerance, f"{what} columns")
    assert len(rest) == len(one_rest) == (1 if kind == "softmax" else 2)
    for x, y in zip(rest, one_rest, strict=True):
        close(mean(x, peers), y, tolerance, f"{what} scale or bias")


class Trained(nn.Module):
    """What DDP wraps: its forward is the loss."""

    def __init__(self, clip: Clip, peers: Peers, chunk: int):
        super().__init__()
        self.clip, self.peers, self.chunk = clip, peers, chunk

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        vectors = cached(self.clip.embed, batch, chunk=self.chunk)
        return self.clip.compare(*vectors, label=batch["label"], peers=self.peers)["loss"]


def systems(peers: Peers, mine: slice, kind: str, chunk: int) -> None:
    """Three steps of a small CLIP under DDP, gradients cached or not, leave the weights of one process."""
    image = VitConfig(size=16, patch=8, width=16, depth=1, heads=2)
    text = TextConfig(vocab=32, length=6, width=16, depth=1, heads=2, end=31)
    config = ClipConfig(image=image, text=text, width=8, loss=kind)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 31, (BATCH, 6), generator=generator)
    tokens[torch.arange(BATCH), torch.arange(BATCH) % 4 + 2] = 31
    batch = {
        "image": torch.rand(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1,
        "tokens": tokens,
        "label": torch.arange(BATCH) * 5 % 17,
    }

    def run(part: slice, peers: Peers, chunk: int) -> Clip:
        torch.manual_seed(0)
        clip = Clip(config).double()
        trained: nn.Module = Trained(clip, peers, chunk)
        if peers.count > 1:
            trained = DistributedDataParallel(trained)
        for _ in range(3):
            clip.zero_grad()
            trained({key: value[part] for key, value in batch.items()}).backward()
            with torch.no_grad():
                for parameter in clip.parameters():
                    parameter -= 0.1 * parameter.grad
        return clip

    found, expected = run(mine, peers, chunk), run(slice(None), ALONE, 0)
    torch.manual_seed(0)
    for (name, one), other, first in zip(
        found.named_parameters(), expected.parameters(), Clip(config).double().parameters(), strict=True
    ):
        assert not torch.equal(other, first), f"{name} has not moved"
        close(one - first, other - first, 1e-10, f"{kind} chunk {chunk} {name}")
        close(one.grad, other.grad, 1e-10, f"{kind} chunk {chunk} gradient of {name}")


class Mixture(nn.Module):
    """The same for BLIP."""

    def __init__(self, training: BlipTraining, peers: Peers):
        super().__init__()
        self.training_of, self.peers = training, peers

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.training_of.loss(batch, peers=self.peers)


def mixtures(peers: Peers, mine: slice) -> None:
    """Three steps of a small BLIP, its slow copies and its queue: losses and weights of one process."""
    image = VitConfig(size=16, patch=8, width=16, depth=1, heads=2)
    text = MedConfig(
        vocab=32,
        length=6,
        width=16,
        depth=1,
        heads=2,
        hidden=32,
        context_width=16,
        start=2,
        end=3,
        decode=4,
        ground=5,
    )
    config = BlipConfig(image=image, text=text, width=8)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(6, 31, (BATCH, 6), generator=generator)
    tokens[torch.arange(BATCH)[:, None] % 4 + 2 < torch.arange(6)] = 0
    batch = {
        "image": torch.rand(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1,
        "tokens": tokens,
        "label": torch.arange(BATCH) * 5 % 17,
        "draws": torch.rand(BATCH, 2, generator=generator, dtype=torch.float64),
    }

    def run(part: slice, peers: Peers) -> tuple[BlipTraining, list[Tensor]]:
        torch.manual_seed(0)
        training = BlipTraining(Blip(config), queue=40).double()
        trained: nn.Module = Mixture(training, peers)
        if peers.count > 1:
            trained = DistributedDataParallel(trained)
        told = []
        for step in range(3):
            training.zero_grad()
            own = {key: value.roll(step, 0)[part] for key, value in batch.items()}
            # One process may have longer texts than the others.
            own["tokens"] = own["tokens"][:, : int((own["tokens"] != 0).sum(1).max())]
            found = trained(own | {"alpha": torch.tensor(0.2 * step)})
            found["loss"].backward()
            told += [mean(found[name], peers) for name in ("loss", "contrast", "matching", "writing")]
            with torch.no_grad():
                for parameter in training.blip.parameters():
                    parameter -= 0.1 * parameter.grad
            training.advance()
        return training, told

    (found, losses), (expected, others) = run(mine, peers), run(slice(None), ALONE)
    for one, other in zip(losses, others, strict=True):
        close(one, other, 1e-10, "a loss of BLIP")
    for (name, one), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        close(one.double(), other.double(), 1e-8, f"BLIP's {name}")


if __name__ == "__main__":
    main()
