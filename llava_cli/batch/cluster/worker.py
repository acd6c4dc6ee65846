"""A worker of a cluster: an actor with an engine, which answers ranges where it is."""

from __future__ import annotations

import os
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
from llava_cli.hardware.allocator import limit_caches, use_threads

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

    node: str
    """Ray's id of it."""
    model: str = ""
    refusal: Refusal | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a node can answer nothing of this run."""

    reason: str
    hint: str


def versions() -> dict[str, str]:
    """Of what answers depend on; Ray compares its own and Python's."""
    return {"llava": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def open_model(job: Job) -> Engine:
    """The engine of a job, as a run on one machine has it."""
    return engine_of(replace(job, quiet=True), open_larger(job))


class Worker:
    """Its methods are called from several threads: `progress` and `stop` while `answer` is at work."""

    def __init__(self, assignment: Assignment) -> None:
        limit_caches(primitives=32)  # before torch is imported
        self._assignment, self._job, self._run = assignment, assignment.job, assignment.run
        self._tally = Tally()
        self._meter = Meter(self._tally)
        self._stopped = threading.Event()
        self._engine: Engine | None = None
        self._loader: PictureLoader | None = None

    def prepare(self, driver: dict[str, str]) -> Ready:
        """Checks this node against the driver's versions and files, and loads the model.

        Raises a `LlavaError` as `open_engine`.
        """
        import ray

        node = ray.get_runtime_context().get_node_id()
        if refusal := self._refusal(driver):
            return Ready(node, refusal=refusal)
        use_threads(self._assignment.threads)
        self._loader = loader_of(self._job, self._assignment.threads)
        self._engine = self._assignment.open_engine(self._job)
        return Ready(node, self._engine.model)

    def _refusal(self, driver: dict[str, str]) -> Refusal | None:
        own = versions()
        for name, wanted in driver.items():
            if own.get(name) != wanted:
                return Refusal(f"has {name} {own.get(name)}, not {wanted}", f"pip install {name}=={wanted} there")
        try:
            os.chdir(self._assignment.folder)
        except OSError:
            return Refusal(f"has no folder {self._assignment.folder}", "a folder that all nodes share is needed")
        if not self._run.sees(self._assignment.token):
            return Refusal(f"does not see what is beside {self._run.name}", "-o a file that all nodes share, or s3://…")
        if missing := self._job.source.missing_here():
            return Refusal(f"has no {missing}", "a SOURCE that all nodes share, or s3://…, is needed")
        return self._other_model()

    def _other_model(self) -> Refusal | None:
        if not self._assignment.identity:
            return None
        model = self._assignment.identity.get("model")
        try:
            here = identify(self._job.settings)
        except LlavaError as error:
            return Refusal(f"cannot use {model}: {error.reason}", f"llava models pull {model} there")
        for name, wanted in self._assignment.identity.items():
            if here.get(name) != wanted:
                hint = f"the same checkpoint on all nodes: llava models pull {model} there"
                return Refusal(f"has another {name} of {model}: {here.get(name)}, not {wanted}", hint)
        return None

    def answer(self, ranges: tuple[RowRange, ...]) -> tuple[list[int], Counts]:
        """Answers ranges and commits them; returns the numbers of those that are committed. Raises a `LlavaError`."""
        assert self._engine and self._loader
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
        return done, self.progress()

    def answer_row(self, rows: RowRange, number: int) -> tuple[dict[str, Any], Counts]:
        """A single row of a range."""
        assert self._engine and self._loader
        task = next(islice(self._run.tasks(rows), number - rows.begin, None))
        tasks = sampled([(number, task)], self._job.sight, self._run.grid.total) if self._job.sight else [task]
        fill = fill_of(self._job)
        found = answer_tasks(self._engine, tasks, self._loader, self._job.settings, 1, lambda: True, fill)
        ((asked, row),) = list[tuple[Task, dict[str, Any]]](found)
        self._meter.add(asked, row)
        return row, self.progress()

    def progress(self) -> Counts:
        return Counts(self._tally.rows, self._tally.failed, self._meter.pictures, self._meter.tokens)

    def stop(self) -> None:
        """Lets the answers that were begun finish; what is left of a range is kept for another attempt."""
        self._stopped.set()
