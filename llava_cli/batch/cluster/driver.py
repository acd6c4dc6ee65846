"""`llava batch … --ray ADDRESS`: hires workers, hands out ranges of the run, tells the progress, and joins the rows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from llava_cli import render
from llava_cli.batch.cluster.cluster import Cluster, WorkerGone, check_address, connected
from llava_cli.batch.cluster.dispatch import CAREFUL_AFTER, Dispatch, Work
from llava_cli.batch.cluster.needs import Node, need_of, no_room
from llava_cli.batch.cluster.progress import ClusterProgress, Counts
from llava_cli.batch.cluster.worker import Answered, Assignment, OpenEngine, Ready, open_model, versions
from llava_cli.batch.ranges.row_range import RowRange
from llava_cli.batch.ranges.shard import begin_run, join, refuse_changes
from llava_cli.batch.ranges.shared_run import SharedRun
from llava_cli.batch.rows import make_row
from llava_cli.batch.run import Job, StopSignal, note_refusal, open_larger, stopped
from llava_cli.batch.run_settings import identify
from llava_cli.errors import DeviceLost, LlavaError, ModelUnusable, UsageError, WorkerLost

_POLL_SECONDS = 1.0
_WAIT_SECONDS = 10.0
"""Without a worker, after which a user is told that there is no room."""
_MOST_EARLY_DEATHS = 3
"""Of workers that end as they start, one after the other: the next ones would, too."""
_MOST_DEATHS = 10
"""Of workers while nothing is answered, besides those that tell at which row they die."""
_DEBUG_HINT = "LLAVA_DEBUG=1 shows more"
_LOST = WorkerLost("a row", "workers end at it: its picture or its answer takes more than a node has")


def run_on_cluster(job: Job, address: str, workers: int | None, open_engine: OpenEngine = open_model) -> int:
    """Runs the job on a cluster and returns the exit code; `workers` is None for as many as there is room for.

    `open_engine` gives each worker its model. Raises as `run`, as `SharedRun.begin`, and as `connected`.
    """
    refuse_changes(job, "--ray")
    if job.verify:
        hint = "leave --ray out once all rows are there: the same command then asks some again"
        raise UsageError("--verify", "does not go with --ray", hint)
    check_address(address)
    stop = StopSignal(job.quiet)
    with ExitStack() as stack:
        if job.templates:
            stack.callback(job.templates.close)
        stack.callback(job.source.close)
        job, run = begin_run(job, open_larger(job), None)
        if next(run.missing(run.grid.all()), None) is not None:
            cluster = stack.enter_context(connected(address, job.quiet))
            driver = Driver(cluster, job, run, workers, open_engine)
            stack.enter_context(stop)
            driver.answer_all(stop.go_on)
    return stopped(job, stop) or join(run, job.quiet)


@dataclass(eq=False)
class Hired:
    """A worker, from when it is asked for."""

    actor: Any
    node: str = ""
    """Ray's id of where it is; empty until it is there."""
    is_ready: bool = False
    is_refused: bool = False
    """Whether it can answer nothing where it is: it stays, so that Ray places no other there."""
    work: Work | None = None
    is_polled: bool = False
    """Whether it was asked for its progress and has not answered."""


class Driver:
    """Keeps workers at work until all ranges are committed."""

    def __init__(
        self, cluster: Cluster, job: Job, run: SharedRun, workers: int | None, open_engine: OpenEngine
    ) -> None:
        """Raises `OutOfMemory` where no node has room for a worker."""
        self._cluster, self._job, self._run, self._most = cluster, job, run, workers
        identity = identify(job.settings) if open_engine is open_model else {}
        self._nodes = cluster.nodes()
        self._need = need_of(job.settings, self._nodes, workers)
        if not self._fitting():
            raise no_room(str(identity.get("model", "the model")), self._need, self._nodes)
        self._assignment = cluster.share(
            Assignment(job, run, identity, os.getcwd(), run.leave_token(), self._need.cpus, open_engine)
        )
        missing = list(run.missing(run.grid.all()))
        self._dispatch = Dispatch(missing, self._rows_left)
        self._progress = ClusterProgress(run.grid.total - sum(map(len, missing)), run.grid.total)
        self._hired: list[Hired] = []
        self._refs: dict[Any, tuple[Hired, Callable[[Hired, Any], None]]] = {}
        """What was asked of workers and has no answer yet, and what is done with the answer."""
        self._model, self._most_workers = "", (0, 0)
        """And how many were ready at a time, on how many nodes."""
        self._early_deaths = 0
        self._refusals: dict[str, LlavaError] = {}
        """Why nodes answer nothing, by their ids."""
        self._gone: set[str] = set()
        """The ids of nodes that were lost."""
        self._last_refusal: LlavaError | None = None
        self._failure: LlavaError | None = None
        """What ends the run once the answers that were begun are finished."""
        self._looked = self._had_workers = time.monotonic()

    def answer_all(self, go_on: Callable[[], bool]) -> None:
        """Returns once all is committed or, once `go_on()` is false, what was begun is finished.

        Raises the error that no worker can do anything about.
        """
        is_stopping = False
        total, quiet, as_json = self._run.grid.total, self._job.quiet, self._job.json_progress
        with render.counting(total, self._progress.read, quiet, as_json):
            while not self._dispatch.is_done:
                if go_on() and not self._failure:
                    self._hire()
                    self._hand_out()
                elif not is_stopping:
                    is_stopping = True
                    self._stop()
                if is_stopping and not any(one.work for one in self._hired):
                    break
                for ref in self._cluster.wait(list(self._refs), _POLL_SECONDS):
                    self._settle(ref)
                self._write_rows()
                if time.monotonic() - self._looked >= _POLL_SECONDS:
                    self._look()
            if self._dispatch.is_done:
                self._progress.end()
        if self._failure and not self._dispatch.is_done:
            raise self._failure
        self._note(self._speed())
        note_refusal(self._job, self._last_refusal)

    def _hire(self) -> None:
        """Asks for as many workers as are of use: by default for one more than there is room for.

        A node that comes later gets that one, and a cluster that can grow sees that there is need for it.
        """
        room = sum(self._need.fits(node) for node in self._nodes)
        wanted = self._dispatch.uncommitted(self._most or room + 1)
        there = sum(self._most is None or not one.is_refused for one in self._hired)
        for _ in range(there, wanted):
            one = Hired(self._cluster.hire(self._need))
            self._hired.append(one)
            self._ask(one, self._cluster.place(one.actor), self._on_placed)
        for one in [one for one in self._hired if not one.node][: max(0, there - wanted)]:
            self._dismiss(one)

    def _ask(self, one: Hired, ref: Any, then: Callable[[Hired, Any], None]) -> None:
        self._refs[ref] = one, then

    def _hand_out(self) -> None:
        ready = [one for one in self._hired if one.is_ready]
        for one in ready:
            if one.work is None and (work := self._dispatch.next(len(ready))):
                one.work = work
                if work.row is None:
                    self._ask(one, self._cluster.ask(one.actor, "answer", work.ranges), self._on_ranges)
                else:
                    ref = self._cluster.ask(one.actor, "answer_row", work.ranges[0], work.row)
                    self._ask(one, ref, self._on_row)

    def _stop(self) -> None:
        """Has workers finish what they have begun, and asks for no more of them."""
        for one in list(self._hired):
            if one.work:
                self._ask(one, self._cluster.ask(one.actor, "stop"), lambda one, nothing: None)
            else:
                self._dismiss(one)

    def _look(self) -> None:
        """Looks at the cluster, and asks the workers for their progress."""
        self._looked, self._nodes = time.monotonic(), self._cluster.nodes()
        for one in self._hired:
            if one.work and not one.is_polled:
                one.is_polled = True
                self._ask(one, self._cluster.ask(one.actor, "progress"), self._on_progress)
        if any(one.node and not one.is_refused for one in self._hired):
            self._had_workers = self._looked
        elif self._looked - self._had_workers >= _WAIT_SECONDS:
            self._had_workers = float("inf")
            self._note(f"no node has room for a worker now, which takes {self._need}: waiting for one")

    def _settle(self, ref: Any) -> None:
        one, then = self._refs.pop(ref, (None, None))
        if one is None or then is None:  # its worker is gone
            return
        try:
            result = self._cluster.result(ref)
        except WorkerGone as error:
            self._on_gone(one, error)
        except LlavaError as error:
            self._on_error(one, error)
        else:
            then(one, result)

    def _on_placed(self, one: Hired, node: str) -> None:
        one.node = node
        ref = self._cluster.prepare(one.actor, versions(), self._assignment)
        self._ask(one, ref, self._on_prepared)

    def _on_prepared(self, one: Hired, found: Ready | str) -> None:
        """A worker is ready, or says why it is not."""
        if isinstance(found, str):
            self._refuse(one, ModelUnusable(self._name(one), found, "pip install llava-cli there"))
        elif found.refusal:
            self._refuse(one, ModelUnusable(self._name(one), found.refusal.reason, found.refusal.hint))
        else:
            one.is_ready, self._early_deaths = True, 0
            self._progress.joined(one, self._cluster.name_of(one.node))
            if not self._model and not self._job.quiet:
                render.note_demo_model(self._job.settings.load, found.model)
            self._model = found.model
            ready = [other.node for other in self._hired if other.is_ready]
            self._most_workers = max(self._most_workers, (len(ready), len(set(ready))))

    def _name(self, one: Hired) -> str:
        return f"node {self._cluster.name_of(one.node)}"

    def _refuse(self, one: Hired, error: LlavaError) -> None:
        """A worker gets no work. Raises the error if there is no node left that could answer."""
        one.is_ready, one.is_refused = False, True
        self._progress.left(one)
        if one.node not in self._refusals:
            self._refusals[one.node] = error
            if any(node.id not in self._refusals for node in self._fitting()):
                name = self._name(one)
                words = str(error) if error.thing == name else f"{name}: {error}"
                self._note(f"llava: {words}; it gets no work\n  {error.hint}")
        if not any(other.is_ready for other in self._hired):
            nodes = self._fitting()
            if nodes and all(node.id in self._refusals for node in nodes):
                raise error

    def _fitting(self) -> list[Node]:
        """The nodes that could have a worker."""
        return [node for node in self._nodes if self._need.fits(node)]

    def _on_ranges(self, one: Hired, answered: Answered) -> None:
        assert one.work
        work, one.work = one.work, None
        self._on_progress(one, answered.counts)
        self._last_refusal = answered.last_refusal or self._last_refusal
        for rows in work.ranges:
            if rows.number in answered.committed:
                self._dispatch.committed(rows)
        if len(answered.committed) < len(work.ranges):  # it was stopped
            self._dispatch.died(work, node_is_lost=True)

    def _on_row(self, one: Hired, row: dict[str, Any]) -> None:
        assert one.work
        work, one.work = one.work, None
        self._dispatch.answered(work, row)

    def _on_progress(self, one: Hired, counts: Counts) -> None:
        one.is_polled = False
        self._progress.report(one, counts)

    def _on_error(self, one: Hired, error: LlavaError) -> None:
        """A worker cannot load the model or has lost its GPU, or nobody can read the source or write the rows."""
        self._give_back(one, is_at_fault=False)
        if not one.is_ready or isinstance(error, DeviceLost):
            self._refuse(one, error)
        else:
            self._failure = self._failure or error

    def _on_gone(self, one: Hired, error: WorkerGone) -> None:
        """A worker is gone: others get its work."""
        self._nodes = self._cluster.nodes()
        is_lost = error.is_unreachable or one.node not in {node.id for node in self._nodes}
        self._dismiss(one)
        self._note_gone(one, str(error), is_lost)
        if one.work:
            self._give_back(one, is_at_fault=not is_lost)
            if self._dispatch.deaths_in_a_row > _MOST_DEATHS + CAREFUL_AFTER * len(self._hired):
                self._failure = ModelUnusable("--ray", f"workers end, and answer nothing: {error}", _DEBUG_HINT)
        elif not one.is_ready and not is_lost:
            self._on_early_death(str(error))

    def _note_gone(self, one: Hired, reason: str, node_is_lost: bool) -> None:
        if node_is_lost and one.node and one.node not in self._gone:
            self._gone.add(one.node)
            self._note(f"{self._name(one)} is gone; others get its rows")
        elif one.node and not node_is_lost:
            self._note(f"{self._name(one)}: a worker has ended ({reason}); others get its rows")

    def _on_early_death(self, reason: str) -> None:
        """A worker has ended as it started. Raises `ModelUnusable` if all do."""
        self._early_deaths += 1
        if self._early_deaths < _MOST_EARLY_DEATHS:
            return
        ready = sum(one.is_ready for one in self._hired)
        if not ready:
            raise ModelUnusable("--ray", f"workers end as they start: {reason}", _DEBUG_HINT)
        self._most = ready

    def _give_back(self, one: Hired, is_at_fault: bool) -> None:
        """What a worker had in hand is to be handed out again, but for what it has committed."""
        if one.work:
            work, one.work = one.work, None
            for rows in work.ranges:
                if self._run.has(rows):
                    self._dispatch.committed(rows)
            self._dispatch.died(work, node_is_lost=not is_at_fault)

    def _dismiss(self, one: Hired) -> None:
        self._hired.remove(one)
        self._progress.left(one)
        self._refs = {ref: item for ref, item in self._refs.items() if item[0] is not one}
        self._cluster.dismiss(one.actor)

    def _write_rows(self) -> None:
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

    def _speed(self) -> str:
        """How fast it went, in a line."""
        workers, nodes = self._most_workers
        who = f"{workers} worker{'s' * (workers != 1)} on {nodes} node{'s' * (nodes != 1)}"
        return f"{self._progress.speed()} · {who}"

    def _note(self, words: str) -> None:
        if not self._job.quiet:
            render.note(words)
