"""Which sequences are answered next: they wait, join the batch by their length, and wait again if memory runs out."""

from __future__ import annotations

import time
from itertools import accumulate
from typing import Any

from llava_cli.engine.base import Answer
from llava_cli.engine.forward import release_memory
from llava_cli.engine.generate.batch import PREFILL_TOKENS, Batch
from llava_cli.engine.generate.prompt_cache import PromptCache
from llava_cli.engine.generate.sequence import Follower, Sequence
from llava_cli.errors import LlavaError, OutOfMemory, is_out_of_memory
from llava_cli.hardware.memory import cards_of, free_memory

MAX_ROWS = 256
"""Sequences at a time, for a model so small that more than its matrix products counts."""
LARGE_PARAMETERS, LARGE_ROWS = 100_000_000, 16
"""From how many weights a model is large, and how many rows it gets on a CPU: more gain little and show up late."""
GATHER_SECONDS = 0.02
"""How long a few sequences may wait for others to join with: a small model reads eight prompts in the time of three."""
_CACHE_SHARE = {"cpu": 0.6, "cuda": 0.3}
"""Of the free memory; on a GPU there is a static KV cache beside the one that prompts are read into."""


class Scheduler:
    """The sequences that wait for a model, and the batch of at most `size` of them (None: what memory allows).

    Sequences join once half of the batch has left, which is the least work in all. With a prompt cache, somebody waits
    for each, and it joins at the next step, or with others that come within `GATHER_SECONDS`.
    """

    def __init__(self, model: Any, size: int | None = None, prompt_cache: PromptCache | None = None) -> None:
        self.model, self.size, self._prompt_cache = model, size, prompt_cache
        self.waiting: list[Sequence] = []
        self._waiting_since = 0.0
        self._batch = Batch(model, prompt_cache)

    @property
    def prefetch(self) -> int:
        """How many prompts to prepare while the model runs: the next batch of a small one, a few of a large one."""
        return MAX_ROWS if self.model.num_parameters() < LARGE_PARAMETERS else 2 * LARGE_ROWS

    @property
    def most_rows(self) -> int:
        """How many sequences there may be at a time, before the memory is asked."""
        return self.size or (LARGE_ROWS if _is_large(self.model) else MAX_ROWS)

    @property
    def running(self) -> int:
        """How many sequences are being answered."""
        return len(self._batch.sequences)

    @property
    def free_slots(self) -> int:
        """How many more sequences it wants: none before half of the batch has left.

        A large batch begins with the first quarter, while the others are prepared.
        """
        size = self.size or 1
        if self.running * 2 > size:
            return 0
        target = size if self.running else min(size, max(LARGE_ROWS, size // 4))
        return max(0, target - len(self.waiting))

    def add(self, sequence: Sequence) -> None:
        """Lets one more sequence wait."""
        self._waiting_since = self._waiting_since if self.waiting else time.monotonic()
        self.waiting.append(sequence)
        self.size = self.size or _rows_that_fit(self.model, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drops a sequence and its replay, whether they wait or are being answered."""
        for one in filter(None, (sequence, sequence.replay)):
            if one in self.waiting:
                self.waiting.remove(one)
            elif one in self._batch.sequences:
                self._batch.remove(one)

    def drop_new(self) -> None:
        """Drops the sequences that wait and were not begun."""
        self.waiting = [sequence for sequence in self.waiting if sequence.has_begun]

    def step(self) -> list[tuple[int, Answer | LlavaError]]:
        """Adds a token to each sequence, also to waiting ones that fit -> the outcomes, by number."""
        joining = self._next_to_join()
        try:
            if joining:
                self._batch.join(joining)
            complete = self._batch.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return self._outcomes(complete)
        # Outside of the handler, because the error refers to what did not fit.
        return self._shrink({sequence.number: sequence for sequence in [*self._batch.sequences, *joining]})

    def _outcomes(self, complete: list[Sequence]) -> list[tuple[int, Answer | LlavaError]]:
        """The answers of sequences by number; where there is a replay, it waits, and its answer comes later."""
        outcomes: list[tuple[int, Answer | LlavaError]] = []
        for sequence in complete:
            outcome = _outcome(sequence)
            if sequence.replay and isinstance(outcome, Answer):
                sequence.replay.follow(sequence, outcome)
                self.add(sequence.replay)
            else:
                outcomes.append((sequence.number, outcome))
        return outcomes

    def _next_to_join(self) -> list[Sequence]:
        """Takes sequences from those that wait: in their order where somebody waits for each.

        Else once half of the batch has left, the shortest first and those about the same pictures together.
        """
        if self.size is None:
            return []
        if self._prompt_cache is not None:
            if len(self.waiting) * 2 < self.running and time.monotonic() - self._waiting_since < GATHER_SECONDS:
                return []
        elif self.running * 2 > self.size:
            return []
        else:
            self._sort_waiting()
        count = self._first_pass(self.size - self.running)
        joining, self.waiting = self.waiting[:count], self.waiting[count:]
        return joining

    def _first_pass(self, count: int) -> int:
        """Of the first `count` that wait, how many may join now.

        A pass on a GPU reads many prompts: those who are being answered wait for one at most.
        """
        most = PREFILL_TOKENS.get(self.model.device.type)
        if most is None or self._prompt_cache is None or not self.running:
            return count
        ends = accumulate(len(sequence.prompt) for sequence in self.waiting[:count])
        return min(count, max(1, sum(end <= most for end in ends)))

    def _sort_waiting(self) -> None:
        ranks: dict[tuple[str, ...], tuple[int, int]] = {}  # of pictures: the longest prompt and the first number
        for sequence in self.waiting:
            longest, first = ranks.get(sequence.images, (0, sequence.number))
            ranks[sequence.images] = max(longest, len(sequence.prompt)), min(first, sequence.number)
        self.waiting.sort(key=lambda sequence: ranks[sequence.images])

    def _shrink(self, sequences: dict[int, Sequence]) -> list[tuple[int, Answer | LlavaError]]:
        """After memory ran out: all sequences wait again, for batches of half the size."""
        if self._prompt_cache is not None:
            self._prompt_cache.clear()
        self._batch = Batch(self.model, self._prompt_cache)
        release_memory(self.model)
        if len(sequences) == 1:
            ((number, sequence),) = sequences.items()
            if isinstance(sequence, Follower):
                return [(number, sequence.first)]
            hint = "llava batch --retry-errors asks again"
            return [(number, OutOfMemory("memory", "not enough for this prompt", hint))]
        self.size = len(sequences) // 2
        for sequence in sequences.values():
            if sequence.on_token is None:  # else its beginning has been shown, and it continues
                sequence.restart()
        self.waiting[:0] = sequences.values()
        return []


def _outcome(sequence: Sequence) -> Answer | LlavaError:
    try:
        return sequence.finish()
    except LlavaError as error:
        return error


def _rows_that_fit(model: Any, sequence: Sequence) -> int:
    """How many sequences of this length fit in memory, by the size of their keys and values."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    free = free_memory(model.device.type, cards_of(model))
    share = _CACHE_SHARE["cuda" if model.device.type == "cuda" else "cpu"]
    rows = free * share / (bytes_per_token * sequence.max_length)
    return int(min(max(rows, 1), LARGE_ROWS if _is_large(model) else MAX_ROWS))


def _is_large(model: Any) -> bool:
    return model.device.type == "cpu" and bool(model.num_parameters() > LARGE_PARAMETERS)
