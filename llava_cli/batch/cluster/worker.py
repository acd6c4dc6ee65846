"""A worker of a cluster: an actor with an engine, which answers ranges where it is."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from typing import Any

from llava_cli._version import __version__
from llava_cli.batch.cluster.progress import Counts
from llava_cli.batch.meter import Meter
from llava_cli.batch.picture_loader import PictureLoader
from llava_cli.batch.ranges.answering import answer_ranges
from llava_cli.batch.ranges.row_range import RowRange
from llava_cli.batch.ranges.shared_run import SharedRun
from llava_cli.batch.run import Job, engine_of, fill_of, loader_of, open_larger
from llava_cli.batch.run_settings import identify
from llava_cli.batch.runner import answer_tasks, sampled
from llava_cli.batch.tally import Tally
from llava_cli.batch.tasks import Task
from llava_cli.engine import Engine
from llava_cli.errors import LlavaError
from llava_cli.files import quoted
from llava_cli.hardware.allocator import limit_caches, use_threads
from llava_cli.models.registry import is_folder

OpenEngine = Callable[[Job], Engine]
"""Loads a worker's model."""


@dataclass(frozen=True)
class Assignment:
    """What all workers of a run are told as they start."""

    job: Job
    run: SharedRun
    identity: dict[str, Any]
    """The model of all rows, as `identify` describes it; empty where it is not compared."""
    folder: str
    """The driver's current folder, where relative paths begin."""
    token: str
    """The name of a file that the driver has put beside the run."""
    threads: int
    open_engine: OpenEngine


@dataclass(frozen=True)
class Ready:
    """A worker that can answer, or cannot on this node."""

    model: str = ""
    refusal: Refusal | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a node can answer nothing of this run."""

    reason: str
    hint: str


@dataclass(frozen=True)
class Answered:
    """What has become of ranges."""

    committed: tuple[int, ...]
    """The numbers of those whose rows are all there; of others a part is, after `Worker.stop`."""
    counts: Counts
    """Of the worker so far."""
    last_refusal: LlavaError | None
    """Why the last picture that was not there could not be opened."""


def versions() -> dict[str, str]:
    """Of what answers depend on; Ray compares its own and Python's."""
    return {"llava": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def open_model(job: Job) -> Engine:
    """The engine of a job, as a run on one machine has it."""
    return engine_of(job, open_larger(job))


class Worker:
    """Its methods are called from several threads: `progress` and `stop` while `answer` is at work."""

    _job: Job
    _run: SharedRun
    _engine: Engine
    _loader: PictureLoader

    def __init__(self) -> None:
        limit_caches(primitives=32)  # before torch is imported
        self._tally = Tally()
        self._meter = Meter(self._tally)
        self._stopped = threading.Event()

    def prepare(self, driver: dict[str, str], pickled: bytes) -> Ready:
        """Checks this node against the driver's versions and files, and loads the model of the `Assignment`.

        Raises a `LlavaError` as `open_engine`.
        """
        if refusal := _other_versions(driver):
            return Ready(refusal=refusal)
        assignment: Assignment = pickle.loads(pickled)  # ours, of the same version
        if refusal := _refusal(assignment):
            return Ready(refusal=refusal)
        self._job, self._run = replace(assignment.job, quiet=True), assignment.run
        use_threads(assignment.threads)
        self._loader = loader_of(self._job, assignment.threads)
        self._engine = assignment.open_engine(self._job)
        return Ready(self._engine.model)

    def answer(self, ranges: tuple[RowRange, ...]) -> Answered:
        """Answers ranges and commits them. Raises a `LlavaError`."""
        done: list[int] = []
        answer_ranges(
            self._job,
            self._run,
            ranges,
            self._engine,
            self._loader,
            self._meter.add,
            lambda rows: done.append(rows.number),
            lambda: not self._stopped.is_set(),
        )
        return Answered(tuple(done), self.progress(), self._loader.last_refusal)

    def answer_row(self, rows: RowRange, number: int) -> dict[str, Any]:
        """A single row of a range."""
        task = next(islice(self._run.tasks(rows), number - rows.begin, None))
        tasks = sampled([(number, task)], self._job.sight, self._run.grid.total) if self._job.sight else [task]
        fill = fill_of(self._job)
        found = answer_tasks(self._engine, tasks, self._loader, self._job.settings, 1, lambda: True, fill)
        ((asked, row),) = list[tuple[Task, dict[str, Any]]](found)
        self._meter.add(asked, row)
        return row

    def progress(self) -> Counts:
        return Counts(self._tally.rows, self._tally.failed, self._meter.pictures, self._meter.tokens)

    def stop(self) -> None:
        """Lets the answers that were begun finish; what is left of a range is kept for another attempt."""
        self._stopped.set()


def _other_versions(driver: dict[str, str]) -> Refusal | None:
    own = versions()
    for name, wanted in driver.items():
        if own.get(name) != wanted:
            package = "llava-cli" if name == "llava" else name
            return Refusal(f"has {name} {own.get(name)}, not {wanted}", f"pip install {package}=={wanted} there")
    return None


def _refusal(assignment: Assignment) -> Refusal | None:
    """Why this node cannot take part; goes to the driver's current folder, where relative paths begin."""
    run = assignment.run
    try:
        os.chdir(assignment.folder)
    except OSError:
        return Refusal(f"has no folder {assignment.folder}", "a folder that all nodes share is needed")
    if not run.sees(assignment.token):
        return Refusal(f"does not see what is beside {run.name}", "-o a file that all nodes share, or s3://…")
    if missing := assignment.job.source.missing_here():
        return Refusal(f"has no {missing}", "a SOURCE that all nodes share, or s3://…, is needed")
    return _other_model(assignment)


def _other_model(assignment: Assignment) -> Refusal | None:
    if not assignment.identity:
        return None
    model = assignment.identity.get("model")
    try:
        here = identify(assignment.job.settings)
    except LlavaError as error:
        return Refusal(f"cannot use {model}: {error.reason}", _everywhere(str(model)))
    for name, wanted in assignment.identity.items():
        if here.get(name) != wanted:
            hint = f"the same checkpoint on all nodes: {_everywhere(str(model))}"
            if name == "device":  # the driver has chosen for all
                hint = f"run llava on a node that has {here.get(name)}, or --device {wanted}"
            return Refusal(f"has another {name} of {model}: {here.get(name)}, not {wanted}", hint)
    return None


def _everywhere(model: str) -> str:
    """What gives all nodes a model."""
    return "a folder that all nodes share" if is_folder(model) else f"llava models pull {quoted(model)} --ray auto"
