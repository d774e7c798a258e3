import mmap
import os

import pytest
import torch

from reverie.errors import InputError
from reverie.train import memory

CPU = torch.device("cpu")


def test_budgets():
    assert memory.budget("6GB", CPU) == 6_000_000_000
    assert memory.budget("0.5 gb", CPU) == 500_000_000
    assert memory.budget("800MB", CPU) == 800_000_000
    assert memory.budget("6GiB", CPU) == 6 * 2**30
    assert memory.budget("laptop", CPU) == 6_000_000_000
    assert memory.budget("laptop", CPU) < memory.budget("workstation", CPU) < memory.budget("server", CPU)
    for word in ("", "6", "huge", "0GB", "-1GB"):
        with pytest.raises(InputError, match="give a size such as 6GB, or free, laptop"):
            memory.budget(word, CPU)


def test_free_is_a_share_of_what_is_available(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 10**10)
    assert memory.budget("free", CPU) == 9 * 10**9
    monkeypatch.setattr(memory, "available", lambda device: None)
    with pytest.raises(InputError, match="does not say"):
        memory.budget("free", CPU)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says so")
def test_what_is_held_is_seen_and_the_peak_stays():
    before = memory.held(CPU)
    block = mmap.mmap(-1, 100_000_000)  # from the system itself: malloc may have kept as much
    for _ in range(100):
        block.write(bytes(1_000_000))
    most = memory.held(CPU)
    assert 95e6 < most - before < 110e6
    block.close()
    assert memory.held(CPU) < most - 90e6
    assert memory.peak(CPU) >= most - 2e6  # the system counts in lumps
    assert memory.available(CPU) > memory.held(CPU)
    assert memory.available(CPU, swap=True) >= memory.available(CPU) - 50e6


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says so")
def test_a_limit_of_the_shell_counts(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (memory._line("VmSize") + 10**7, 10**12))
    assert abs(memory.available(CPU) - memory.held(CPU) - 10**7) < 2e6


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says so")
def test_processes_share_what_is_free(monkeypatch):
    alone = memory.available(CPU) - memory.held(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available(CPU) - memory.held(CPU) == pytest.approx(alone / 4, rel=0.2)


def test_the_tightest_cgroup_counts(tmp_path):
    """Version 2 with a limit above its own, version 1 beside it, caches that can be dropped."""

    def group(folder, most, used, cache, names=("max", "current"), stat="inactive_file"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"memory.{names[0]}").write_text(f"{most}\n")
        (folder / f"memory.{names[1]}").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{stat} {cache}\n")

    group(tmp_path / "job/step", "max", 500, 0)
    group(tmp_path / "job", 2000, 800, 300)
    group(tmp_path / "memory/box", 1000, 900, 50, ("limit_in_bytes", "usage_in_bytes"), "total_inactive_file")
    groups = tmp_path / "groups"
    groups.write_text("5:cpu,cpuacct:/box\n4:memory:/box\n0::/job/step\n")
    assert sorted(memory.rooms(groups, tmp_path)) == [150, 1500]
    groups.write_text("0::/gone\n")
    assert list(memory.rooms(groups, tmp_path)) == []
    assert list(memory.rooms(tmp_path / "none", tmp_path)) == []
