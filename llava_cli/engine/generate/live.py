"""One model that answers requests as they come, all that are there together."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_cli.engine.base import Answer, Request, always
from llava_cli.engine.generate.batch import Row, Token
from llava_cli.engine.generate.prompt_cache import Kept
from llava_cli.engine.generate.scheduler import Schedule
from llava_cli.errors import LlavaError, ModelUnusable, brief, model_errors
from llava_cli.hardware.memory import TIDY, free_memory, give_back_memory

if TYPE_CHECKING:
    from llava_cli.conversation import Conversation
    from llava_cli.engine.local import LocalEngine

SHARE = 0.1  # of the memory that is free when it begins keeps what was read

Put = Callable[["Token | Answer | LlavaError"], None]
"""Gets an answer's tokens as they come, and at last the whole of it, or what prevents one; from another thread."""


class Unwanted(Exception):
    """Whoever asked has gone, and what was asked is not looked at any more."""


@dataclass(frozen=True)
class Asked:
    """A request that is being answered."""

    number: int
    put: Put
    begin: float
    row: Row | None


class Live:
    """Reads and answers in a thread of its own; a request joins those that are being answered at the next step.

    A request that goes on from another one, answered before, costs only what is new in it.
    """

    def __init__(self, engine: LocalEngine, size: int | None = None) -> None:
        network = engine.network
        budget = int(free_memory(engine.device) * SHARE)
        self.engine = engine
        self.kept = Kept(budget, getattr(network.config, "image_token_id", None))
        self._schedule = Schedule(network, size, self.kept)
        self._asked: dict[int, Asked] = {}
        self._numbers = itertools.count()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ended = False
        self._answered = 0  # since memory was given back
        self._thread = threading.Thread(target=self._run, name="llava engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """How many requests are being answered, or wait for it."""
        return len(self._asked)

    def ask(
        self,
        request: Request,
        put: Put,
        stream: bool = True,
        top: int | None = None,
        wanted: Callable[[], bool] = always,
    ) -> Asked:
        """Prepares a request, in the caller's thread, and has it answered.

        Without `stream` only the whole answer is put; with `top` each token, and as many of the likeliest in its place.
        Raises `PromptTooLong` and whatever else is wrong with it alone, or `Unwanted` where it is not `wanted` now.
        """
        if not wanted():
            raise Unwanted
        begin = time.perf_counter()
        pictures = tuple(picture.sha256 for picture in request.conversation.pictures)
        number = next(self._numbers)
        row = self.engine.row(number, request, pictures)
        asked = Asked(number, put, begin, row)
        if row is not None:
            row.pictures, row.show, row.top = pictures, put if stream or top is not None else None, top
        alone = request if row is None else None  # else its pictures are wanted no more
        self._inbox.put(lambda: self._take(asked, alone))
        return asked

    def count(self, conversation: Conversation) -> int:
        """How many tokens the conversation's prompt has."""
        return self.engine.count(conversation)

    def leave(self, asked: Asked) -> None:
        """Nobody waits for this answer any more."""
        self._inbox.put(lambda: self._drop(asked))

    def close(self) -> None:
        """Ends once all that was asked is answered."""
        self._inbox.put(self._end)
        self._thread.join()

    def _run(self) -> None:
        while True:
            busy = bool(self._schedule.running or self._schedule.waiting)
            if self._ended and not busy:
                return
            with suppress(queue.Empty):
                self._inbox.get(block=not busy)()
                continue  # all that have come by now join the same step
            try:
                with model_errors(self.engine.model, "fails while answering"):
                    done = self._schedule.step()
            except LlavaError as error:
                done = [(number, error) for number in list(self._asked)]
                self._schedule = Schedule(self.engine.network, self._schedule.size, self.kept)
            for number, outcome in done:
                if asked := self._asked.pop(number, None):
                    asked.put(outcome)
            self._answered += len(done)
            if self._answered >= TIDY:
                self._answered = 0
                give_back_memory()

    def _take(self, asked: Asked, alone: Request | None) -> None:
        if asked.row is not None:
            self._asked[asked.number] = asked
            self._schedule.put(asked.row)
            return
        assert alone is not None  # of a model that reads each prompt by itself
        try:
            for chunk in self.engine.stream(alone.conversation, alone.sampling):
                asked.put(Token(chunk.text))
                if chunk.answer:
                    asked.put(chunk.answer)
        except LlavaError as error:
            asked.put(error)
        except Exception as error:  # the thread goes on for the others
            asked.put(ModelUnusable(self.engine.model, f"fails while answering ({brief(error)})"))

    def _drop(self, asked: Asked) -> None:
        if self._asked.pop(asked.number, None) and asked.row is not None:
            self._schedule.leave(asked.row)

    def _end(self) -> None:
        self._ended = True
