"""What the machines can do that a run may be planned for: a literal table, and a short probe of this processor.

Peaks are the makers' for dense products with sums in fp32, without sparsity; bandwidths are theirs too. Sources:
NVIDIA's data sheets of V100 (2020), A100 (2022), H100, H200 (2024), HGX B200 (2025), L40S and T4, and its papers on the
Ampere GA102 (RTX 3090) and the Ada AD102 (RTX 4090). `link` is one way between GPUs of a node: NVLink, or PCIe where
there is none. `network` is one way for each GPU between nodes, as the maker's own nodes have it (DGX-1 four 100 Gb/s
ports for eight V100, DGX A100 eight of 200, DGX H100 and B200 eight of 400), elsewhere 100 Gb/s for a node.

Prices are what a GPU was rented for by the hour, rounded, when this was written; they move, so give your own. The
H200's is the 2 dollars of Open-Sora 2.0 (2503.09642: $107.5k for 2,240 GPU-days).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from reverie.errors import InputError

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """TFLOP/s by format (None: it has no such units), bytes, GB/s one way, dollars an hour."""

    name: str
    fp32: float
    tf32: float | None = None
    fp16: float | None = None
    bf16: float | None = None
    memory: float  # GB
    bandwidth: float  # GB/s, of the memory
    link: float = 0.0  # GB/s
    node: int = 8  # devices of a node
    network: float = 1.56  # GB/s for each device
    price: float = 0.0
    launch: float = 5e-6  # seconds, the least that an operator takes
    reserve: float = (
        1.5  # GB that are no tensors: the driver's context, the communicator, what the allocator wastes
    )
    measured: bool = False  # the peaks are measured, not a maker's

    def peak(self, precision: str) -> float:
        """FLOP/s. InputError: it has no such units."""
        peak = {"fp32": self.fp32, "tf32": self.tf32, "fp16": self.fp16, "bf16": self.bf16}[precision]
        if peak is None:
            there = [
                name
                for name in ("fp32", "tf32", "fp16", "bf16")
                if getattr(self, name) is not None and name != precision
            ]
            raise InputError(f"{self.name} has no {precision}: take --precision {' or '.join(there)}.")
        return peak * 1e12

    def best(self) -> str:
        """The quickest format that training is stable in."""
        return next(name for name in ("bf16", "fp16", "fp32") if getattr(self, name) is not None)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(name="v100-16", fp32=15.7, fp16=125, memory=16, bandwidth=900, link=150, network=6.25, price=0.6),
        Device(name="v100-32", fp32=15.7, fp16=125, memory=32, bandwidth=900, link=150, network=6.25, price=0.8),
        Device(
            name="a100-40", fp32=19.5, tf32=156, fp16=312, bf16=312, memory=40, bandwidth=1555, link=300,
            network=25, price=1.3,
        ),
        Device(
            name="a100-80", fp32=19.5, tf32=156, fp16=312, bf16=312, memory=80, bandwidth=2039, link=300,
            network=25, price=1.6,
        ),
        Device(
            name="h100", fp32=67, tf32=494, fp16=989, bf16=989, memory=80, bandwidth=3350, link=450, network=50,
            price=2.5,
        ),
        Device(
            name="h200", fp32=67, tf32=494, fp16=989, bf16=989, memory=141, bandwidth=4800, link=450, network=50,
            price=2.0,
        ),
        Device(
            name="b200", fp32=75, tf32=1100, fp16=2250, bf16=2250, memory=180, bandwidth=7700, link=900,
            network=50, price=4.5,
        ),
        Device(name="l40s", fp32=91.6, tf32=183, fp16=362, bf16=362, memory=48, bandwidth=864, link=32, price=0.9),
        Device(
            name="rtx4090", fp32=82.6, tf32=82.6, fp16=165, bf16=165, memory=24, bandwidth=1008, link=32, price=0.4,
        ),
        Device(
            name="rtx3090", fp32=35.6, tf32=35.6, fp16=71, bf16=71, memory=24, bandwidth=936, link=16, price=0.2,
        ),
        Device(name="t4", fp32=8.1, fp16=65, memory=16, bandwidth=300, link=16, node=4, price=0.3),
    )
}  # fmt: skip


def device(name: str) -> Device:
    """The one of that name; `cpu` is this machine, measured. InputError: there is none."""
    if name == "cpu":
        return cpu()
    if name not in DEVICES:
        raise InputError(f"there is no GPU {name!r} in the table: take one of {', '.join(DEVICES)}, or cpu.")
    return DEVICES[name]


def cpu() -> Device:
    """This processor, by a probe of about a second: products of 1024 x 1024 in fp32 and bf16, and a copy of 256 MB."""
    import torch

    from reverie.nn.linear import cpu_has_bf16

    def best(work) -> float:
        times = []
        for _ in range(4):
            begun = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun)
        return min(times)

    def product(dtype: torch.dtype) -> float:
        a = torch.ones(1024, 1024, dtype=dtype)
        return 2 * 1024**3 / best(lambda: a @ a) / 1e12

    source = torch.zeros(2**26)
    target = torch.empty_like(source)
    bandwidth = 2 * 2**28 / best(lambda: target.copy_(source)) / GB
    return Device(
        name="cpu",
        fp32=product(torch.float32),
        bf16=product(torch.bfloat16) if cpu_has_bf16() else None,
        memory=_memory() / GB,
        bandwidth=bandwidth,
        node=1,
        launch=2e-6,
        reserve=0.5,
        measured=True,
    )


def _memory() -> float:
    """Bytes of this machine."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        total = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemTotal"))
        return float(total.split()[1]) * 1024
    if hasattr(os, "sysconf"):  # macOS
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return 8 * GB  # Windows does not say without more
