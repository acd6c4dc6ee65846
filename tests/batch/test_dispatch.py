"""Whatever workers do, every range is committed, and no row has an error unless its worker died at it alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cli.batch.cluster.dispatch import CAREFUL_AFTER, MOST_RANGES, Dispatch, Work
from llava_cli.batch.ranges.row_range import Grid, RowRange

ERROR = b"error"


def line_of(row: int) -> bytes:
    return f"{row}".encode()


@dataclass
class Simulation:
    """Workers of a run, each of which does one thing at a time; `killers` are rows that end their worker."""

    grid: Grid
    killers: frozenset[int]
    random: Random
    keeps_attempts: bool = True
    """Whether the rows of a dead worker are there for the next one, as in a folder."""
    deaths: int = 0
    blamed: set[int] = field(default_factory=set)
    """Rows at which a worker died alone, with its node in place."""
    files: dict[int, list[bytes]] = field(default_factory=dict)
    attempts: dict[int, list[bytes]] = field(default_factory=dict)
    asked: int = 0

    def __post_init__(self) -> None:
        self.dispatch = Dispatch(self.grid.all(), self.left)
        self.workers: dict[int, tuple[Work, Iterator[None]]] = {}
        self._ids = count()

    def left(self, rows: RowRange) -> int:
        return len(self.attempts.get(rows.number, ()))

    def hire(self, workers: int) -> None:
        """Gives work to a worker that has none, if there is any."""
        if work := self.dispatch.next(workers):
            self.workers[next(self._ids)] = work, self.answer(work)

    def step(self, number: int) -> None:
        """One worker answers a row, or dies at it."""
        _, rows = self.workers[number]
        try:
            next(rows)
        except StopIteration:
            del self.workers[number]
        except SystemExit:
            self.lose(number, node_is_lost=False)

    def lose(self, number: int, node_is_lost: bool) -> None:
        work, _ = self.workers.pop(number)
        if work.row is not None and not node_is_lost:
            self.blamed.add(work.row)
        self.deaths += 1
        self.dispatch.died(work, node_is_lost)

    def answer(self, work: Work) -> Iterator[None]:
        if work.row is not None:
            yield
            self.dispatch.answered(work, {"line": self.ask(work.row)})
            return
        for rows in work.ranges:
            lines = list(self.attempts.get(rows.number, ()))
            while len(lines) < len(rows):
                yield
                lines.append(self.ask(rows.begin + len(lines)))
                if self.keeps_attempts:
                    self.attempts[rows.number] = max(lines, self.attempts.get(rows.number, []), key=len)
            self.commit(rows, lines)

    def ask(self, row: int) -> bytes:
        self.asked += 1
        if row in self.killers:
            raise SystemExit
        return line_of(row)

    def commit(self, rows: RowRange, lines: list[bytes]) -> None:
        self.files.setdefault(rows.number, list(lines))  # the first one wins
        self.dispatch.committed(rows)

    def write(self) -> None:
        """What the driver does with rows that were asked alone."""
        for found in self.dispatch.complete():
            lines = list(self.attempts.get(found.rows.number, ()))
            lines += [ERROR if row is None else row["line"] for row in found.after(len(lines))]
            assert None not in found.answers[:-1]
            if len(lines) == len(found.rows):
                self.commit(found.rows, lines)
            else:
                self.attempts[found.rows.number] = lines

    def run(self, workers: int, loss: float = 0.0, kill: float = 0.0) -> None:
        """Lets that many workers go on in any order, until all is done."""
        while not self.dispatch.is_done:
            if len(self.workers) < workers:
                self.hire(workers)
            number = self.random.choice(list(self.workers))
            chance = self.random.random()
            if chance < loss + kill:
                self.lose(number, node_is_lost=chance < loss)
            else:
                self.step(number)
            self.write()

    def rows(self) -> list[bytes]:
        return [line for rows in self.grid.all() for line in self.files[rows.number]]


@settings(deadline=None, max_examples=60)
@given(
    total=st.integers(1, 400),
    workers=st.integers(1, 9),
    killers=st.sets(st.integers(0, 399), max_size=6),
    loss=st.sampled_from([0.0, 0.02, 0.2]),
    kill=st.sampled_from([0.0, 0.02, 0.2]),
    keeps_attempts=st.booleans(),
    random=st.randoms(use_true_random=False),
)
def test_whatever_dies_each_range_is_committed_and_only_the_guilty_get_errors(
    total: int, workers: int, killers: set[int], loss: float, kill: float, keeps_attempts: bool, random: Random
) -> None:
    killers = {row for row in killers if row < total}
    simulation = Simulation(Grid(total), frozenset(killers), random, keeps_attempts)
    simulation.run(workers, loss, kill)
    rows = simulation.rows()
    failed = {row for row, line in enumerate(rows) if line == ERROR}
    assert [line for line in rows if line != ERROR] == [line_of(row) for row in range(total) if row not in failed]
    assert killers <= failed <= simulation.blamed
    if not kill:
        assert failed == killers


@pytest.mark.parametrize("keeps_attempts", [True, False])
def test_a_row_that_ends_its_workers_costs_three_of_them(keeps_attempts: bool) -> None:
    simulation = Simulation(Grid(640), frozenset([325]), Random(1), keeps_attempts)
    simulation.run(workers=1)
    assert simulation.rows().count(ERROR) == 1
    assert simulation.deaths == CAREFUL_AFTER + 1
    if keeps_attempts:
        assert simulation.asked == 640 + CAREFUL_AFTER, "what dead workers have answered is not asked again"


def test_lost_nodes_are_nobody_s_fault() -> None:
    (rows,) = ranges = list(Grid(1).all())
    dispatch = Dispatch(ranges)
    for _ in range(5 * CAREFUL_AFTER):
        work = dispatch.next(1)
        assert work == Work((rows,))
        dispatch.died(work, node_is_lost=True)
    assert dispatch.deaths_in_a_row == 0
    work = dispatch.next(1)
    assert work and work.row is None


def test_what_an_orphan_has_committed_is_not_handed_out_again() -> None:
    rows = list(Grid(8).all())
    dispatch = Dispatch(rows)
    work = dispatch.next(1)
    assert work
    dispatch.died(work, node_is_lost=True)
    for done in work.ranges:
        dispatch.committed(done)
    rest = dispatch.next(1)
    assert rest and not set(rest.ranges) & set(work.ranges)


def test_workers_that_die_one_after_another_are_counted_until_something_comes() -> None:
    dispatch = Dispatch(Grid(1).all())
    for deaths in range(1, 3):
        dispatch.died(dispatch.next(1) or Work(()), node_is_lost=False)
        assert dispatch.deaths_in_a_row == deaths
    alone = dispatch.next(1)
    assert alone and alone.row == 0
    dispatch.answered(alone, {"line": "row"})
    assert dispatch.deaths_in_a_row == 0
    (found,) = dispatch.complete()
    assert found.after(0) == [{"line": "row"}] and found.after(1) == []
    assert not dispatch.is_done
    dispatch.committed(found.rows)
    assert dispatch.is_done and dispatch.next(1) is None


def test_ranges_are_drawn_as_they_are_needed_and_less_is_handed_out_towards_the_end() -> None:
    grid, drawn, workers = Grid(10**8), 0, 16
    assert grid.count == 10**5

    def ranges() -> Iterator[RowRange]:
        nonlocal drawn
        for rows in grid.all():
            drawn += 1
            yield rows

    dispatch, sizes, done = Dispatch(ranges()), [], 0
    while work := dispatch.next(workers):
        sizes.append(len(work.ranges))
        assert drawn - done <= 2 * workers * MOST_RANGES, "no more than is handed out soon"
        for rows in work.ranges:
            dispatch.committed(rows)
        done += len(work.ranges)
    assert done == drawn == grid.count and dispatch.is_done
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == MOST_RANGES and sizes[-2 * workers :] == [1] * 2 * workers
