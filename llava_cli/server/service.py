"""The model that a server answers with, and the requests that it is answering."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from functools import lru_cache
from typing import Any
from uuid import uuid4

from llava_cli.engine import Answer
from llava_cli.engine import Request as EngineRequest
from llava_cli.engine.generate.form_sandbox import FormSandbox
from llava_cli.engine.generate.sequence import Token
from llava_cli.errors import LlavaError, ModelUnusable, UsageError
from llava_cli.server.api_error import ApiError
from llava_cli.server.bodies import RequestBodies
from llava_cli.server.chat_request import ChatRequest
from llava_cli.server.chat_response import ChatResponse
from llava_cli.server.generation import GenerationService, PendingRequest
from llava_cli.server.metrics import Metrics
from llava_cli.server.pictures import PictureOpener, RequestPictures
from llava_cli.server.worker_lane import WorkerLane
from llava_cli.settings import Sampling, Settings

Event = Token | Answer
"""A piece of an answer, or at last the whole of it."""


class Service:
    """What the routes share.

    `settings` are for requests that leave something open; at most `max_requests` of the user's own commands and as many
    of other clients are answered or wait at a time; with `allow_urls` images may be public URLs.
    """

    def __init__(self, generation: GenerationService, settings: Settings, max_requests: int, allow_urls: bool) -> None:
        self.generation, self.settings, self.max_requests = generation, settings, max_requests
        self.bodies = RequestBodies()
        self.pictures = RequestPictures(allow_urls, generation.engine.picture_resize)
        self.logprobs_lane = WorkerLane(1)
        """For responses with probabilities: up to half a second of decoding single tokens."""
        self._form_lanes = {is_own: WorkerLane(1) for is_own in (False, True)}
        """For schemas, regular expressions and grammars: some take seconds to compile."""
        self._form_sandboxes = {is_own: FormSandbox() for is_own in (False, True)}
        self.started = self.last_request = time.monotonic()
        self.metrics = Metrics(lambda: self.running, lambda: generation.prompt_cache.nbytes)
        self.is_stopping = False
        self._running = {True: 0, False: 0}  # by whether they are the user's own
        tokenizer = generation.engine.prompter.tokenizer
        self._decode_token = lru_cache(65_536)(lambda token: str(tokenizer.decode([token])))

    def close(self) -> None:
        """Ends the sandboxes."""
        self.pictures.close()
        for sandbox in self._form_sandboxes.values():
            sandbox.close()

    @property
    def running(self) -> int:
        """How many requests are being answered or wait."""
        return sum(self._running.values())

    def admit(self, is_own: bool) -> None:
        """Counts one more request. Raises `ApiError` if there are too many, or the server is stopping.

        The user's own commands are counted apart, so that other clients cannot keep them out.
        """
        if self.is_stopping:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=5)
        if self._running[is_own] >= self.max_requests:
            raise ApiError(429, f"{self.max_requests} requests are waiting already", code="queue_full", retry_after=1)
        self._running[is_own] += 1

    def release(self, is_own: bool) -> None:
        self._running[is_own] -= 1
        self.last_request = time.monotonic()

    async def submit(self, chat: ChatRequest, is_own: bool) -> PendingAnswer:
        """Opens a request's pictures and gives it to the engine. If this is canceled, nothing more is done for it.

        Raises `ApiError` or a `LlavaError`.
        """
        defaults = Settings() if is_own else self.settings  # our own commands send every option that matters
        top = (chat.top_logprobs or 0) if chat.logprobs else None
        canceled = threading.Event()
        pending = PendingAnswer(self, is_own)

        def is_wanted() -> bool:
            return not canceled.is_set()

        def prepare(opener: PictureOpener) -> PendingRequest:
            request = EngineRequest(chat.question(defaults.system, opener), sampling)
            return self.generation.submit(request, pending.put, chat.stream, top, is_wanted)

        try:
            if chat.has_form:
                sampling = await self._form_lanes[is_own].run(lambda: self._formed(chat, defaults.sampling, is_own))
            else:
                sampling = chat.sampling(defaults.sampling, chat.form())
            urls = chat.image_urls()
            pending.request = await self.pictures.use(urls, is_own, is_wanted, prepare, self.generation.cancel)
        except BaseException:
            canceled.set()
            pending.close()
            raise
        return pending

    def _formed(self, chat: ChatRequest, defaults: Sampling, is_own: bool) -> Sampling:
        """The options of a request whose answer has a form, which is one that an answer can have. Raises `ApiError`."""
        form = chat.form()
        if not is_own:
            form.check_size()
        sampling = chat.sampling(defaults, form)
        try:
            if option := sampling.grammar_option:
                self._form_sandboxes[is_own].check(option, getattr(sampling, option.key))
            self.generation.engine.prepare_form(sampling)
        except (UsageError, ModelUnusable) as error:
            raise form.error(error) from None
        return sampling

    async def prompt(self, chat: ChatRequest) -> dict[str, Any]:
        """The prompt that the model would read, and its number of tokens. Only for the user's own commands."""

        def prepare(opener: PictureOpener) -> dict[str, Any]:
            conversation = chat.conversation(None, opener)
            if not conversation.turns:
                raise ApiError(400, "there is no message of a user's", "messages")
            return {
                "prompt": self.generation.engine.prompt(conversation),
                "tokens": self.generation.count(conversation),
            }

        return await self.pictures.use(chat.image_urls(), True, lambda: True, prepare)

    def response(self) -> ChatResponse:
        return ChatResponse(uuid4().hex, self.generation.engine.model, self._decode_token)


class PendingAnswer:
    """An admitted request: a queue of events from the engine's thread, until `close`."""

    def __init__(self, service: Service, is_own: bool) -> None:
        """Raises `ApiError`, as `Service.admit` does."""
        service.admit(is_own)
        self._is_own = is_own
        self.request: PendingRequest | None = None
        self._service, self._loop = service, asyncio.get_running_loop()
        self._queue = asyncio.Queue[Event | LlavaError]()
        self._is_complete = self._is_closed = False

    def put(self, event: Event | LlavaError) -> None:
        """Called by the engine's thread."""
        with suppress(RuntimeError):  # the event loop has ended, and with it the connection
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self) -> Event:
        """Raises a `LlavaError` if there is no answer."""
        event = await self._queue.get()
        self._is_complete = not isinstance(event, Token)
        if isinstance(event, LlavaError):
            raise event
        return event

    def close(self) -> None:
        """Makes room for another request; an incomplete answer is canceled. May be called twice."""
        if not self._is_closed:
            self._is_closed = True
            if self.request is not None and not self._is_complete:
                self._service.generation.cancel(self.request)
            self._service.release(self._is_own)
