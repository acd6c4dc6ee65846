"""The routes: a request becomes a conversation, waits its turn with the others, and is told as it is answered."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from llava_cli import __version__, limits
from llava_cli.engine import Answer
from llava_cli.engine import Request as Asking
from llava_cli.engine.generate.batch import Likelihood, Token
from llava_cli.engine.generate.live import Asked, Live
from llava_cli.errors import LlavaError
from llava_cli.server.bodies import Bodies, Body, Left
from llava_cli.server.guard import is_own_socket
from llava_cli.server.lane import Lane
from llava_cli.server.metrics import CONTENT_TYPE, Metrics
from llava_cli.server.openai import ChatRequest, Refusal, Shapes
from llava_cli.server.pictures import Opener, Pictures
from llava_cli.settings import Settings
from llava_cli.untrusted_text import one_line

T = TypeVar("T")
Event = Token | Answer
EVENTS = "text/event-stream"


class Service:
    """What the routes share: the model, how it answers where a request does not say, and how many may wait."""

    def __init__(self, live: Live, settings: Settings, most: int, remote: bool) -> None:
        self.live, self.settings, self.most = live, settings, most
        self.bodies, self.pictures = Bodies(), Pictures(remote)
        self.shaping = Lane(1)
        """Answers with probabilities: up to half a second of decoding single tokens."""
        self.began = self.last = time.monotonic()
        self._entered = {True: 0, False: 0}  # the user's own, and those of others
        self.metrics = Metrics(lambda: self.busy, lambda: live.kept.size)
        self.draining = False
        tokenizer = live.engine.prompter.tokenizer
        self._word = lru_cache(65_536)(lambda token: str(tokenizer.decode([token])))

    @property
    def busy(self) -> int:
        """Requests that were let in and are not done."""
        return sum(self._entered.values())

    def enter(self, own: bool) -> None:
        """Lets one more request in. Raises `Refusal` where there are too many, or no more are taken.

        The user's own commands have a queue of their own, which others cannot fill.
        """
        if self.draining:
            raise Refusal(503, "the server is stopping", code="stopping", retry=5)
        if self._entered[own] >= self.most:
            raise Refusal(429, f"{self.most} requests are waiting already", code="queue_full", retry=1)
        self._entered[own] += 1

    def leave(self, own: bool) -> None:
        self._entered[own] -= 1
        self.last = time.monotonic()

    async def ask(self, chat: ChatRequest, own: bool) -> Answering:
        """Prepares a request and has it answered. Canceled, no more is done for it than had begun.

        Raises `Refusal`, and what is wrong with the request.
        """
        usual = Settings() if own else self.settings  # our own commands say all there is to say
        top = (chat.top_logprobs or 0) if chat.logprobs else None
        sampling, gone = chat.sampling(usual), threading.Event()
        answering = Answering(self, own)

        def is_wanted() -> bool:
            return not gone.is_set()

        def prepare(opener: Opener) -> Asked:
            request = Asking(chat.question(usual.system, opener), sampling)
            return self.live.ask(request, answering.put, chat.stream, top, is_wanted)

        try:
            answering.asked = await self.pictures.opened(chat.pictures(), own, is_wanted, prepare, self.live.leave)
        except BaseException:
            gone.set()
            answering.end()
            raise
        return answering

    async def prompt(self, chat: ChatRequest) -> dict[str, Any]:
        """The prompt that a request of our own commands becomes, and how many tokens it has."""

        def prepare(opener: Opener) -> dict[str, Any]:
            conversation = chat.conversation(None, opener)
            if not conversation.turns:
                raise Refusal(400, "there is no message of a user's", "messages")
            return {"prompt": self.live.engine.prompt(conversation), "tokens": self.live.count(conversation)}

        return await self.pictures.opened(chat.pictures(), True, lambda: True, prepare)

    def shapes(self) -> Shapes:
        return Shapes(uuid4().hex, self.live.engine.model, self._word)


class Answering:
    """A request that was let in, and has its place until its end: tokens, and at last the whole answer."""

    def __init__(self, service: Service, own: bool) -> None:
        """Raises `Refusal`."""
        service.enter(own)
        self._own = own
        self.asked: Asked | None = None
        self._service, self._loop = service, asyncio.get_running_loop()
        self._queue = asyncio.Queue[Event | LlavaError]()
        self._is_whole = self._has_ended = False

    def put(self, event: Event | LlavaError) -> None:
        """Called by the engine's thread."""
        with suppress(RuntimeError):  # the loop has ended, and with it whoever asked
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self) -> Event:
        """Raises what prevents an answer."""
        event = await self._queue.get()
        self._is_whole = not isinstance(event, Token)
        if isinstance(event, LlavaError):
            raise event
        return event

    def end(self) -> None:
        """Gives its place back, once; an answer that is not whole is not continued."""
        if not self._has_ended:
            self._has_ended = True
            if self.asked is not None and not self._is_whole:
                self._service.live.leave(self.asked)
            self._service.leave(self._own)


@dataclass(frozen=True)
class Wants:
    """How a request is to be answered."""

    stream: bool
    usage: bool
    likelihoods: bool

    @classmethod
    def of(cls, chat: ChatRequest) -> Wants:
        usage = chat.stream_options is not None and chat.stream_options.include_usage
        return cls(chat.stream, usage, bool(chat.logprobs))


def make_app(service: Service, said: Callable[[], dict[str, Any]]) -> FastAPI:
    """The app, without its guard; `said` is what it says of itself to our own commands."""
    app = FastAPI(
        title="llava", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    engine = service.live.engine

    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    async def health() -> dict[str, Any]:
        return {"status": "stopping" if service.draining else "ok"}

    @app.get("/llava")
    async def itself() -> dict[str, Any]:
        return said()

    @app.post("/llava/prompt")
    async def prompt(request: Request) -> Response:
        with service.bodies.one(own=True) as body:
            return Json(await service.prompt(await _received(request, body)))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    @app.head("/v1/models", include_in_schema=False)
    @app.api_route("/models", methods=["GET", "HEAD"], include_in_schema=False)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model()]}

    @app.get("/v1/models/{name:path}")
    @app.head("/v1/models/{name:path}", include_in_schema=False)
    async def model(name: str) -> dict[str, Any]:
        _check_model(name)
        return _model()

    def _model() -> dict[str, Any]:
        return {"id": engine.model, "object": "model", "created": 0, "owned_by": "llava", "context": engine.context}

    def _check_model(name: str) -> None:
        if name != engine.model:
            reason = f"{name[: limits.NAME_CHARACTERS]}: this server has {engine.model}"
            raise Refusal(404, reason, "model", "model_not_found")

    @app.post("/v1/chat/completions", openapi_extra=_BODY)
    @app.post("/chat/completions", include_in_schema=False)
    async def chat(request: Request) -> Response:
        own = is_own_socket(request.scope)
        with service.bodies.one(own) as body:
            chat = await _received(request, body)
            chat.check()
            if chat.model not in (None, "", "default"):
                _check_model(chat.model)
            answering = await _unless_left(request, service.ask(chat, own))
        wants = Wants.of(chat)
        del chat  # its pictures, while it is answered
        try:
            first = await _unless_left(request, answering.next())
            if wants.stream:
                return Stream(_stream(service, wants, first, answering), answering)
            answer = await _unless_left(request, _whole(service, wants, first, answering))
        except BaseException:
            answering.end()
            raise
        answering.end()
        return answer

    @app.get("/openapi.json", include_in_schema=False)
    async def description() -> dict[str, Any]:
        page = app.openapi()
        page.setdefault("components", {}).setdefault("schemas", {}).update(_PARTS_OF_BODY)
        return page

    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal) -> Response:
        service.metrics.replied(error.status)
        return Json(error.body(), error.status, error.headers())

    @app.exception_handler(LlavaError)
    async def failed(request: Request, error: LlavaError) -> Response:
        return await refuse(request, Refusal.of(error))

    @app.exception_handler(Left)
    async def left(request: Request, error: Left) -> Response:
        service.metrics.left()
        return Response(status_code=499)

    @app.exception_handler(UnicodeError)
    async def no_text(request: Request, error: UnicodeError) -> Response:
        return await refuse(request, Refusal(400, "there is text in it that is no Unicode (half of a surrogate pair)"))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        reason, path = str(error.detail), one_line(request.url.path)
        if error.status_code == 404:
            reason = f"there is no {path} here: POST /v1/chat/completions answers, GET /v1/models names the model"
        elif error.status_code == 405:
            reason = f"{one_line(request.method)} {path}: {reason}"
        refused = await refuse(request, Refusal(error.status_code, reason))
        refused.headers.update(error.headers or {})
        return refused

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        if os.environ.get("LLAVA_DEBUG"):
            raise error
        return await refuse(request, Refusal(500, "the server failed; its log may say why"))

    return app


_SCHEMA = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
_PARTS_OF_BODY = _SCHEMA.pop("$defs")
_BODY = {"requestBody": {"content": {"application/json": {"schema": _SCHEMA}}, "required": True}}
"""For the page that describes the API: the route itself reads the body within bounds."""
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Json(JSONResponse):
    """What is no Unicode in it, such as half of a surrogate pair that a request had, is a question mark."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


async def _received(request: Request, body: Body) -> ChatRequest:
    """What a request asks for. Raises `Refusal` or `Left`."""
    await body.arrive(request.receive)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        named = one_line(kind) or "no type"
        raise Refusal(400, f"the body has to be sent as Content-Type: application/json, not {named}")
    return await body.parsed()


async def _unless_left(request: Request, doing: Coroutine[Any, Any, T]) -> T:
    """What is being done. Raises `Left` where its client leaves before."""
    task = asyncio.ensure_future(doing)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Left
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """An answer as it comes. Its place is given back wherever its client leaves, before the first word too."""

    def __init__(self, events: AsyncGenerator[bytes], answering: Answering) -> None:
        super().__init__(events, media_type=EVENTS, headers=_UNBUFFERED)
        self._events, self._answering = events, answering

    async def __call__(self, *ends: Any) -> None:
        try:
            async with aclosing(self._events):
                await super().__call__(*ends)
        finally:
            self._answering.end()


async def _whole(service: Service, wants: Wants, first: Event, answering: Answering) -> Response:
    likelihoods: list[Likelihood] | None = [] if wants.likelihoods else None
    event = first
    while not isinstance(event, Answer):
        if likelihoods is not None and event.likelihood:
            likelihoods.append(event.likelihood)
        event = await answering.next()
    service.metrics.answered(event)
    answer, shapes = event, service.shapes()
    if likelihoods is None:
        return Json(shapes.whole(answer, None))
    return await service.shaping.run(lambda: Json(shapes.whole(answer, likelihoods)))


async def _stream(service: Service, wants: Wants, first: Event, answering: Answering) -> AsyncGenerator[bytes]:
    """Server-sent events; what goes wrong after the first one is an event too."""
    shapes = service.shapes()
    try:
        yield _event(shapes.chunk({"role": "assistant", "content": ""}))
        event = first
        while not isinstance(event, Answer):
            likelihoods = [event.likelihood] if event.likelihood else None
            yield _event(shapes.chunk({"content": event.text}, likelihoods=likelihoods))
            event = await answering.next()
        yield _event(shapes.chunk({}, event.finish_reason))
        if wants.usage:
            yield _event(shapes.last(event))
        yield b"data: [DONE]\n\n"
        service.metrics.answered(event)
    except LlavaError as error:
        refusal = Refusal.of(error)
        service.metrics.replied(refusal.status)
        yield _event(refusal.body())
    except (asyncio.CancelledError, GeneratorExit):
        service.metrics.left()
        raise


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
