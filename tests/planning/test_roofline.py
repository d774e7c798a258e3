"""Seconds and bytes from counts: exact on counts made by hand, and what must hold of any number of devices."""

from collections import Counter

import pytest

from reverie.errors import InputError
from reverie.planning import roofline
from reverie.planning.counting import Count, Op
from reverie.planning.hardware import DEVICES, Device, cpu, device
from reverie.planning.roofline import ATTENTION, MEMORY, PRODUCT, Setup, Weights, memory, seconds

GPU = Device(
    name="gpu", fp32=10, bf16=100, memory=10, bandwidth=1000, link=100, node=8, network=10, launch=1e-6
)
WEIGHTS = Weights(all=1_000_000, trained=900_000, buffers=10, block=100_000, rest=200_000)


def op(kind="product", *, half=True, backward=False, flops=0, size=0):
    return Op(name=kind, kind=kind, half=half, backward=backward, flops=flops, bytes=size)


def counted(*ops, peak=10**9, copies=0, sent=None):
    return Count(ops=Counter(ops), kept=peak, peak=peak, copies=copies, sent=sent or {})


def test_each_operator_takes_its_slower_half():
    bound_by_flops = op(flops=10**12, size=10**6)
    bound_by_bytes = op("memory", half=False, size=10**9)
    wide = op(flops=10**12, half=False)
    tiny = op("memory", half=False, size=1)
    attention = op("attention", flops=10**12)
    time = seconds(
        counted(bound_by_flops, bound_by_bytes, wide, tiny, attention, tiny), WEIGHTS, Setup(device=GPU)
    )
    assert time.products == pytest.approx(1e12 / (100e12 * PRODUCT) + 1e12 / (10e12 * PRODUCT))
    assert time.attention == pytest.approx(1e12 / (100e12 * ATTENTION))
    assert time.moving == pytest.approx(1e9 / (1e12 * MEMORY) + 2 * 1e-6)
    assert time.exposed == time.communication == 0
    assert time.step == pytest.approx(time.ideal / roofline.ATTAINED)


def test_fsdp_on_one_device_is_nothing():
    found = counted(op(flops=10**12), peak=2 * 10**9, copies=10**8)
    one, sharded = (Setup(device=GPU, shard=shard) for shard in ("none", "fsdp"))
    assert memory(found, WEIGHTS, one) == memory(found, WEIGHTS, sharded)
    assert seconds(found, WEIGHTS, one) == seconds(found, WEIGHTS, sharded)


def test_ddp_holds_what_one_device_holds_and_fsdp_divides_it():
    found = counted(op(flops=10**12))
    one = memory(found, WEIGHTS, Setup(device=GPU))
    assert memory(found, WEIGHTS, Setup(device=GPU, gpus=16, shard="ddp")) == one
    shared = memory(found, WEIGHTS, Setup(device=GPU, gpus=16, shard="fsdp"))
    assert shared.optimizer == one.optimizer / 16
    assert shared.gathered == (3 * 100_000 + 200_000) * 2
    # weights, gradients, two moments and the average, in fp32; what is frozen has the first alone, and stays whole
    assert one.fixed - one.reserve == 4 * (1_000_000 + 10 + 900_000 + 2 * 900_000 + 900_000)
    assert shared.weights == 4 * (900_000 / 16 + 100_000 + 10)


def test_what_is_sent():
    found = counted(op(flops=10**10, backward=True))
    ddp = seconds(found, WEIGHTS, Setup(device=GPU, gpus=4, shard="ddp"))
    assert ddp.bytes_sent == {"all-reduce": 2 * 3 / 4 * 900_000 * 4}
    fsdp = seconds(found, WEIGHTS, Setup(device=GPU, gpus=4, shard="fsdp", passes=3))
    assert fsdp.bytes_sent["all-gather"] == pytest.approx(3 * 2 * 3 / 4 * 900_000 * 2)
    assert fsdp.bytes_sent["reduce-scatter"] == pytest.approx(3 * 3 / 4 * 900_000 * 4)
    far = seconds(found, WEIGHTS, Setup(device=GPU, gpus=16, shard="ddp"))
    assert far.communication > ddp.communication  # through the network
    for time in (ddp, fsdp, far):
        assert 0 < time.exposed <= time.communication
    of_loss = seconds(
        counted(op(flops=10**10), sent={"all-gather": 10**6}), WEIGHTS, Setup(device=GPU, gpus=4, shard="ddp")
    )
    assert of_loss.exposed == pytest.approx(ddp.exposed + 1e6 / (100e9 * roofline.WIRE), rel=0.2)


def test_the_table_is_one_of_real_machines():
    for name, one in DEVICES.items():
        assert one.name == name
        assert one.fp32 <= (one.tf32 or one.fp32) <= (one.fp16 or one.fp32)
        assert one.memory > one.reserve
        assert 0 < one.link * 1 <= one.bandwidth
        assert one.price > 0
    assert device("v100-32").best() == "fp16"
    with pytest.raises(InputError, match="v100-32 has no bf16"):
        Setup(device=device("v100-32"), precision="bf16")
    with pytest.raises(InputError, match="no GPU 'h1000'"):
        device("h1000")
    with pytest.raises(InputError, match="give ddp or fsdp"):
        Setup(device=GPU, gpus=2)


def test_this_processor_is_measured():
    here = cpu()
    assert 1e-4 < here.fp32 < 100
    assert 0.1 < here.bandwidth < 5000
    assert here.measured
