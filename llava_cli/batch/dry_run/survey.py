"""What a run is about: its rows and what their pictures are, in a database on disk, since there may be millions."""

from __future__ import annotations

import math
import sqlite3
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from llava_cli.batch.scratch import scratch_error
from llava_cli.batch.tasks import Task
from llava_cli.conversation import Picture
from llava_cli.errors import LlavaError

SIZES = (256_000, 1_000_000, 4_000_000, 16_000_000)
"""Pixels up to which pictures belong to a class; the last class is of larger ones."""
_ROUNDS = 4
_TABLES = """
create table picture (id integer primary key, about text unique, first int);
create table row (place integer primary key, picture int, characters int, line blob);
create table opened (picture integer primary key, pixels int, scale int, bytes blob);
create table refused (picture integer primary key, kind text, reason text);
"""


@dataclass(frozen=True)
class Refusal:
    """Pictures that cannot be opened for one reason."""

    kind: str
    """The error's type, as in rows."""
    reason: str
    pictures: int
    rows: int


class Survey:
    """Rows by their numbers, and their pictures as they are opened.

    Two rows are about the same picture where its name, its part and its region are the same.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._last: tuple[str, int] = "", 0
        """What the last row was about, and the number of its picture."""

    def add(self, place: int, task: Task) -> None:
        """Takes in the task of row number `place`."""
        about = repr((task.image, task.part, task.region))
        if about != self._last[0]:
            insert = "insert into picture (about, first) values (?, ?) on conflict (about) do nothing"
            self._database.execute(insert, (about, place))
            self._last = about, self._number("select id from picture where about = ?", about)
        values = place, self._last[1], len(task.question) + len(task.system or ""), task.to_line()
        self._database.execute("insert into row values (?, ?, ?, ?)", values)

    def to_open(self) -> Iterator[Task]:
        """A task for each picture, in their order."""
        yield from self._tasks("select line from picture join row on place = first order by id")

    def opened(self, number: int, task: Task, picture: Picture | LlavaError) -> None:
        """Takes in what became of picture `number` of those `to_open`, counted from 0."""
        if isinstance(picture, LlavaError):
            refused = number + 1, type(picture).__name__, picture.reason
            self._database.execute("insert into refused values (?, ?, ?)", refused)
            return
        width, height = picture.size
        same = f"{picture.sha256} {task.part!r} {task.region}".encode()
        opened = number + 1, width * height, round(2 * math.log2(width * height)), same
        self._database.execute("insert into opened values (?, ?, ?, ?)", opened)

    @property
    def rows(self) -> int:
        return self._number("select count(*) from row")

    @property
    def pictures(self) -> int:
        return self._number("select count(*) from picture")

    @property
    def questions(self) -> int:
        """The most rows that a picture has."""
        return self._number("select coalesce(max(n), 0) from (select count(*) n from row group by picture)")

    @property
    def answerable(self) -> int:
        """Rows whose pictures can be opened."""
        return self._number("select count(*) from row join opened using (picture)")

    def sizes(self) -> list[tuple[int, int]]:
        """(pictures, rows) of each class of `SIZES` that can be opened."""
        found = [[0, 0] for _ in range(len(SIZES) + 1)]
        query = "select pixels, count(*) from opened join row using (picture) group by picture"
        for pixels, rows in self._database.execute(query):
            one = found[size_class(pixels)]
            one[0] += 1
            one[1] += rows
        return [(pictures, rows) for pictures, rows in found]

    def refusals(self) -> list[Refusal]:
        """Why pictures cannot be opened, the most frequent reason first."""
        query = """select kind, reason, count(*) as pictures, sum(rows) from refused join
            (select picture as id, count(*) as rows from row group by picture) on id = picture
            group by kind, reason order by pictures desc, kind, reason"""
        return [Refusal(*values) for values in self._database.execute(query)]

    def refused(self, refusal: Refusal) -> Iterator[Task]:
        """A task for each picture that cannot be opened for this reason."""
        query = """select line from refused join picture on id = refused.picture join row on place = first
            where kind = ? and reason = ? order by id"""
        yield from self._tasks(query, refusal.kind, refusal.reason)

    def doubles(self) -> tuple[int, int]:
        """How many pictures have the bytes of an earlier one, and how many rows are about them."""
        query = """select count(distinct row.picture), count(*) from row join opened using (picture)
            join (select bytes, min(picture) as one from opened group by bytes) using (bytes)
            where row.picture != one"""
        ((pictures, rows),) = self._database.execute(query)
        return pictures, rows

    def groups_of_doubles(self) -> Iterator[list[Task]]:
        """Tasks about pictures with equal bytes: a list for each such group, in the order of their first ones."""
        query = """select one, line from opened join
            (select bytes, min(picture) as one from opened group by bytes having count(*) > 1) using (bytes)
            join picture on id = opened.picture join row on place = first order by one, id"""
        group: list[Task] = []
        begun = None
        for one, line in self._database.execute(query):
            if group and one != begun:
                yield group
                group = []
            begun = one
            group.append(Task.from_line(line))
        if group:
            yield group

    def spread(self, count: int) -> list[tuple[int, Task]]:
        """About `count` numbered rows that stand for all that can be answered; all questions about each picture taken.

        Pictures are taken at equal distances from all of them in the order of their sizes and of the length of their
        questions, and come in rounds, each of which goes through the whole source: so do the first rows of any number.
        """
        total, pictures = self.answerable, self._number("select count(*) from opened")
        wanted = min(pictures, -(-count * pictures // total)) if total else 0
        query = """select picture from opened join row using (picture) group by picture
            order by scale, sum(characters), picture"""
        chosen: list[int] = []
        for number, (picture,) in enumerate(self._database.execute(query)):
            if number == len(chosen) * pictures // wanted + pictures // wanted // 2:
                chosen.append(picture)
        found: list[tuple[int, Task]] = []
        for begin in range(_ROUNDS):
            for picture in sorted(chosen[begin::_ROUNDS]):
                found += self._numbered("select place, line from row where picture = ? order by place", picture)
        if len(found) <= count:
            return found
        return [found[number * len(found) // count] for number in range(count)]

    def heaviest(self, count: int) -> list[tuple[int, Task]]:
        """The `count` consecutive rows whose pictures have the most pixels, numbered: with them, memory is fullest."""
        window: deque[tuple[int, int]] = deque()
        pixels_in, most, chosen = 0, -1, (0, 0)
        for place, pixels in self._database.execute(
            "select place, pixels from row join opened using (picture) order by place"
        ):
            window.append((place, pixels))
            pixels_in += pixels
            if len(window) > count:
                pixels_in -= window.popleft()[1]
            if pixels_in > most:
                most, chosen = pixels_in, (window[0][0], place)
        query = "select place, line from row join opened using (picture) where place between ? and ? order by place"
        return list(self._numbered(query, *chosen)) if window else []

    def _number(self, query: str, *values: object) -> int:
        ((number,),) = self._database.execute(query, values)
        return int(number)

    def _tasks(self, query: str, *values: object) -> Iterator[Task]:
        yield from (Task.from_line(line) for (line,) in self._database.execute(query, values))

    def _numbered(self, query: str, *values: object) -> Iterator[tuple[int, Task]]:
        yield from ((place, Task.from_line(line)) for place, line in self._database.execute(query, values))


@contextmanager
def new_survey() -> Iterator[Survey]:
    """An empty one. Raises `OutputError` where there is no room for it.

    Its file has no name: a process that is interrupted while it imports torch leaves no other one behind.
    """
    try:
        with closing(sqlite3.connect("", check_same_thread=False)) as database:
            database.executescript(f"pragma journal_mode = off; pragma cache_size = -8000; {_TABLES}")
            yield Survey(database)
    except sqlite3.Error as error:
        raise scratch_error(error) from None


def size_class(pixels: int) -> int:
    """The number of a picture's class of `SIZES`."""
    return bisect_left(SIZES, pixels)


def names_of_sizes(unit: str = "megapixels") -> Sequence[str]:
    numbers = [f"{pixels / 1e6:g}" for pixels in SIZES]
    return [*(f"up to {number} {unit}" for number in numbers), f"over {numbers[-1]} {unit}"]
