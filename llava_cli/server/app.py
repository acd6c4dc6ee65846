"""The routes of the server and what becomes of their errors.

POST /v1/chat/completions answers, GET /v1/models names the model, /health and /metrics are for operators, and /llava is
for the user's own commands over the Unix socket.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from llava_cli import limits
from llava_cli._version import __version__
from llava_cli.errors import LlavaError
from llava_cli.server.api_error import ApiError
from llava_cli.server.bodies import ClientDisconnected, RequestBody
from llava_cli.server.chat_request import ChatRequest
from llava_cli.server.guard import is_own_socket
from llava_cli.server.metrics import CONTENT_TYPE
from llava_cli.server.responses import (
    AnswerStream,
    ResponseOptions,
    Utf8JSONResponse,
    complete_response,
    stream_events,
)
from llava_cli.server.service import Service
from llava_cli.untrusted_text import one_line

T = TypeVar("T")
_SCHEMA = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
_SCHEMA_PARTS = _SCHEMA.pop("$defs")
_REQUEST_BODY = {"requestBody": {"content": {"application/json": {"schema": _SCHEMA}}, "required": True}}
"""For /openapi.json: FastAPI does not see the body, because the route reads it itself, within limits."""


def make_app(service: Service, server_info: Callable[[], dict[str, Any]]) -> FastAPI:
    """The app without its guard; `server_info` is the response to GET /llava."""
    app = FastAPI(
        title="llava", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    _add_operator_routes(app, service)
    _add_model_routes(app, service)
    _add_chat_routes(app, service)
    _add_error_handlers(app, service)

    @app.get("/llava")
    async def info() -> dict[str, Any]:
        return server_info()

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        page = app.openapi()
        page.setdefault("components", {}).setdefault("schemas", {}).update(_SCHEMA_PARTS)
        return page

    return app


def _add_operator_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    async def health() -> dict[str, Any]:
        return {"status": "stopping" if service.is_stopping else "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_model_routes(app: FastAPI, service: Service) -> None:
    engine = service.generation.engine
    entry = {"id": engine.model, "object": "model", "created": 0, "owned_by": "llava", "context": engine.context}

    @app.get("/v1/models")
    @app.head("/v1/models", include_in_schema=False)
    @app.api_route("/models", methods=["GET", "HEAD"], include_in_schema=False)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    @app.head("/v1/models/{name:path}", include_in_schema=False)
    async def model(name: str) -> dict[str, Any]:
        _check_model(service, name)
        return entry


def _add_chat_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_REQUEST_BODY)
    @app.post("/chat/completions", include_in_schema=False)
    async def chat(request: Request) -> Response:
        is_own = is_own_socket(request.scope)
        with service.bodies.open(is_own) as body:
            chat = await _receive(request, body)
            chat.check()
            if chat.model not in (None, "", "default"):
                _check_model(service, chat.model)
            pending = await _while_connected(request, service.submit(chat, is_own))
        options = ResponseOptions.of(chat)
        del chat  # its images need not be in memory while it is answered
        try:
            first = await _while_connected(request, pending.next())
            if options.stream:
                return AnswerStream(stream_events(service, options, first, pending), pending)
            response = await _while_connected(request, complete_response(service, options, first, pending))
        except BaseException:
            pending.close()
            raise
        pending.close()
        return response

    @app.post("/llava/prompt")
    async def prompt(request: Request) -> Response:
        with service.bodies.open(is_own=True) as body:
            return Utf8JSONResponse(await service.prompt(await _receive(request, body)))


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        service.metrics.count_response(error.status)
        return Utf8JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(LlavaError)
    async def engine_error(request: Request, error: LlavaError) -> Response:
        return await api_error(request, ApiError.from_engine(error))

    @app.exception_handler(ClientDisconnected)
    async def disconnected(request: Request, error: ClientDisconnected) -> Response:
        service.metrics.count_disconnect()
        return Response(status_code=499)  # nginx's status for it; nobody reads it

    @app.exception_handler(UnicodeError)
    async def unicode_error(request: Request, error: UnicodeError) -> Response:
        reason = "there is text in it that is no Unicode (half of a surrogate pair)"
        return await api_error(request, ApiError(400, reason))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        reason, path = str(error.detail), one_line(request.url.path)
        if error.status_code == 404:
            reason = f"there is no {path} here: POST /v1/chat/completions answers, GET /v1/models names the model"
        elif error.status_code == 405:
            reason = f"{one_line(request.method)} {path}: {reason}"
        response = await api_error(request, ApiError(error.status_code, reason))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected_error(request: Request, error: Exception) -> Response:
        if os.environ.get("LLAVA_DEBUG"):
            raise error
        return await api_error(request, ApiError(500, "the server failed; its log may say why"))


def _check_model(service: Service, name: str | None) -> None:
    """Raises `ApiError` for any other model than the one that is served."""
    model = service.generation.engine.model
    if name != model:
        reason = f"{str(name)[: limits.NAME_CHARACTERS]}: this server has {model}"
        raise ApiError(404, reason, "model", "model_not_found")


async def _receive(request: Request, body: RequestBody) -> ChatRequest:
    """Raises `ApiError` or `ClientDisconnected`."""
    await body.receive(request.receive)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        sent = one_line(media_type) or "no type"
        raise ApiError(400, f"the body has to be sent as Content-Type: application/json, not {sent}")
    return await body.parse()


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is canceled if the client leaves. Raises `ClientDisconnected`."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        for future in (task, disconnect):
            future.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
