"""Who is answered next: rows wait, join the batch by their length, and wait again where memory runs out."""

from __future__ import annotations

import time
from typing import Any

from llava_cli.engine.base import Answer
from llava_cli.engine.generate.batch import Batch, Row
from llava_cli.engine.generate.prompt_cache import Kept
from llava_cli.errors import LlavaError, OutOfMemory, is_out_of_memory
from llava_cli.hardware.memory import free_memory

MOST = 256
"""Rows at a time: of a model so small that what is not products counts."""
_LARGE = 100_000_000, 16  # weights, and rows at a time on a CPU, which gains little from more and shows them late
GATHER = 0.02
"""Seconds that a few rows may wait for others to join with: a small model reads eight prompts in the time of three."""
_SHARE = 0.6  # of the free memory is for the KV cache


class Schedule:
    """The rows that wait for a model, and the batch of at most `size` that it answers (None: what memory allows).

    A row joins when half of the batch has left, which is the least work for all. With `kept`, of what was read before,
    somebody waits for each, and it joins at the next step, or with others that come within `GATHER`.
    """

    def __init__(self, model: Any, size: int | None = None, kept: Kept | None = None) -> None:
        self.model, self.size, self._kept = model, size, kept
        self.waiting: list[Row] = []
        self._since = 0.0  # the first of them has waited
        self._batch = Batch(model, kept)

    @property
    def ahead(self) -> int:
        """How many prompts should be prepared while the model runs: the next batch of a small one, a few of a large."""
        return MOST if self.model.num_parameters() < _LARGE[0] else 2 * _LARGE[1]

    @property
    def running(self) -> int:
        """How many rows are being answered."""
        return len(self._batch.rows)

    @property
    def room(self) -> int:
        """How many more rows it should be given: none before half of the batch has left.

        A large batch begins with the first quarter, while the others are prepared.
        """
        size = self.size or 1
        if self.running * 2 > size:
            return 0
        wanted = size if self.running else min(size, max(_LARGE[1], size // 4))
        return max(0, wanted - len(self.waiting))

    def put(self, row: Row) -> None:
        """One more row that waits."""
        self._since = self._since if self.waiting else time.monotonic()
        self.waiting.append(row)
        self.size = self.size or _fitting(self.model, row)

    def leave(self, row: Row) -> None:
        """Lets a row go, whether it waits or is being answered."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self._batch.rows:
            self._batch.leave(row)

    def step(self, admit: bool = True) -> list[tuple[int, Answer | LlavaError]]:
        """One more token for each row, of those that wait too if there is room: the numbers that are done, and how."""
        joining = self._joining() if admit else []
        try:
            if joining:
                self._batch.join(joining)
            done = self._batch.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return [(row.number, row.answer()) for row in done]
        # The error is let go first, for it holds what did not fit.
        return self._fewer({row.number: row for row in [*self._batch.rows, *joining]})

    def _joining(self) -> list[Row]:
        """Takes the next rows out of those that wait: in their order where somebody waits for each.

        Else when half of the batch has left, the shortest first and those about one picture together.
        """
        if self.size is None:
            return []
        if self._kept is not None:
            if len(self.waiting) * 2 < self.running and time.monotonic() - self._since < GATHER:
                return []
        elif self.running * 2 > self.size:
            return []
        else:
            longest: dict[Any, int] = {}
            for row in self.waiting:
                longest[row.group] = max(longest.get(row.group, 0), len(row.prompt))
            self.waiting.sort(key=lambda row: (longest[row.group], row.group))
        count = self.size - self.running
        joining, self.waiting = self.waiting[:count], self.waiting[count:]
        return joining

    def _fewer(self, rows: dict[int, Row]) -> list[tuple[int, Answer | LlavaError]]:
        """After memory ran out: all of them wait again, for batches of half the size."""
        if self._kept is not None:
            self._kept.clear()
        self._batch = Batch(self.model, self._kept)
        if len(rows) == 1:
            hint = "llava batch --retry-errors asks again"
            return [(number, OutOfMemory("memory", "not enough for this prompt", hint)) for number in rows]
        self.size = len(rows) // 2
        for row in rows.values():
            if row.show is None:  # else somebody has seen its beginning, and it goes on
                row.begin()
        self.waiting[:0] = rows.values()
        return []


def _fitting(model: Any, row: Row) -> int:
    """How many rows of this length have room in memory, by the size of their keys and values."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    room = free_memory(model.device.type) * _SHARE / (a_token * row.most_tokens)
    large = model.device.type == "cpu" and model.num_parameters() > _LARGE[0]
    return int(min(max(room, 1), _LARGE[1] if large else MOST))
