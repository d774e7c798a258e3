"""Several processes on one batch, as torchrun starts them: the one file that knows torch.distributed.

    with processes():                                # alone, nothing happens
        model = spread(model, shard=True)            # FSDP2; without `shard`, DDP
        loss, quiet = together(model, model.loss)

Convention: rank r has the r-th of equal parts of the batch, so gradients and losses are means over the processes. gloo
on CPUs; on GPUs nccl, a process to each. All processes do the same between the steps, and only the first one writes.
What they tell each other is JSON over gloo, whatever the gradients go by; the data and the run's folder lie where all
of them can read.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reverie.errors import InputError
from reverie.objectives.contrastive import ALONE, Peers

Losses = Mapping[str, Tensor]
Loss = Callable[[Mapping[str, Any]], Losses]
Quiet = Callable[[bool], AbstractContextManager]

PATIENCE = timedelta(
    days=2
)  # the first process may decode a folder while the others wait; torchrun sees to deaths


@contextmanager
def processes() -> Iterator[Peers]:
    """Joins the processes that torchrun started with this one, and leaves them at the end.

    InputError: there are more of them than GPUs.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield ALONE
        return
    if torch.cuda.is_available():
        number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= gpus:
            raise InputError(
                f"Process {number} of this machine has no GPU to itself, of which it has {gpus}: give --nproc-per-node"
                f" {gpus}, or set CUDA_VISIBLE_DEVICES to nothing for processors."
            )
        torch.cuda.set_device(number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", **_meeting())
    try:
        for purpose in ("steps", "saves"):  # of two threads, each needs a line of its own
            _teams[purpose] = Team(
                rank=dist.get_rank(),
                count=dist.get_world_size(),
                group=dist.new_group(backend="gloo", timeout=PATIENCE),
            )
        yield peers()
    except SystemExit:  # stopped by a signal: torchrun ends the others as soon as one has left
        team().hear()
        raise
    finally:
        _teams.clear()
        dist.destroy_process_group()


def _meeting() -> dict[str, Any]:
    """Where the processes of this attempt meet; by default as torch.distributed says.

    After a restart torchrun gives them the store of the attempt before, where addresses of dead processes lie (torch
    2.13). On one machine all know how many attempts there were, and each has a part of the store to itself.
    """
    here = os.environ
    if here.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or here["LOCAL_WORLD_SIZE"] != here["WORLD_SIZE"]:
        return {}
    store = dist.TCPStore(here["MASTER_ADDR"], int(here["MASTER_PORT"]), is_master=False)
    return {
        "store": dist.PrefixStore(f"attempt {here['TORCHELASTIC_RESTART_COUNT']}", store),
        "rank": int(here["RANK"]),
        "world_size": int(here["WORLD_SIZE"]),
    }


# ---------------------------------------------------------------- what they tell each other


@dataclass(frozen=True, kw_only=True)
class Team:
    """The processes of a run, of which this is number `rank`. Each method is called by all of them, in one order."""

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def hear(self, value: Any = None) -> list[Any]:
        """What each process says, by rank: anything that JSON can hold. Returns when all have spoken."""
        if self.count == 1:
            return [value]
        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(lengths, torch.tensor([len(said)]), group=self.group)
        longest = max(int(length) for length in lengths)
        heard = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
        dist.all_gather(heard, nn.functional.pad(said, (0, longest - len(said))), group=self.group)
        return [
            json.loads(bytes(text[: int(length)].tolist()))
            for text, length in zip(heard, lengths, strict=True)
        ]

    def any(self, flag: bool) -> bool:
        """Whether it is true for one of them."""
        return any(self.hear(flag))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """First the first process alone, then the others, which find what it wrote."""
        if not self.first:
            self.hear()
        yield
        if self.first:
            self.hear()


_teams: dict[str, Team] = {}


def team(purpose: str = "steps") -> Team:
    """The processes of this run; of its background saves, with the purpose "saves"."""
    return _teams.get(purpose, Team())


def mean(values: Tensor) -> Tensor:
    """Over the processes: the same on each of them."""
    if team().count == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / team().count


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


# ---------------------------------------------------------------- one model on all of them


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model that hold trained weights: the members of its outermost lists."""
    found: list[nn.Module] = []
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            found += [block for block in module if any(p.requires_grad for p in block.parameters())]
        else:
            found += blocks_of(module)
    return found


_plain: WeakKeyDictionary[nn.Module, nn.Module] = (
    WeakKeyDictionary()
)  # sharded -> its shape, without its weights


def spread(model: nn.Module) -> bool:
    """Shards the trained weights over the processes, in place (FSDP2, `fully_shard`), block by block.

    Call it before the optimizer takes the parameters. Frozen weights stay whole. False: alone, it does nothing.
    """
    if team().count == 1:
        return False
    from torch.distributed.fsdp import fully_shard

    shapes: dict[int, Any] = {
        id(value): nn.Parameter(value.to("meta"), requires_grad=value.requires_grad)
        if isinstance(value, nn.Parameter)
        else value.to("meta")
        for value in model.state_dict(keep_vars=True).values()
    }
    _plain[model] = copy.deepcopy(model, shapes)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for part in [*blocks_of(model), model]:
        fully_shard(part, ignored_params=frozen)
    return True


def whole(model: nn.Module) -> nn.Module:
    """The model with all of its weights, on every process: a copy of a sharded one, any other itself."""
    if model not in _plain:
        return model
    copied = copy.deepcopy(_plain[model])
    copied.load_state_dict({name: full(value) for name, value in model.state_dict().items()}, assign=True)
    return copied.eval()


def together(model: nn.Module, loss: Loss) -> tuple[Loss, Quiet]:
    """The loss, whose gradients are then means over the processes, and a context that puts this off unless told not to.

    With gradients accumulated over several batches, only the last one's backward pass need talk.
    """
    if team().count == 1:
        return loss, lambda last: nullcontext()
    if model in _plain:
        from torch.distributed.fsdp import register_fsdp_forward_method

        sharded: Any = model
        sharded._loss_of_all = loss
        register_fsdp_forward_method(model, "_loss_of_all")

        def put_off(last: bool) -> AbstractContextManager:
            sharded.set_requires_gradient_sync(last)
            return nullcontext()

        return sharded._loss_of_all, put_off
    if not any(p.requires_grad for p in model.parameters()):
        return loss, lambda last: nullcontext()
    copies = nn.parallel.DistributedDataParallel(_Loss(model, loss), find_unused_parameters=True)
    return copies, lambda last: nullcontext() if last else copies.no_sync()


class _Loss(nn.Module):
    """What DDP wraps: its forward is the loss, and only "loss" leads back to the weights."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self._loss = model, loss
        self.unused = nn.Parameter(
            torch.zeros(1)
        )  # DDP would warn in vain when there is none that a batch leaves out

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            name: value if name == "loss" else value.detach() for name, value in self._loss(batch).items()
        }


# ---------------------------------------------------------------- tensors in parts


def in_parts(tensor: Tensor) -> bool:
    """Whether each process holds only a part of it."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of it that this process holds; all of it where it is not in parts."""
    held: Any = tensor
    return held.to_local() if in_parts(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of it, on every process."""
    parted: Any = tensor
    return parted.full_tensor() if in_parts(tensor) else tensor.detach()


def copied(tensor: Tensor) -> Tensor:
    """A copy that later steps do not change: in memory of the processor, or, in parts, where it is."""
    return tensor.detach().clone() if in_parts(tensor) else tensor.detach().to("cpu", copy=True)


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copies `value`, whole and alike on every process, into `target`, which may be in parts."""
    if in_parts(target):
        from torch.distributed.tensor import distribute_tensor

        parted: Any = target
        own = distribute_tensor(
            value.to(target.device), parted.device_mesh, parted.placements, src_data_rank=None
        )
        local(target).copy_(local(own))
    else:
        target.copy_(value)


def write_parts(folder: Path, tensors: Mapping[str, Tensor], group: Any) -> None:
    """Writes tensors in parts into `folder` (DCP), a safetensors file for each process; called by all of `group`.

    OSError on each of them when one could not.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as failed:  # no Exception, but what each process raised
        reasons = [f"process {rank}: {error}" for rank, (error, _) in failed.failures.items()]
        raise OSError("; ".join(reasons)) from failed


def shapes_of_parts(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, whole shapes and types of what `write_parts` left."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    entries: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def read_parts(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Reads into `targets`, whole or in any other number of parts (DCP); each process reads what it needs by itself."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    alone = not any(map(in_parts, targets.values()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it shall be
        checkpoint.load(dict(targets), storage_reader=reader, no_dist=alone)
