"""An engine around one that chooses: it leaves open what cannot be promised, and may ask a larger model about that."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from llava_cli.batch.rows import error_object, is_unsure
from llava_cli.conversation import Conversation
from llava_cli.engine import Answer, Chunk, Engine, Request
from llava_cli.engine.base import always
from llava_cli.errors import BadData, LlavaError, ModelUnusable, ServerFailed
from llava_cli.settings import Sampling

if TYPE_CHECKING:
    from llava_cli.batch.calibration.calibration import Calibration

UNSURE = "unsure"
"""What is answered where no choice is probable enough, unless `--or` gives another word."""
WAITING_PER_REQUEST = 4
"""Questions that may wait for the larger model, with their pictures, for each that it is asked at a time."""
MAX_BEHIND = 256
"""Requests that may be drawn after one that waits for the larger model: the runner gives no more than some hundreds."""


@dataclass(frozen=True)
class JudgedAnswer(Answer):
    """An answer with what became of it. Its text is what counts in the end; tokens and times are the first model's."""

    threshold: float | None = None
    """How probable the best choice has to be, once calibrated."""
    escalated: dict[str, Any] | None = None
    """The larger model, and its answer or the error that it ended with."""

    def details(self) -> dict[str, Any]:
        judged = {"threshold": self.threshold, "escalated": self.escalated}
        return super().details() | {name: value for name, value in judged.items() if value is not None}

    @classmethod
    def of(cls, answer: Answer, **changes: Any) -> JudgedAnswer:
        """The same answer with changes."""
        return cls(**{field.name: getattr(answer, field.name) for field in fields(answer)} | changes)


@dataclass(frozen=True)
class Promise:
    """A calibration, and the threshold below which an answer is left open; at 0 none is."""

    calibration: Calibration
    threshold: float = 0.0

    def judge(self, answer: Answer, sampling: Sampling) -> Answer:
        """The answer with calibrated probabilities; unsure where the best one is too low. Raises `BadData`."""
        # As a row has them: they are what the calibration was made from.
        found = answer.details().get("probabilities", {})
        if found.keys() != set(self.calibration.choices):
            raise BadData(self.calibration.name, "made with other choices than those of this question")
        probabilities = self.calibration.calibrated(found)
        is_sure = max(probabilities.values()) >= self.threshold
        text = answer.text if is_sure else sampling.otherwise or UNSURE
        return JudgedAnswer.of(answer, text=text, probabilities=probabilities, threshold=self.threshold)


class JudgedEngine(Engine):
    """Answers as `engine` does, except for what a promise leaves open, which `larger` is asked about.

    `concurrency` is how many questions it is asked at a time. What it cannot answer stays open.
    """

    def __init__(
        self, engine: Engine, promise: Promise | None = None, larger: Engine | None = None, concurrency: int = 1
    ) -> None:
        self.model, self.precision, self.device = engine.model, engine.precision, engine.device
        self.load_seconds, self.where, self.decoding = engine.load_seconds, engine.where, engine.decoding
        self.family, self.context, self.has_new_copy = engine.family, engine.context, engine.has_new_copy
        self.picture_resize = None if larger else engine.picture_resize  # the larger one has another
        self._engine, self._promise, self._larger, self._concurrency = engine, promise, larger, concurrency
        self._unusable: LlavaError | None = None
        """Why the larger model is not asked any more."""

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        """The whole answer in one chunk: what becomes of it is not known before."""
        request = Request(conversation, sampling)
        answer = self._judge(self._engine.answer(conversation, self._chooses(sampling)), sampling)
        if self._larger and is_unsure(answer):
            answer = self._escalate(request, answer)
        yield Chunk(answer.text, answer)

    def prompt(self, conversation: Conversation) -> str:
        return self._engine.prompt(conversation)

    def count(self, conversation: Conversation) -> int:
        return self._engine.count(conversation)

    def peak_memory(self) -> int:
        return self._engine.peak_memory()

    def most_at_a_time(self, size: int | None = None) -> int:
        return self._engine.most_at_a_time(size)

    def answer_many(
        self,
        requests: Iterable[Request | LlavaError],
        size: int | None = None,
        go_on: Callable[[], bool] = always,
    ) -> Iterator[tuple[int, Answer | LlavaError]]:
        begun: dict[int, Request] = {}
        drawn = 0

        def noted() -> Iterator[Request | LlavaError]:
            nonlocal drawn
            for number, request in enumerate(requests):
                drawn = number
                if isinstance(request, Request):
                    begun[number] = request
                    request = replace(request, sampling=self._chooses(request.sampling))
                yield request

        with (
            closing(Threads(self._escalate, self._concurrency if self._larger else 0)) as escalations,
            closing(self._engine.answer_many(noted(), size, go_on)) as outcomes,  # type: ignore[type-var]
        ):
            for number, outcome in outcomes:
                request = begun.pop(number, None)
                if request and isinstance(outcome, Answer):
                    outcome = self._outcome_of(request, outcome)
                if request and self._larger and isinstance(outcome, Answer) and is_unsure(outcome):
                    escalations.begin(number, request, outcome)
                else:
                    yield number, outcome
                yield from escalations.finished(drawn)
            yield from escalations.rest()

    def _chooses(self, sampling: Sampling) -> Sampling:
        """What a model is asked for: always a choice, where the promise decides what to leave open."""
        return replace(sampling, otherwise=None, at_least=None) if self._promise else sampling

    def _judge(self, answer: Answer, sampling: Sampling) -> Answer:
        if not self._promise:
            return answer
        if sampling.choices and answer.probabilities is None:
            server = self._engine.where or self.model
            raise ServerFailed(server, "does not tell how probable the choices are", "leave --calibration out")
        return self._promise.judge(answer, sampling)

    def _outcome_of(self, request: Request, answer: Answer) -> Answer | LlavaError:
        try:
            return self._judge(answer, request.sampling)
        except LlavaError as error:
            return error

    def _escalate(self, request: Request, answer: Answer) -> Answer:
        """The larger model's answer in the place of an open one; or that one, with the reason."""
        assert self._larger
        sampling = replace(self._chooses(request.sampling), sight=False)
        try:
            if self._unusable:
                raise self._unusable
            second = self._larger.answer(request.conversation, sampling)
        except LlavaError as error:
            if isinstance(error, ModelUnusable):  # which every other question would meet, too
                self._unusable = error
            return JudgedAnswer.of(answer, escalated={"model": self._larger.model, "error": error_object(error)})
        escalated = {"model": self._larger.model, "answer": second.text, **second.details()}
        return JudgedAnswer.of(answer, text=second.text, escalated=escalated)


class Threads:
    """Threads that have the larger model answer; they are daemons, so that nobody who gives up has to wait for it."""

    def __init__(self, escalate: Callable[[Request, Answer], Answer], size: int) -> None:
        self._inbox: queue.SimpleQueue[tuple[int, Request, Answer] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[int, Answer | Exception]] = queue.SimpleQueue()
        self._begun: set[int] = set()
        """The numbers of what waits for the larger model."""
        self._escalate, self._size = escalate, size
        for _ in range(size):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while item := self._inbox.get():
            number, request, answer = item
            try:
                self._outbox.put((number, self._escalate(request, answer)))
            except Exception as error:
                self._outbox.put((number, error))

    def begin(self, number: int, request: Request, answer: Answer) -> None:
        self._begun.add(number)
        self._inbox.put((number, request, answer))

    def finished(self, drawn: int) -> Iterator[tuple[int, Answer]]:
        """What is answered by now; waits where too much is begun, or the oldest is far behind number `drawn`."""
        while self._begun and (
            len(self._begun) > WAITING_PER_REQUEST * self._size
            or drawn - min(self._begun) > MAX_BEHIND
            or not self._outbox.empty()
        ):
            yield self._next()

    def rest(self) -> Iterator[tuple[int, Answer]]:
        """Waits for all that is begun."""
        while self._begun:
            yield self._next()

    def _next(self) -> tuple[int, Answer]:
        number, outcome = self._outbox.get()
        self._begun.remove(number)
        if isinstance(outcome, Exception):
            raise outcome
        return number, outcome

    def close(self) -> None:
        for _ in range(self._size):
            self._inbox.put(None)
