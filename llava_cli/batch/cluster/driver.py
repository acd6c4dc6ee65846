"""`llava batch --ray`: hires workers, hands out ranges of the run, tells the progress, and joins the rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from llava_cli import render
from llava_cli.batch.cluster.cluster import Cluster, WorkerGone, connected
from llava_cli.batch.cluster.dispatch import CAREFUL_AFTER, Dispatch, Work
from llava_cli.batch.cluster.needs import need_of, no_room
from llava_cli.batch.cluster.progress import ClusterProgress, Counts
from llava_cli.batch.cluster.worker import Assignment, OpenEngine, Ready, open_model, versions
from llava_cli.batch.ranges.merge import merge_run
from llava_cli.batch.ranges.row_range import RowRange
from llava_cli.batch.ranges.shard import begin_run, refuse_changes
from llava_cli.batch.ranges.shared_run import SharedRun
from llava_cli.batch.rows import make_row
from llava_cli.batch.run import Job, StopSignal, open_larger, stopped
from llava_cli.batch.run_settings import identify
from llava_cli.errors import LlavaError, ModelUnusable, UsageError, WorkerLost
from llava_cli.untrusted_text import printable

_POLL_SECONDS = 1.0
_MOST_EARLY_DEATHS = 3
"""Of workers that end before any was ready: the next ones would, too."""
_MOST_DEATHS = 10
"""Of workers while nothing is answered, besides those that tell at which row they die."""
_LOST = WorkerLost("a row", "workers end at it: its picture or its answer takes more than a node has")


def run_on_cluster(job: Job, address: str, workers: int | None, open_engine: OpenEngine = open_model) -> int:
    """Runs the job on a cluster and returns the exit code; `workers` is None for as many as there is room for.

    `open_engine` gives each worker its model. Raises as `run`, as `SharedRun.begin`, and as `connected`.
    """
    refuse_changes(job, "--ray")
    if job.verify:
        raise UsageError("--verify", "is about answers of this machine", "leave --ray out")
    stop = StopSignal(job.quiet)
    with ExitStack() as stack:
        if job.templates:
            stack.callback(job.templates.close)
        stack.callback(job.source.close)
        with render.spinner("connecting to the cluster", job.quiet):
            cluster = stack.enter_context(connected(address))
        job, run = begin_run(job, open_larger(job), None)
        if run.is_merged:
            render.note(f"{run.name} has all {run.grid.total:,} rows already")
            return 0
        identity = identify(job.settings) if open_engine is open_model else {}
        driver = Driver(cluster, job, run, workers, identity, open_engine)
        stack.callback(driver.dismiss_all)
        stack.enter_context(stop)  # after Ray, which sets handlers of its own
        driver.answer_all(stop.go_on)
        if not job.quiet:
            render.note(driver.summary())
    return stopped(job, stop) or merge_run(run, job.quiet)


@dataclass(eq=False)
class Hired:
    """A worker, from when it is asked for."""

    actor: Any
    node: str = ""
    """Ray's id of where it is; empty until it is ready."""
    work: Work | None = None
    is_refused: bool = False
    polled: bool = False
    """Whether it was asked for its progress and has not answered."""


class Driver:
    """Keeps workers at work until all ranges are committed."""

    def __init__(
        self,
        cluster: Cluster,
        job: Job,
        run: SharedRun,
        workers: int | None,
        identity: dict[str, Any],
        open_engine: OpenEngine,
    ) -> None:
        """Raises `OutOfMemory` where no node has room for a worker."""
        self._cluster, self._job, self._run, self._most = cluster, job, run, workers
        self._names = {node.id: printable(node.name) for node in cluster.nodes()}
        self._need = need_of(job.settings, cluster.nodes(), workers)
        if not any(self._need.fits(node) for node in cluster.nodes()):
            raise no_room(str(identity.get("model", "the model")), self._need, cluster.nodes())
        threads = self._need.cpus
        self._assignment = Assignment(job, run, identity, os.getcwd(), run.leave_token(), threads, open_engine)
        missing = list(run.missing(run.grid.all()))
        self._dispatch = Dispatch(missing, self._rows_left)
        self._progress = ClusterProgress(run.grid.total - sum(map(len, missing)), run.grid.total)
        self._hired: list[Hired] = []
        self._refs: dict[Any, tuple[Hired, Callable[[Hired, Any], None]]] = {}
        """What was asked of workers and has no answer yet, and what is done with the answer."""
        self._early_deaths, self._model = 0, ""
        self._refusals: dict[str, LlavaError] = {}
        """Why nodes answer nothing, by their ids."""

    def answer_all(self, go_on: Callable[[], bool]) -> None:
        """Returns once all is committed or, once `go_on()` is false, what was begun is finished.

        Raises the error that ends a worker's every start, or its writing.
        """
        is_stopping = False
        total, job = self._run.grid.total, self._job
        with render.counting(total, self._progress.read, job.quiet, job.json_progress):
            while not self._dispatch.is_done:
                if go_on():
                    self._hire()
                    self._hand_out()
                elif not is_stopping:
                    is_stopping = True
                    for one in self._hired:
                        one.actor.stop.remote()
                if is_stopping and not any(one.work for one in self._hired):
                    return
                self._poll()
                for ref in self._cluster.wait(list(self._refs), _POLL_SECONDS):
                    self._settle(ref)
                self._commit_rows()
            self._progress.end()

    def _hire(self) -> None:
        """Asks for workers: one more than there is room for, so that a new node gets one, and a cluster may grow."""
        room = sum(self._need.fits(node) for node in self._cluster.nodes())
        most = self._dispatch.uncommitted(self._most or room + 1)
        while sum(not one.is_refused for one in self._hired) < most:
            one = Hired(self._cluster.hire(self._assignment, self._need))
            self._hired.append(one)
            self._ask(one, one.actor.prepare.remote(versions()), self._on_ready)

    def _ask(self, one: Hired, ref: Any, then: Callable[[Hired, Any], None]) -> None:
        self._refs[ref] = one, then

    def _hand_out(self) -> None:
        ready = [one for one in self._hired if one.node and not one.is_refused]
        for one in ready:
            if one.work is None and (work := self._dispatch.next(len(ready))):
                one.work = work
                if work.row is None:
                    self._ask(one, one.actor.answer.remote(work.ranges), self._on_ranges)
                else:
                    self._ask(one, one.actor.answer_row.remote(work.ranges[0], work.row), self._on_row)

    def _poll(self) -> None:
        for one in self._hired:
            if one.work and not one.polled:
                one.polled = True
                self._ask(one, one.actor.progress.remote(), self._on_progress)

    def _settle(self, ref: Any) -> None:
        if ref not in self._refs:  # of a worker that is gone, which another ref has told
            return
        one, then = self._refs.pop(ref)
        try:
            result = self._cluster.result(ref)
        except WorkerGone as error:
            self._on_gone(one, str(error))
        else:
            then(one, result)

    def _on_ready(self, one: Hired, ready: Ready) -> None:
        one.node = ready.node
        name = self._names.setdefault(one.node, self._name_of(one.node))
        if ready.refusal is None:
            self._model, self._early_deaths = ready.model, 0
            self._progress.joined(one, name)
            return
        one.is_refused = True  # it stays where it is, so that Ray places no other there
        if one.node not in self._refusals:
            self._refusals[one.node] = ModelUnusable(f"node {name}", ready.refusal.reason, ready.refusal.hint)
            if not self._job.quiet:
                render.note(f"llava: {self._refusals[one.node]}; it gets no work")
        nodes = [node for node in self._cluster.nodes() if self._need.fits(node)]
        if all(node.id in self._refusals for node in nodes) and not any(other.work for other in self._hired):
            raise self._refusals[one.node]

    def _name_of(self, node_id: str) -> str:
        return next((printable(node.name) for node in self._cluster.nodes() if node.id == node_id), node_id[:8])

    def _on_ranges(self, one: Hired, result: tuple[list[int], Counts]) -> None:
        assert one.work
        committed, counts = result
        self._progress.report(one, counts)
        work, one.work = one.work, None
        for rows in work.ranges:
            if rows.number in committed:
                self._dispatch.committed(rows)
        if len(committed) < len(work.ranges):  # it was stopped
            self._dispatch.died(work, node_is_lost=True)

    def _on_row(self, one: Hired, result: tuple[dict[str, Any], Counts]) -> None:
        assert one.work
        row, counts = result
        self._progress.report(one, counts)
        work, one.work = one.work, None
        self._dispatch.answered(work, row)

    def _on_progress(self, one: Hired, counts: Counts) -> None:
        one.polled = False
        self._progress.report(one, counts)

    def _on_gone(self, one: Hired, reason: str) -> None:
        """A worker is gone: others get its work, unless it or others before it never were ready."""
        if one not in self._hired:
            return
        self._hired.remove(one)
        self._progress.left(one)
        self._refs = {ref: item for ref, item in self._refs.items() if item[0] is not one}
        is_alive = one.node in {node.id for node in self._cluster.nodes()}
        if one.work:
            for rows in one.work.ranges:
                if self._run.has(rows):
                    self._dispatch.committed(rows)
            self._dispatch.died(one.work, node_is_lost=not is_alive)
            if self._dispatch.deaths_in_a_row > _MOST_DEATHS + CAREFUL_AFTER * len(self._hired):
                raise ModelUnusable("--ray", f"workers end, and answer nothing: {reason}", "LLAVA_DEBUG=1 shows more")
        elif not one.node:
            self._early_deaths += 1
            if self._early_deaths >= _MOST_EARLY_DEATHS and not self._model:
                raise ModelUnusable("--ray", f"workers end as they start: {reason}", "LLAVA_DEBUG=1 shows more")

    def _commit_rows(self) -> None:
        """Writes the rows that were answered one by one, with an error for one that has ended its worker."""
        for found in self._dispatch.complete():
            with closing(self._run.attempt(found.rows)) as attempt:
                tasks = islice(self._run.tasks(found.rows), attempt.done, None)
                for task, row in zip(tasks, found.after(attempt.done), strict=False):
                    attempt.append(make_row(task, None, _LOST, self._model) if row is None else row)
                if attempt.done == len(found.rows):
                    attempt.commit()
                    self._dispatch.committed(found.rows)

    def _rows_left(self, rows: RowRange) -> int:
        """How many rows of a range earlier attempts have left."""
        with closing(self._run.attempt(rows)) as attempt:
            return attempt.done

    def summary(self) -> str:
        """How fast it went, in a line."""
        nodes = [one.node for one in self._hired if one.node and not one.is_refused]
        workers, places = _counted(len(nodes), "worker"), _counted(len(set(nodes)), "node")
        return f"{self._progress.speed()} · {workers} on {places}"

    def dismiss_all(self) -> None:
        for one in self._hired:
            self._cluster.dismiss(one.actor)


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
