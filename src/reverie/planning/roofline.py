"""How long a counted step takes on a machine, and whether it fits: a roofline for every operator.

An operator takes the larger of what its FLOPs take at the attainable share of the peak and what its bytes take at the
attainable bandwidth, and at least the time of its launch ("Roofline", Williams et al. 2009). The steps of all operators
are added up, with AdamW's, and with the communication that backward does not hide. That is what the machine could do.

Real runs are slower: kernels miss their best, processes wait for the slowest, for data and for checkpoints. `ATTAINED`
is the one factor for all of that. This machine's own processor, whose peaks are measured, is taken at its word.

Memory: weights in fp32 with their gradients, AdamW's two moments and the average, and what is alive in the step at
most, counted. Sharded (FSDP2) everything but the activations is divided among the devices, and a block at a time,
with the next one, is gathered in the format of the products.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from reverie.errors import InputError
from reverie.planning.counting import Count
from reverie.planning.hardware import GB, Device
from reverie.train.parallel import blocks_of

# One number for each kind, for every machine and run; none is fitted to one run.
PRODUCT = 0.70  # of the peak: large products of cuBLAS in fp16 and bf16 reach 0.7 to 0.9
ATTENTION = 0.40  # of the peak: FlashAttention-2 at 256 to 1,024 positions, both ways (2307.08691, figure 4)
MEMORY = 0.80  # of the bandwidth: what copying kernels reach
WIRE = 0.80  # of a link: NCCL's bus bandwidth for large messages
ATTAINED = 0.5  # of the roofline: the median of the published runs of CLIP (`reverie plan --check`), rounded
BUCKET = (
    25e6  # bytes of gradients that DDP sends at a time; the last bucket has no backward left to hide behind
)

SHARDS = ("none", "ddp", "fsdp")
WIDE = 4  # bytes of a number in fp32


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How many numbers a system has: all, those that are trained, in fp32 words; and of its largest block."""

    all: int
    trained: int
    buffers: int
    block: int  # the largest of the parts that are gathered one by one
    rest: int  # what is trained and lies in no block

    @staticmethod
    def of(model: nn.Module) -> Weights:
        """Counted on the model, which may be on "meta"."""

        def trained(part: nn.Module) -> int:
            return sum(p.numel() for p in part.parameters() if p.requires_grad)

        sizes = [trained(block) for block in blocks_of(model)]  # as the engine shards them
        return Weights(
            all=sum(p.numel() for p in model.parameters()),
            trained=trained(model),
            buffers=sum(b.numel() for b in model.buffers()),
            block=max(sizes, default=0),
            rest=trained(model) - sum(sizes),
        )


@dataclass(frozen=True, kw_only=True)
class Setup:
    """On what, and how, a step is run."""

    device: Device
    gpus: int = 1
    shard: str = "none"  # one of SHARDS
    precision: str = "bf16"
    ema: bool = True
    passes: int = 1  # forward and backward passes of a step, each of which gathers what is sharded

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise InputError(f"gpus is {self.gpus}: give 1 or more.")
        if self.shard not in SHARDS:
            raise InputError(f"shard is {self.shard!r}: give one of {', '.join(SHARDS)}.")
        if self.shard == "none" and self.gpus > 1:
            raise InputError(f"shard is none, but there are {self.gpus} GPUs: give ddp or fsdp.")
        self.device.peak(self.precision)

    @property
    def parts(self) -> int:
        """Among how many devices the weights are divided."""
        return self.gpus if self.shard == "fsdp" else 1

    @property
    def half(self) -> bool:
        return self.precision in ("bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int  # blocks that are whole for the moment
    activations: (
        int  # the most that is alive in the step: activations, their gradients, what operators work with
    )
    reserve: int

    @property
    def fixed(self) -> int:
        """What does not depend on the batch."""
        return self.total - self.activations

    @property
    def total(self) -> int:
        return (
            self.weights + self.gradients + self.optimizer + self.ema + self.gathered + self.activations
            + self.reserve
        )  # fmt: skip


def memory(count: Count, weights: Weights, setup: Setup) -> Memory:
    """What one device must hold."""

    def share(numbers: int) -> int:
        return -(-numbers // setup.parts) * WIDE

    gathered, activations = 0, count.peak
    if setup.parts > 1:
        size = 2 if setup.half else WIDE
        # one in use, one on its way, and the gradient of one; what is in no block stays whole
        gathered = (3 * weights.block + weights.rest) * size
        activations -= min(count.copies, count.peak)  # what is gathered is in half precision already
    return Memory(
        weights=share(weights.trained)
        + (weights.all - weights.trained + weights.buffers) * WIDE,  # frozen: whole
        gradients=share(weights.trained),
        optimizer=2 * share(weights.trained),
        ema=share(weights.trained) if setup.ema else 0,
        gathered=gathered,
        activations=activations,
        reserve=round(setup.device.reserve * GB),
    )


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of a step. `ideal` is the roofline; `step` is what is expected."""

    products: float
    attention: float
    moving: float  # operators that move bytes, and small ones that take their launch
    update: float
    communication: float  # of this, `exposed` is not hidden
    exposed: float
    bytes_sent: dict[str, float]  # of one device in a step, by collective
    attained: float  # the share of the roofline that is expected

    @property
    def compute(self) -> float:
        return self.products + self.attention + self.moving

    @property
    def ideal(self) -> float:
        return self.compute + self.update + self.exposed

    @property
    def step(self) -> float:
        return self.ideal / self.attained


def seconds(count: Count, weights: Weights, setup: Setup) -> Time:
    """The roofline of a counted step on each device of `setup`."""
    device, bandwidth = setup.device, setup.device.bandwidth * GB * MEMORY
    spent = {"product": 0.0, "attention": 0.0, "memory": 0.0}
    backward = 0.0
    wide = "tf32" if setup.precision == "tf32" else "fp32"
    for op, times in count.ops.items():
        rate = device.peak(setup.precision if op.half else wide)
        rate *= ATTENTION if op.kind == "attention" else PRODUCT
        took = times * max(op.flops / rate, op.bytes / bandwidth, device.launch)
        spent[op.kind] += took
        backward += took if op.backward else 0.0
    sent = {name: float(size) for name, size in count.sent.items()}
    between = sum(
        size / _speed(setup, neighbours=name == "ring") for name, size in sent.items()
    )  # of the loss: nothing can go on meanwhile
    own, others = 0.0, (setup.gpus - 1) / setup.gpus
    hidden = 0.0
    if setup.gpus > 1 and setup.shard == "ddp":
        gradients = weights.trained * WIDE
        sent["all-reduce"] = 2 * others * gradients
        own = sent["all-reduce"] / _speed(setup)
        hidden = min(own * (1 - min(BUCKET / gradients, 1)), backward / setup.passes)
    elif setup.gpus > 1 and setup.shard == "fsdp":
        size = 2 if setup.half else WIDE
        gather = (
            2 * others * weights.trained * size * setup.passes
        )  # before forward and again before backward
        scatter = others * weights.trained * WIDE * setup.passes
        sent["all-gather"] = sent.get("all-gather", 0) + gather
        sent["reduce-scatter"] = sent.get("reduce-scatter", 0) + scatter
        own = (gather + scatter) / _speed(setup)
        hidden = min(own, sum(spent.values()))
    return Time(
        products=spent["product"],
        attention=spent["attention"],
        moving=spent["memory"],
        update=_update_bytes(weights, setup) / bandwidth,
        communication=between + own,
        exposed=between + own - hidden,
        bytes_sent=sent,
        attained=1.0 if device.measured else ATTAINED,
    )


def _update_bytes(weights: Weights, setup: Setup) -> float:
    """Clipping reads the gradients and scales them; AdamW, fused, reads four numbers and writes three; the average
    reads two and writes one."""
    trained = weights.trained / setup.parts * WIDE
    return 3 * trained + 7 * trained + (3 * trained if setup.ema else 0)


def _speed(setup: Setup, *, neighbours: bool = False) -> float:
    """Bytes a second that one device gives and takes. Rings over several nodes share all their ports; of a message to
    the next device only the one at a node's edge uses the network."""
    device = setup.device
    if not device.link:
        raise InputError(
            f"{device.name} has no link to others here: plan for --gpus 1, or for a GPU of the table."
        )
    if setup.gpus <= device.node:
        return device.link * GB * WIRE
    ports = 1 if neighbours else device.node
    return min(device.link, ports * device.network) * GB * WIRE
