"""How fast a process answers: the pictures and tokens of its rows, and its time."""

from __future__ import annotations

import time
from typing import Any

from llava_cli.batch.tally import Tally
from llava_cli.batch.tasks import Task
from llava_cli.render import Progress


class Meter:
    """Adds rows to a tally, and counts what they are about; its clock runs from the start."""

    def __init__(self, tally: Tally) -> None:
        self._tally, self._rows_before, self._tokens_before = tally, tally.rows, tally.tokens
        self._begin = time.monotonic()
        self.pictures = 0
        """Neighboring rows about the same one count once."""
        self._last: tuple[Any, ...] | None = None

    @property
    def tokens(self) -> int:
        return self._tally.tokens - self._tokens_before

    def add(self, task: Task, row: dict[str, Any]) -> None:
        self._tally.add(task, row)
        picture = task.image, task.part, task.region
        self.pictures += picture != self._last
        self._last = picture

    def progress(self) -> Progress:
        """How far the run is, with the rows that were there before; rates are since the start."""
        seconds = max(time.monotonic() - self._begin, 1e-6)
        counts = self._tally.rows, self._tally.failed, self.pictures, self.tokens
        return Progress(*counts, self.pictures / seconds, self.tokens / seconds, seconds)

    def speed(self, where: str) -> str:
        """A line; `where` is the server that answers, or empty."""
        if self._tally.rows == self._rows_before:
            return "nothing left to do"
        seconds = time.monotonic() - self._begin
        rates = f"{self.pictures / seconds:.1f} pictures/s · {self.tokens / seconds:.1f} tokens/s"
        return f"{rates} · {seconds:.1f} s" + (f" · {where}" if where else "")
