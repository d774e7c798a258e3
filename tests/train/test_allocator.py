"""Memory that stays with the process while training runs: page faults are counted, not times."""

import platform
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from reverie.train.allocator import kept_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
CPU = torch.device("cpu")
FLOATS = 2**24  # 64 MiB, which glibc maps by itself


@pytest.fixture(autouse=True)
def _free_to_choose(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)


def faults() -> int:
    """Pages faulted in by four tensors, one after the other, when there have been some already: at first small blocks
    lie in what the one before freed, so that the next does not fit."""
    for _ in range(16):
        torch.ones(FLOATS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(FLOATS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def held() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])


def test_freed_memory_is_taken_again_and_given_back_at_the_end():
    pages = 4 * FLOATS // resource.getpagesize()
    with kept_memory(CPU) as kept:
        assert kept
        assert faults() < pages / 10
        most = held()
        with ThreadPoolExecutor(
            1
        ) as pool:  # which prepares batches, and whose heaps are smaller than a tensor
            assert pool.submit(torch.ones, FLOATS).result().sum() == FLOATS
    assert held() < most - 3 * FLOATS


def test_who_has_set_malloc_up_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_TEST", "8")
    with kept_memory(CPU) as kept:
        assert not kept
    with kept_memory(torch.device("cuda")) as kept:
        assert not kept
