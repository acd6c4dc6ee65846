"""What a run will take: a sample of its rows is answered as the run would, and the time of each row is told by it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

from llava_cli.batch.dry_run.survey import Survey, size_class
from llava_cli.batch.picture_loader import PictureLoader
from llava_cli.batch.runner import Fill, conversation_of, sampling_of, unfilled
from llava_cli.batch.tasks import Task
from llava_cli.engine import Answer, Engine, Request
from llava_cli.errors import LlavaError
from llava_cli.settings import Settings

ENOUGH_SECONDS = 30.0
"""Once rows have been timed for so long, or answered for twice as long, the sample ends early."""
_LEAST_ROWS = 24
"""Rows of a sample, at least: their pictures differ."""
_PAUSE = 0.0005
"""Seconds without a row between what a step of a model gets done and what the next one does."""
_SHARE = 3
"""Where a run is too short to be timed while it is under way, one of how many rows is answered."""


@dataclass(frozen=True)
class Sample:
    """Rows that are answered in this order."""

    first: Sequence[Task]
    """They fill the batch and the memory, and are not timed."""
    timed: Sequence[Task]
    following: Sequence[Task]
    """They keep the batch full while the last of the others are answered, and are then given up."""

    def __len__(self) -> int:
        return len(self.first) + len(self.timed) + len(self.following)


def sample_of(survey: Survey, at_a_time: int, mark: Callable[[int, Task], Task]) -> Sample:
    """Rows that stand for all: of a run that is much longer than its first batches, from the midst of it.

    `mark` gives a row's task its marks by its number.
    """

    def marked(rows: Sequence[tuple[int, Task]]) -> list[Task]:
        return [mark(number, task) for number, task in rows]

    count = max(2 * at_a_time, _LEAST_ROWS)
    ahead = at_a_time * 3 // 2  # half a batch that is being answered, and prompts that are prepared before they join
    if survey.answerable > at_a_time + count + ahead:
        timed = marked(survey.spread(count))
        return Sample(marked(survey.heaviest(at_a_time)), timed, timed[:ahead])
    timed = marked(survey.spread(-(-survey.answerable // _SHARE)))
    return Sample(timed[:1], timed, [])


@dataclass(frozen=True)
class _Outcome:
    """A row of a sample that is done: its number, seconds since the sample was begun, its picture's size class."""

    number: int
    seconds: float
    size: int
    result: Answer | LlavaError


@dataclass
class Measured:
    """What answering a sample has shown."""

    seconds_per_row: float = 0.0
    first_seconds: float = 0.0
    """What the first rows took beyond that."""
    answers: list[tuple[int, Answer]] = field(default_factory=list)
    """Of the timed rows, each with the class of its picture's size."""
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Types and reasons of rows that could not be answered although their pictures can be opened."""
    rows: int = 0
    """How many were answered, timed or not."""
    seconds: float = 0.0
    """How long all of it took."""

    def take(self, outcome: _Outcome) -> None:
        if isinstance(outcome.result, LlavaError):
            self.errors[type(outcome.result).__name__, outcome.result.reason] += 1
        else:
            self.answers.append((outcome.size, outcome.result))

    def tokens(self, count: Callable[[Answer], int], sizes: Sequence[tuple[int, int]]) -> Tokens | None:
        """Tokens of prompts or of answers, over all rows of (pictures, rows) by size class; None if not known."""
        found = [(size, count(answer)) for size, answer in self.answers]
        if not any(number for _, number in found):
            return None
        numbers = [number for _, number in found]
        mean = sum(numbers) / len(numbers)
        means = [_mean([number for one, number in found if one == size]) for size in range(len(sizes))]
        total = sum(rows * (mean if own is None else own) for (_, rows), own in zip(sizes, means, strict=True))
        rows = sum(rows for _, rows in sizes)
        return Tokens(min(numbers), max(numbers), total / max(rows, 1), round(total), means)


@dataclass(frozen=True)
class Tokens:
    """Tokens of prompts, or of answers: those of a sample's rows, and from these an estimate for all rows."""

    least: int
    most: int
    mean: float
    total: int
    by_size: Sequence[float | None]
    """The mean of each class of pictures; None where the sample has none of them."""


def _mean(numbers: Sequence[int]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def measure(
    engine: Engine,
    loader: PictureLoader,
    sample: Sample,
    settings: Settings,
    size: int | None,
    show: Callable[[int], None] = lambda done: None,
    fill: Fill = unfilled,
) -> Measured:
    """Answers a sample as a run would (`answer_tasks`). `show` gets the number of rows that are done."""

    def outcomes(tasks: Iterable[Task]) -> Iterator[_Outcome]:
        return _outcomes(engine, loader, tasks, settings, size, fill)

    if sample.following:
        return _measure_midst(outcomes(chain(sample.first, sample.timed, sample.following)), sample, show)
    *_, first = outcomes(sample.first)
    return _measure_all(outcomes(sample.timed), first.seconds, show)


def _outcomes(
    engine: Engine, loader: PictureLoader, tasks: Iterable[Task], settings: Settings, size: int | None, fill: Fill
) -> Iterator[_Outcome]:
    """In the order in which they get done."""
    sizes: dict[int, int] = {}

    def requests() -> Iterator[Request | LlavaError]:
        for number, (task, picture) in enumerate(loader.load_all(tasks, engine.picture_resize)):
            if isinstance(picture, LlavaError):
                yield picture
                continue
            width, height = picture.size
            sizes[number] = size_class(width * height)
            try:
                task = fill(task, picture)
            except LlavaError as error:
                yield error
                continue
            picture = replace(picture, file=None)
            yield Request(conversation_of(task, picture, settings), sampling_of(task, settings.sampling))

    begin = time.monotonic()
    with closing(engine.answer_many(requests(), size)) as outcomes:  # type: ignore[type-var]
        for number, outcome in outcomes:
            yield _Outcome(number, time.monotonic() - begin, sizes.get(number, 0), outcome)


def _measure_midst(outcomes: Iterator[_Outcome], sample: Sample, show: Callable[[int], None]) -> Measured:
    """Times the rows that get done after the first ones and before the batch is no longer refilled."""
    first, wanted = len(sample.first), len(sample.first) + len(sample.timed)
    found, of_first = Measured(), Measured()
    bursts: list[_Burst] = []
    with closing(outcomes):  # type: ignore[type-var]
        for outcome in outcomes:
            if not bursts or outcome.seconds - bursts[-1].seconds > _PAUSE:
                if bursts and (bursts[-1].done >= wanted or _is_enough(bursts, first)):
                    break
                bursts.append(_Burst(outcome.seconds, bursts[-1].done if bursts else 0))
            bursts[-1].seconds = outcome.seconds
            bursts[-1].done += 1
            show(bursts[-1].done)
            if outcome.number < wanted:
                (of_first if outcome.number < first else found).take(outcome)
    found.answers = found.answers or of_first.answers
    found.rows, found.seconds = bursts[-1].done, bursts[-1].seconds
    begin = next(number for number, burst in enumerate(bursts) if burst.done >= min(first, found.rows))
    timed = bursts[begin:]
    found.seconds_per_row = _slope(timed) if len(timed) > 1 else found.seconds / found.rows
    found.first_seconds = max(0.0, timed[0].seconds - timed[0].done * found.seconds_per_row)
    return found


@dataclass
class _Burst:
    """Rows that get done by one step of a model."""

    seconds: float
    done: int
    """Rows up to the last one of these."""


def _is_enough(bursts: Sequence[_Burst], first: int) -> bool:
    """Whether half as many rows as the first ones have been timed for long, or these have taken very long."""
    begin = next((burst for burst in bursts if burst.done >= first), None)
    if begin is None:
        return False
    last = bursts[-1]
    is_timed = last.done >= begin.done + first // 2 and last is not begin
    return (is_timed and last.seconds - begin.seconds > ENOUGH_SECONDS) or begin.seconds > 2 * ENOUGH_SECONDS


def _slope(bursts: Sequence[_Burst]) -> float:
    """Seconds from a row to the next, by least squares, as if the rows of a burst got done one after the other."""
    points = [(bursts[0].done, bursts[0].seconds)]
    for before, burst in pairwise(bursts):
        step = (burst.seconds - before.seconds) / (burst.done - before.done)
        points += [
            (number, before.seconds + step * (number - before.done))
            for number in range(before.done + 1, burst.done + 1)
        ]
    middle = sum(number for number, _ in points) / len(points)
    spread = sum((number - middle) ** 2 for number, _ in points)
    return sum((number - middle) * seconds for number, seconds in points) / spread


def _measure_all(outcomes: Iterator[_Outcome], first_seconds: float, show: Callable[[int], None]) -> Measured:
    """Times all rows, from an empty batch to an empty one, after a row that took `first_seconds`."""
    found = Measured()
    for outcome in outcomes:
        found.take(outcome)
        found.rows += 1
        found.seconds = outcome.seconds
        show(found.rows)
    found.seconds_per_row = found.seconds / max(found.rows, 1)
    found.first_seconds = max(0.0, first_seconds - found.seconds_per_row)
    return found
