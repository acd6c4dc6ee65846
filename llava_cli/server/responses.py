"""HTTP responses for an answer: one JSON object, or server-sent events as it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

from llava_cli.engine import Answer
from llava_cli.engine.generate.sequence import Likelihood
from llava_cli.errors import LlavaError
from llava_cli.server.api_error import ApiError
from llava_cli.server.chat_request import ChatRequest
from llava_cli.server.chat_response import details
from llava_cli.server.service import Event, PendingAnswer, Service

EVENT_STREAM = "text/event-stream"
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Utf8JSONResponse(JSONResponse):
    """JSON in UTF-8; lone surrogates, which a request may have, become question marks."""

    def render(self, content: Any) -> bytes:
        return _to_json(content)


@dataclass(frozen=True)
class ResponseOptions:
    """How a request wants to be answered."""

    stream: bool
    include_usage: bool
    logprobs: bool

    @classmethod
    def of(cls, chat: ChatRequest) -> ResponseOptions:
        include_usage = chat.stream_options is not None and chat.stream_options.include_usage
        return cls(chat.stream, include_usage, bool(chat.logprobs))


class AnswerStream(StreamingResponse):
    """An answer as it comes. Closes the `PendingAnswer` whenever the client leaves, even before the first event."""

    def __init__(self, events: AsyncGenerator[bytes], pending: PendingAnswer) -> None:
        super().__init__(events, media_type=EVENT_STREAM, headers=_UNBUFFERED)
        self._events, self._pending = events, pending

    async def __call__(self, *asgi: Any) -> None:
        try:
            async with aclosing(self._events):
                await super().__call__(*asgi)
        finally:
            self._pending.close()


async def complete_response(
    service: Service, options: ResponseOptions, first: Event, pending: PendingAnswer
) -> Response:
    """The whole answer, which begins with the event `first`. Raises a `LlavaError`."""
    likelihoods: list[Likelihood] | None = [] if options.logprobs else None
    event = first
    while not isinstance(event, Answer):
        if likelihoods is not None and event.likelihood:
            likelihoods.append(event.likelihood)
        event = await pending.next()
    service.metrics.count_answer(event)
    answer, response = event, service.response()
    if likelihoods is None:
        return Utf8JSONResponse(response.completion(answer, None))
    return await service.logprobs_lane.run(lambda: Utf8JSONResponse(response.completion(answer, likelihoods)))


async def stream_events(
    service: Service, options: ResponseOptions, first: Event, pending: PendingAnswer
) -> AsyncGenerator[bytes]:
    """The answer as server-sent events; an error after the first one is an event, too."""
    response = service.response()
    try:
        yield _event(response.chunk({"role": "assistant", "content": ""}))
        event = first
        while not isinstance(event, Answer):
            likelihoods = [event.likelihood] if event.likelihood else None
            yield _event(response.chunk({"content": event.text}, likelihoods=likelihoods))
            event = await pending.next()
        yield _event(response.chunk(details(event), event.finish_reason))
        if options.include_usage:
            yield _event(response.usage_chunk(event))
        yield b"data: [DONE]\n\n"
        service.metrics.count_answer(event)
    except LlavaError as error:
        api_error = ApiError.from_engine(error)
        service.metrics.count_response(api_error.status)
        yield _event(api_error.body())
    except (asyncio.CancelledError, GeneratorExit):
        service.metrics.count_disconnect()
        raise


def _event(value: Any) -> bytes:
    return b"data: " + _to_json(value) + b"\n\n"


def _to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
