"""One model that answers requests as they come, all that are there together: what a server runs."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_cli.engine.base import Answer, Request, always
from llava_cli.engine.generate.prompt_cache import PromptCache
from llava_cli.engine.generate.scheduler import Scheduler
from llava_cli.engine.generate.sequence import Sequence, Token
from llava_cli.errors import DeviceLost, LlavaError, ModelUnusable, message_line, model_errors
from llava_cli.hardware.allocator import TRIM_EVERY, trim_heap
from llava_cli.hardware.memory import free_memory

if TYPE_CHECKING:
    from llava_cli.conversation import Conversation
    from llava_cli.engine.local import LocalEngine

PROMPT_CACHE_SHARE = 0.1
"""The part of the memory that is free at the start which keeps prompts."""

OnEvent = Callable[["Token | Answer | LlavaError"], None]
"""Called from the service's thread with an answer's tokens, and at last with the answer or what prevents it."""


class ClientGone(Exception):
    """Nobody waits for the answer any more, so the request is not looked at."""


@dataclass(frozen=True)
class PendingRequest:
    """A request that waits for its answer: as a sequence or, if its model cannot batch, as it came."""

    number: int
    on_event: OnEvent
    work: Sequence | Request


class GenerationService:
    """Answers requests in a thread of its own; each joins those that are being answered at the next step.

    A request that continues an answered one costs only what is new in it.
    """

    def __init__(self, engine: LocalEngine, size: int | None = None) -> None:
        network = engine.network
        budget = int(free_memory(engine.device) * PROMPT_CACHE_SHARE)
        self.engine = engine
        self.prompt_cache = PromptCache(budget, getattr(network.config, "image_token_id", None))
        self._scheduler = Scheduler(network, size, self.prompt_cache)
        self._pending: dict[int, PendingRequest] = {}
        self._numbers = itertools.count()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_closing = False
        self._answered = 0  # since the heap was trimmed
        self.device_lost: DeviceLost | None = None
        self.on_device_lost: Callable[[], object] = lambda: None
        """Called once, in any thread, when no further request can be answered."""
        self._thread = threading.Thread(target=self._run, name="llava engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """How many requests are being answered, or wait for it."""
        return len(self._pending)

    def submit(
        self,
        request: Request,
        on_event: OnEvent,
        stream: bool = True,
        top_logprobs: int | None = None,
        is_wanted: Callable[[], bool] = always,
    ) -> PendingRequest:
        """Prepares a request, in the caller's thread, and has it answered.

        Without `stream`, `on_event` gets only the whole answer; with `top_logprobs`, every token and that many of the
        likeliest in its place. Raises `PromptTooLong` and whatever else is wrong with this request alone, and
        `ClientGone` if it is not wanted any more.
        """
        if not is_wanted():
            raise ClientGone
        number = next(self._numbers)
        on_token = on_event if stream or top_logprobs is not None else None
        try:
            sequence = self.engine.prepare(number, request, on_token, top_logprobs)
        except DeviceLost as error:
            self._lose_device(error)
            raise
        pending = PendingRequest(number, on_event, sequence if self.engine.can_batch(sequence) else request)
        self._inbox.put(lambda: self._start(pending))
        return pending

    def count(self, conversation: Conversation) -> int:
        """How many tokens the conversation's prompt has."""
        return self.engine.count(conversation)

    def cancel(self, pending: PendingRequest) -> None:
        """Ends a request whose answer nobody waits for any more."""
        self._inbox.put(lambda: self._drop(pending))

    def close(self) -> None:
        """Ends the thread once everything that was submitted is answered."""
        self._inbox.put(self._stop)
        self._thread.join()

    def _run(self) -> None:
        while True:
            is_busy = bool(self._scheduler.running or self._scheduler.waiting)
            if self._is_closing and not is_busy:
                return
            with suppress(queue.Empty):
                self._inbox.get(block=not is_busy)()
                continue  # all that have come by now join the same step
            try:
                with model_errors(self.engine.model, "fails while answering"):
                    outcomes = self._scheduler.step()
            except LlavaError as error:
                self._lose_device(error)
                outcomes = [(number, error) for number in list(self._pending)]
                self._scheduler = Scheduler(self.engine.network, self._scheduler.size, self.prompt_cache)
            for number, outcome in outcomes:
                if pending := self._pending.pop(number, None):
                    pending.on_event(outcome)
            self._answered += len(outcomes)
            if self._answered >= TRIM_EVERY:
                self._answered = 0
                trim_heap()

    def _start(self, pending: PendingRequest) -> None:
        if isinstance(pending.work, Sequence):
            self._pending[pending.number] = pending
            self._scheduler.add(pending.work)
        else:
            self._answer_alone(pending, pending.work)

    def _answer_alone(self, pending: PendingRequest, request: Request) -> None:
        try:
            for chunk in self.engine.stream(request.conversation, request.sampling):
                pending.on_event(Token(chunk.text))
                if chunk.answer:
                    pending.on_event(chunk.answer)
        except LlavaError as error:
            self._lose_device(error)
            pending.on_event(error)
        except Exception as error:  # the thread continues for the others
            pending.on_event(ModelUnusable(self.engine.model, f"fails while answering ({message_line(error)})"))

    def _lose_device(self, error: LlavaError) -> None:
        if isinstance(error, DeviceLost) and self.device_lost is None:
            self.device_lost = error
            self.on_device_lost()

    def _drop(self, pending: PendingRequest) -> None:
        if self._pending.pop(pending.number, None) and isinstance(pending.work, Sequence):
            self._scheduler.remove(pending.work)

    def _stop(self) -> None:
        self._is_closing = True
