"""One, two and four processes on one batch compute what one process does (peers.py holds the checks)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from reverie.objectives.contrastive import ALONE
from reverie.train.parallel import peers, processes

CHECKS = Path(__file__).with_name("peers.py")


def test_alone_nothing_is_needed():
    with processes() as found:
        assert found is peers() is ALONE
        assert not dist.is_initialized()


def agree(*command: str) -> set[str]:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line for line in done.stdout.splitlines() if line}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the groups are forked")
def test_losses_and_gradients_are_those_of_one_process():
    expected = {f"rank {rank} of {count} agrees" for count in (1, 2, 4) for rank in range(count)}
    assert agree(str(CHECKS), "1", "2", "4") == expected


@pytest.mark.slow  # torchrun and its two children import torch: ten seconds
def test_under_torchrun_as_well():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert agree(*torchrun, str(CHECKS)) == {f"rank {rank} of 2 agrees" for rank in range(2)}
