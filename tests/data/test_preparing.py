"""Shares of jobs: each done once, alike in one process and in many, whoever dies; and gone on with as if left alone."""

import importlib
import os
import shutil
import signal
import sys
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from reverie.data import preparing
from reverie.data.index import Index
from reverie.data.preparing import Pool, fitting, prepared
from reverie.errors import InputError

sys.path.append(str(Path(__file__).parent))  # whence workers, too, import what they shall do
Cubes = importlib.import_module("preparations").Cubes
JOBS = [(str(i),) for i in range(30)]


def results(shares) -> tuple[dict, dict, dict]:
    """Rows, reasons and deaths by job; no job may be in two shares."""
    rows, bad, killed = {}, {}, {}
    for share in shares:
        assert not (rows.keys() | bad.keys() | killed.keys()) & {*share.good, *share.bad, *share.killed}
        rows |= {
            job: row.tolist() for job, row in zip(share.good, share.tensors.get("rows", ()), strict=True)
        }
        bad |= share.bad
        killed |= share.killed
    return rows, bad, killed


def here(tmp_path: Path, jobs=JOBS, **options):
    return results(
        prepared(jobs, partial(Cubes, str(tmp_path / "here")), label="testing", quiet=True, **options)
    )


def test_every_job_is_in_one_share_and_rows_belong_to_it(tmp_path):
    jobs = [*JOBS[:5], ("broken",), *JOBS[5:]]
    rows, bad, killed = here(tmp_path, jobs, share=4)
    assert [*rows] == JOBS
    assert all(row[1] == int(job[0]) for job, row in rows.items())
    assert bad == {("broken",): "not a number"}
    assert not killed


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_depend_on_the_share_alone(threads, tmp_path):
    assert here(tmp_path, share=4, threads=threads) == here(tmp_path, share=4)
    whole, rest = here(tmp_path, share=4)[0], here(tmp_path, JOBS[8:], share=4)[0]
    assert rest == {job: row for job, row in whole.items() if job in rest}  # what an interruption leaves
    assert here(tmp_path, share=5)[0] != whole  # the test could tell


def test_a_share_of_nothing_but_bad_files_makes_no_rows(tmp_path):
    assert here(tmp_path, [("broken",)]) == ({}, {("broken",): "not a number"}, {})
    assert here(tmp_path, []) == ({}, {}, {})


def test_only_shares_that_are_asked_for_are_made(tmp_path):
    shares = prepared(JOBS, partial(Cubes, str(tmp_path / "d")), share=4, label="testing", quiet=True)
    next(shares)
    shares.close()
    assert len((tmp_path / "d").read_text().splitlines()) == 2  # the start, and one share


@pytest.mark.parametrize(
    ("processors", "workers", "each"),
    [([8, 8], 3, 4), ([8, 8], 2, 8), ([8, 2], 5, 2), ([2], 3, 0), ([], 1, 0), ([3, 3, 3], 3, 3)],
)
def test_workers_fit_on_the_machines(processors, workers, each):
    assert fitting(processors, workers) == each


def test_workers_with_gpus_fit_where_the_gpus_are():
    assert fitting([64, 8], 2, most=[0, 2]) == 4  # the large machine has none
    assert fitting([64, 8], 2, most=[1, 1]) == 8
    assert fitting([64, 8], 3, most=[1, 1]) == 0


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(preparing, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"reverie\[ray\]"):
        Pool(2)


@pytest.mark.parametrize("asked", [{"workers": 0}, {"address": "ray://head:10001"}])
def test_a_pool_that_cannot_be_is_refused(asked, monkeypatch):
    monkeypatch.setattr(preparing, "find_spec", lambda name: True)
    with pytest.raises(InputError, match=r"workers is 0|with --ray auto"):
        Pool(**asked)


# ---------------------------------------------------------------- a cluster of two workers

ray_is_there = pytest.mark.skipif(find_spec("ray") is None or find_spec("pandas") is None, reason="no Ray")


@pytest.fixture(scope="module")
def pool():
    before = os.environ.copy()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    with Pool(2) as workers:
        yield workers
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
@ray_is_there
def test_two_workers_make_what_one_process_makes(pool, tmp_path):
    jobs = [*JOBS[:5], ("broken",), *JOBS[5:]]
    start = partial(Cubes, str(tmp_path / "there"))
    there = results(prepared(jobs, start, pool=pool, share=4, label="testing", quiet=True))
    assert there == here(tmp_path, jobs, share=4)
    diary = (tmp_path / "there").read_text().splitlines()
    assert str(os.getpid()) not in {line.split()[0] for line in diary}
    assert Counter(line.split()[1] for line in diary)["started"] <= 2  # once for each worker


@pytest.mark.slow
@pytest.mark.chaos
@ray_is_there
def test_a_worker_that_is_killed_loses_and_doubles_nothing(pool, tmp_path):
    diary = tmp_path / "there"
    start = partial(Cubes, str(diary), pause=0.5)
    shares = prepared(JOBS, start, pool=pool, share=2, label="testing", quiet=True)
    taken = [next(shares)]
    victim, *_ = diary.read_text().splitlines()[-1].split()  # who began last is in the middle of a share
    os.kill(int(victim), signal.SIGKILL)
    taken += shares
    assert results(taken) == here(tmp_path, share=2)
    lines = [line.split() for line in diary.read_text().splitlines()]
    assert len({pid for pid, *_ in lines}) > len({pid for pid, *_ in lines if pid != victim}) >= 2
    begun = Counter(number for _, *words in lines for number in words if words != ["started"])
    assert set(begun) == {number for (number,) in JOBS}
    assert max(begun.values()) == 2  # a share was begun again


@pytest.mark.slow
@pytest.mark.chaos
@ray_is_there
def test_a_job_that_kills_every_worker_is_named_and_costs_no_other(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "TRIES", 1)
    start = partial(Cubes, str(tmp_path / "there"), deadly="3")
    rows, bad, killed = results(prepared(JOBS[:6], start, pool=pool, share=3, label="testing", quiet=True))
    assert set(rows) == set(JOBS[:6]) - {("3",)}
    assert not bad
    assert list(killed) == [("3",)]
    assert "died" in killed[("3",)]


@pytest.mark.slow
@ray_is_there
@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [("mistake", InputError, "the wrong folder"), ("failure", RuntimeError, "within the worker")],
)
def test_what_goes_wrong_in_a_worker_is_told_here(wrong, error, words, pool, tmp_path):
    start = partial(Cubes, str(tmp_path / "there"), wrong=wrong)
    with pytest.raises(error, match=words):
        list(prepared(JOBS, start, pool=pool, label="testing", quiet=True))


@pytest.mark.slow
@ray_is_there
def test_scores_are_those_of_one_process(pool, tmp_path, monkeypatch):
    from reverie.data.stickers import sample_folder
    from reverie.recipes import cleaning

    monkeypatch.setattr(cleaning, "FEW", 0)  # captions go to workers, too
    for name, workers in (("one", None), ("two", pool)):
        shutil.copytree(sample_folder(), tmp_path / name)
        cleaning.score(tmp_path / name, pool=workers, quiet=True)
    one, two = (Index.read(tmp_path / name) for name in ("one", "two"))
    assert len(one) > 0
    assert [item.scores["clip"] for item in two] == pytest.approx(
        [item.scores["clip"] for item in one], abs=1e-6
    )
