"""Preparing many files: vectors, latents and what else is computed of each once, here or by many workers (Ray Data).

A *preparation* has two halves: `load` reads one job, `make` computes rows of those that could be read. The jobs are
cut into shares in their order, and a share's rows depend on its jobs alone. So neither how many workers there are, nor
the order in which they end, nor who of them dies changes a row; a share is done whole or not at all, and is given once.
(Between machines whose processors differ, or with another number of threads, the last bits may differ, as ever.)

Without a `Pool` everything happens in this process. With one, Ray Data's `map_batches` runs the same functions in
processes on one or many machines. Each calls `start` once, so a model is loaded once by each. When one dies, Ray starts
another and does its share again; a share that killed its worker TRIES times is done job by job, and a job that kills
its worker even alone is told of and left out.

What travels: to the workers `start`, a `functools.partial` of a module-level function and plain arguments (Ray pickles
it by itself, as the function's name), and jobs as JSON; back, tensors as safetensors. The code, the models and the
files must be on every machine under the same names; nothing is copied there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import secrets
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from reverie.data.threads import in_order
from reverie.errors import InputError
from reverie.media import MediaError, Unreached
from reverie.progress import Display

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

SHARE = 64  # jobs
TRIES = 3  # of a share, then of each of its jobs, before it is held to kill its worker
KILLED = f"a worker died at it {TRIES} times: it takes more memory than there is, or breaks what reads it"
TASKS = 10_000  # at most; with more shares than these, several go to a worker at once
STORE = 2**30  # bytes of shared memory for what local workers hand over

Job = tuple[str, ...]


class Preparation(Protocol):
    """What a worker does. `load` is called on several threads, `make` on one at a time."""

    def load(self, job: Any) -> Any:
        """What one job is worked on with. MediaError: it cannot be read; the reason is kept.

        Unreached, one of them: not now; it is told of and tried again next time.
        """

    def make(self, loaded: Iterable[Any]) -> dict[str, Tensor]:
        """Rows of what was loaded, of at least one job, in the order of the jobs; `loaded` is drawn as it comes."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What became of some jobs: `tensors` of the good ones, in order, and why there are none of the others.

    bad: what cannot be read. killed: what ended its worker or was not reached; worth another try.
    """

    good: list[Any]
    tensors: dict[str, Tensor]
    bad: dict[Any, str]
    killed: dict[Any, str] = field(default_factory=dict)


class _Refused(NamedTuple):
    reason: str
    passing: bool


def prepared(
    jobs: Sequence[Job],
    start: Callable[[], Preparation],
    *,
    pool: Pool | None = None,
    share: int = SHARE,
    threads: int | None = None,
    label: str,
    quiet: bool = False,
) -> Iterator[Share]:
    """The shares of `jobs` as they are done: in order without a pool, in any order with one; each job in one of them.

    start: makes the preparation; with a pool a `partial` of a module-level function. share: jobs of a share. threads:
    that load, in this process; a worker has as many as it has processors.
    """
    if not jobs:
        return
    cuts = [list(jobs[i : i + share]) for i in range(0, len(jobs), share)]
    display = None if quiet or pool is not None else Display(label)
    try:
        if pool is None:
            preparation = start()
            loaded = in_order(partial(_load, preparation), jobs, threads)
            loaded = _counted(loaded, len(jobs), display)
            for cut in cuts:
                yield _share(preparation, cut, loaded)
            return

        def say(text: str) -> None:
            if display is not None:
                display.say(text)
            elif not quiet:
                print(text, file=sys.stderr, flush=True)

        say(f"{label}: starting workers")
        done = 0
        for result in _spread(pool, cuts, start, say):
            yield result
            done += len(result.good) + len(result.bad) + len(result.killed)
            if (
                display is None and not quiet
            ):  # from here on: what it took to start says nothing of what is left
                display = Display(label, first=done)
            if display is not None:
                display.show(done, len(jobs))
        assert done == len(jobs)
    finally:
        if display is not None:
            display.close()


def _load(preparation: Preparation, job: Job) -> Any:
    try:
        return preparation.load(job)
    except MediaError as error:
        return _Refused(error.reason, isinstance(error, Unreached))


def _counted(loaded: Iterator[Any], total: int, display: Display | None) -> Iterator[Any]:
    for done, one in enumerate(loaded, 1):
        yield one
        if display is not None:
            display.show(done, total)


def _share(preparation: Preparation, jobs: Sequence[Job], loaded: Iterator[Any]) -> Share:
    """One share; it takes as many of `loaded` as there are jobs."""
    good: list[Job] = []
    bad: dict[Job, str] = {}
    passing: dict[Job, str] = {}

    def sound() -> Iterator[Any]:
        for job, one in zip(jobs, loaded, strict=False):
            if isinstance(one, _Refused):
                (passing if one.passing else bad)[job] = one.reason
            else:
                good.append(job)
                yield one

    rest = sound()
    first = list(itertools.islice(rest, 1))
    tensors = preparation.make(itertools.chain(first, rest)) if first else {}
    assert len(good) + len(bad) + len(passing) == len(jobs), "a preparation left some of what was loaded"
    return Share(good=good, tensors=tensors, bad=bad, killed=passing)


# ---------------------------------------------------------------- many workers


class Pool:
    """Workers, to be used in a `with`: started when there is something to do, and stopped at the end if they are ours.

    workers: how many processes; one for each GPU if there are any, else for each processor. address: "local" starts a
    cluster on this machine, which only this process can reach; "auto" joins the one that runs here; or HOST:PORT.
    InputError: Ray is not installed, a number below one, or (on use) no cluster there or one that is too small.
    """

    def __init__(self, workers: int | None = None, address: str | None = None, *, gpus: bool = True) -> None:
        if find_spec("ray") is None or find_spec("pandas") is None:
            raise InputError(
                "Ray Data is not installed, which several workers need: pip install 'reverie[ray]', or leave --workers "
                "and --ray out."
            )
        if workers is not None and workers < 1:
            raise InputError(f"workers is {workers}: give at least 1.")
        if address is not None and address.startswith("ray://"):
            raise InputError(
                f"Ray clients ({address}) are not supported: run this on a machine of the cluster, with --ray auto."
            )
        self.workers, self.address, self.gpus = workers, address or "local", gpus
        self._ours = False
        self._room: tuple[int, int, float] | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            import ray

            ray.shutdown()
            self._ours, self._room = False, None

    def begin(self) -> tuple[int, int, float]:
        """Join the cluster or start it: how many workers, and the processors and GPUs that each has."""
        if self._room is not None:
            return self._room
        _quiet_ray()
        if self.address == "local":
            _keep_to_this_machine()
        import ray
        import ray.data

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if not ray.is_initialized():
            asked: dict[str, Any] = {
                "address": self.address,
                "log_to_driver": False,
                "logging_level": "ERROR",
            }
            if self.address == "local":
                asked |= {"num_cpus": max(cores, self.workers or 1), "include_dashboard": False}
                asked |= {"object_store_memory": STORE}
            try:
                with _silent():
                    ray.init(**asked)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                if self.address == "local":
                    raise
                why = str(error).strip().partition("\n")[0].rstrip(".")
                raise InputError(
                    f"No Ray cluster can be joined at {self.address} ({why}): start one with `ray start --head`, "
                    "set RAY_AUTH_MODE=token if it asks for a token, or leave --ray out to use this machine."
                ) from None
            self._ours = True
        _quiet_data()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = [int(node.get("GPU", 0)) if self.gpus else 0 for node in nodes]
        processors = [int(node.get("CPU", 0)) for node in nodes]
        workers = self.workers or sum(gpus) or sum(processors)
        share = -(-workers // sum(gpus)) if sum(gpus) else 0  # workers of one GPU
        each = fitting(processors, workers, most=[share * own for own in gpus] if share else None)
        if not each:
            raise InputError(
                f"workers is {workers}, more than fit on the cluster ({sum(processors)} processors): ask for fewer."
            )
        self._room = workers, each, 10_000 // share / 10_000 if share else 0.0  # Ray counts in such parts
        return self._room

    def each(
        self, cuts: Sequence[Sequence[Job]], start: Callable[[], Preparation]
    ) -> Iterator[tuple[int, Any]]:
        """The number of each cut as it ends, with its Share, or with None where it killed its worker TRIES times."""
        assert isinstance(start, partial), "it travels by name"
        assert start.func.__qualname__ == start.func.__name__, "it travels by name"
        workers, processors, gpus = self.begin()
        import ray
        import ray.data

        tries = ray.remote(num_cpus=0)(_Tries).remote()
        data = ray.data.from_items(
            [{"number": i, "jobs": json.dumps(cut)} for i, cut in enumerate(cuts)],
            override_num_blocks=min(len(cuts), TASKS),
        ).map_batches(
            _Worker,
            fn_constructor_args=(start, tries, TRIES, processors),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(cuts))),
            num_cpus=processors,
            num_gpus=gpus,
        )
        seen: set[int] = set()
        rows = data.iter_rows()
        for row in rows:
            if row["mistake"]:
                raise InputError(f"{row['mistake']} (so says a worker on {row['host']})")
            if row["failure"]:
                raise RuntimeError(f"a worker on {row['host']} failed:\n{row['failure']}")
            number = row["number"]
            if number in seen:
                continue
            seen.add(number)
            yield number, None if row["killed"] else _unpack(cuts[number], row)
        assert len(seen) == len(cuts), f"{len(cuts) - len(seen)} shares of {len(cuts)} did not come back"


def fitting(processors: Sequence[int], workers: int, *, most: Sequence[int] | None = None) -> int:
    """The most processors that each of `workers` can have on machines of so many each; 0: they do not fit.

    most: how many workers a machine can have at all.
    """
    limits = most or [workers] * len(processors)
    for each in range(max(processors, default=0), 0, -1):
        if sum(min(own // each, limit) for own, limit in zip(processors, limits, strict=True)) >= workers:
            return each
    return 0


def _spread(
    pool: Pool, cuts: list[list[Job]], start: Callable[[], Preparation], say: Callable[[str], None]
) -> Iterator[Share]:
    """The shares of all cuts; those that kill their workers are done again, each job by itself."""
    for last in (False, True):
        deadly: list[list[Job]] = []
        for number, share in pool.each(cuts, start):
            if share is None:
                deadly.append(cuts[number])
            else:
                yield share
        if not deadly:
            return
        if not last:
            cuts = [[job] for cut in deadly for job in cut]
            say(f"workers died {TRIES} times at the same {len(cuts):,}: these are tried one by one")
    yield Share(good=[], tensors={}, bad={}, killed={job: KILLED for cut in deadly for job in cut})


class _Tries:
    """Counts, in a process of its own, how often each cut was begun: a worker that is killed cannot say so."""

    def __init__(self) -> None:
        self.begun: dict[int, int] = {}

    def begin(self, number: int) -> int:
        self.begun[number] = self.begun.get(number, 0) + 1
        return self.begun[number]


class _Worker:
    """One process of the pool. What goes wrong comes back as words: Ray would try an exception again, or bury it."""

    def __init__(self, start: Callable[[], Preparation], tries: Any, most: int, threads: int) -> None:
        self.start, self.tries, self.most, self.threads = start, tries, most, threads
        self.preparation: Preparation | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        import pyarrow as pa

        rows = [self._row(row["number"], row["jobs"]) for row in table.to_pylist()]
        return pa.Table.from_pylist(rows, pa.schema([
            ("number", pa.int64()), ("good", pa.list_(pa.int64())), ("bad", pa.string()), ("passing", pa.string()),
            ("tensors", pa.large_binary()), ("killed", pa.bool_()), ("mistake", pa.string()),
            ("failure", pa.string()), ("host", pa.string()),
        ]))  # fmt: skip

    def _row(self, number: int, jobs: str) -> dict[str, Any]:
        import ray
        from safetensors.torch import save

        row = {"number": number, "good": [], "bad": "{}", "passing": "{}", "tensors": b"", "killed": False,
               "mistake": "",               "failure": "", "host": platform.node()}  # fmt: skip
        try:
            if ray.get(self.tries.begin.remote(number)) > self.most:
                return row | {"killed": True}
            if self.preparation is None:
                self.preparation = self.start()
            cut = [tuple(job) for job in json.loads(jobs)]
            share = _share(
                self.preparation, cut, in_order(partial(_load, self.preparation), cut, self.threads)
            )
            place = {job: i for i, job in enumerate(cut)}
            return row | {
                "good": [place[job] for job in share.good],
                "bad": json.dumps({place[job]: reason for job, reason in share.bad.items()}),
                "passing": json.dumps({place[job]: reason for job, reason in share.killed.items()}),
                "tensors": save({name: value.contiguous() for name, value in share.tensors.items()}),
            }
        except InputError as error:
            return row | {"mistake": str(error)}
        except Exception:
            return row | {"failure": traceback.format_exc()}


def _unpack(cut: Sequence[Job], row: dict[str, Any]) -> Share:
    from safetensors.torch import load

    good = [cut[i] for i in row["good"]]
    bad = {cut[int(i)]: reason for i, reason in json.loads(row["bad"]).items()}
    passing = {cut[int(i)]: reason for i, reason in json.loads(row["passing"]).items()}
    assert len(good) + len(bad) + len(passing) == len(cut)
    return Share(good=good, tensors=load(row["tensors"]), bad=bad, killed=passing)


# ---------------------------------------------------------------- how Ray behaves


def _quiet_ray() -> None:
    """Before Ray is imported: no telemetry, no words on our streams, and nothing unpickled that a file holds."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA": "0",  # CVE-2026-41486
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # what its daemons would print among our output


def _keep_to_this_machine() -> None:
    """A local cluster listens on the loopback address alone, and obeys nobody without a token that is made here."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves workers wherever else something runs
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing that native code writes reaches standard error meanwhile; what goes wrong is raised."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _quiet_data() -> None:
    import logging

    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
