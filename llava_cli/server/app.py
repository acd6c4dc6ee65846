"""The routes: a request becomes a conversation, waits its turn with the others, and is told as it is answered."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from llava_cli import __version__
from llava_cli.engine import Answer
from llava_cli.engine import Request as Asking
from llava_cli.engine.live import Asked, Live
from llava_cli.engine.many import Likelihood, Token
from llava_cli.errors import LlavaError
from llava_cli.sandbox import Sandboxes
from llava_cli.server.guard import TooLarge, is_own_socket
from llava_cli.server.metrics import CONTENT_TYPE, Metrics
from llava_cli.server.openai import ChatRequest, Opener, Refusal, Shapes, mistake
from llava_cli.settings import Settings

Event = Token | Answer
DECODING = 20.0
"""Seconds that a picture may keep others from being opened."""
OPENING = 4
"""Requests whose pictures are open at a time: up to half a GB each."""
EVENTS = "text/event-stream"


class Service:
    """What the routes share: the model, how it answers where a request does not say, and how many may wait."""

    def __init__(self, live: Live, settings: Settings, most: int, remote: bool) -> None:
        self.live, self.settings, self.most = live, settings, most
        self.sandboxes = Sandboxes(DECODING)
        self.sandboxes.begin()
        self._remote = remote
        self._opening = asyncio.Semaphore(OPENING)
        self.began = self.last = time.monotonic()
        self.busy = 0
        """Requests that were let in and are not done."""
        self.metrics = Metrics(lambda: self.busy, lambda: live.kept.size)
        self.draining = False

    def enter(self) -> None:
        """Lets one more request in. Raises `Refusal` where there are too many, or no more are taken."""
        if self.draining:
            raise Refusal(503, "the server is stopping", code="stopping", retry=5)
        if self.busy >= self.most:
            raise Refusal(429, f"{self.most} requests are waiting already", code="queue_full", retry=1)
        self.busy += 1

    def leave(self) -> None:
        self.busy -= 1
        self.last = time.monotonic()

    async def events(self, chat: ChatRequest, own: bool) -> AsyncGenerator[Event]:
        """An answer's tokens and at last the whole of it. Closed before that, it is not gone on with."""
        usual = Settings() if own else self.settings  # our own commands say all there is to say
        top = (chat.top_logprobs or 0) if chat.logprobs else None
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def put(event: Token | Answer | LlavaError) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever asked
                loop.call_soon_threadsafe(queue.put_nowait, event)

        def ask() -> Asked:
            conversation = chat.question(usual.system, self.opener(own))
            return self.live.ask(Asking(conversation, chat.sampling(usual)), put, chat.stream, top)

        pictures = chat.has_pictures()
        if pictures:
            await self._opening.acquire()
        asking = asyncio.ensure_future(run_in_threadpool(ask))
        if pictures:
            asking.add_done_callback(lambda _: self._opening.release())
        try:
            asked = await asyncio.shield(asking)
        except asyncio.CancelledError:  # its thread goes on, and asks
            asking.add_done_callback(self._leave)
            raise
        whole = False
        try:
            while not whole:
                event = await queue.get()
                whole = not isinstance(event, Token)
                if isinstance(event, LlavaError):
                    raise event
                yield event
        finally:
            if not whole:
                self.live.leave(asked)

    def _leave(self, asking: asyncio.Future[Asked]) -> None:
        if not asking.exception():
            self.live.leave(asking.result())

    def opener(self, own: bool) -> Opener:
        return Opener(self.sandboxes, self._remote, own)

    def shapes(self) -> Shapes:
        tokenizer = self.live.engine.prompter.tokenizer
        return Shapes(uuid4().hex, self.live.engine.model, lambda token: str(tokenizer.decode([token])))


def make_app(service: Service, said: Callable[[], dict[str, Any]]) -> FastAPI:
    """The app, without its guard; `said` is what it says of itself to our own commands."""
    app = FastAPI(title="llava", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    engine = service.live.engine

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "stopping" if service.draining else "ok"}

    @app.get("/llava")
    async def itself() -> dict[str, Any]:
        return said()

    @app.post("/llava/prompt")
    async def prompt(body: ChatRequest) -> dict[str, Any]:
        conversation = await run_in_threadpool(body.conversation, None, service.opener(own=True))
        count = await run_in_threadpool(service.live.count, conversation)
        return {"prompt": engine.prompt(conversation), "tokens": count}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != engine.model:
            raise Refusal(404, f"{name}: this server has {engine.model}", "model", "model_not_found")
        return _model()

    def _model() -> dict[str, Any]:
        return {"id": engine.model, "object": "model", "created": 0, "owned_by": "llava", "context": engine.context}

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        body.check()
        if body.model not in (None, "", "default", engine.model):
            raise Refusal(404, f"{body.model}: this server has {engine.model}", "model", "model_not_found")
        service.enter()
        events = service.events(body, is_own_socket(request.scope))
        try:
            first = await _unless_left(request, anext(events))
        except BaseException:
            await events.aclose()
            service.leave()
            raise
        if body.stream:
            return StreamingResponse(_stream(service, body, first, events), media_type=EVENTS, headers=_UNBUFFERED)
        try:
            return Json(await _unless_left(request, _whole(service, body, first, events)))
        finally:
            await events.aclose()
            service.leave()

    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal) -> Response:
        service.metrics.replied(error.status)
        return Json(error.body(), error.status, error.headers())

    @app.exception_handler(LlavaError)
    async def failed(request: Request, error: LlavaError) -> Response:
        return await refuse(request, Refusal.of(error))

    @app.exception_handler(TooLarge)
    async def large(request: Request, error: TooLarge) -> Response:
        return await refuse(request, Refusal(413, str(error)))

    @app.exception_handler(Left)
    async def left(request: Request, error: Left) -> Response:
        service.metrics.left()
        return Response(status_code=499)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return await refuse(request, mistake(error.errors()))

    @app.exception_handler(UnicodeError)
    async def no_text(request: Request, error: UnicodeError) -> Response:
        return await refuse(request, Refusal(400, "there is text in it that is no Unicode (half of a surrogate pair)"))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, TooLarge):  # FastAPI takes it for a body that cannot be parsed
            return await large(request, error.__cause__)
        return await refuse(request, Refusal(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        if os.environ.get("LLAVA_DEBUG"):
            raise error
        return await refuse(request, Refusal(500, "the server failed; its log may say why"))

    return app


_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Json(JSONResponse):
    """What is no Unicode in it, such as half of a surrogate pair that a request had, is a question mark."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


class Left(Exception):
    """The client has gone."""


async def _unless_left(request: Request, doing: Any) -> Any:
    """What is being done, unless its client leaves before."""
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


async def _whole(service: Service, body: ChatRequest, first: Event, events: AsyncGenerator[Event]) -> dict[str, Any]:
    likelihoods: list[Likelihood] | None = [] if body.logprobs else None
    event = first
    while not isinstance(event, Answer):
        if likelihoods is not None and event.likelihood:
            likelihoods.append(event.likelihood)
        event = await anext(events)
    service.metrics.answered(event)
    return service.shapes().whole(event, likelihoods)


async def _stream(
    service: Service, body: ChatRequest, first: Event, events: AsyncGenerator[Event]
) -> AsyncIterator[bytes]:
    """Server-sent events; what goes wrong after the first one is an event too."""
    shapes = service.shapes()
    try:
        async with aclosing(events):
            yield _event(shapes.chunk({"role": "assistant", "content": ""}))
            event = first
            while not isinstance(event, Answer):
                likelihoods = [event.likelihood] if event.likelihood else None
                yield _event(shapes.chunk({"content": event.text}, likelihoods=likelihoods))
                event = await anext(events)
            yield _event(shapes.chunk({}, event.finish_reason))
            if body.stream_options and body.stream_options.include_usage:
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
    finally:
        service.leave()


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
