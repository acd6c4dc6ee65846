"""HTTP connections to clients that may send anything, send nothing, or never read the response."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Collection
from contextlib import suppress
from http import HTTPStatus
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_cli import limits
from llava_cli.engine.remote.local_socket import Peer
from llava_cli.server.api_error import ApiError
from llava_cli.untrusted_text import one_line

_SLICE = 16_384
"""Bytes that are parsed at a time; h11 checks the size of a head only between two calls."""
_FREE_CHUNKS = 100
"""Chunks of any size that a request may have."""


class Connection(H11Protocol):
    """One of at most `limits.CONNECTIONS` over TCP, or of any number from this user's own processes.

    Adds the timeouts that uvicorn does not have. The connection is closed if a request's head takes longer than
    `limits.HEAD_SECONDS`, from the beginning of the connection or, later, from the head's first byte; if a body that
    nobody reads is not complete by then; and, over TCP, if a response is not read within `limits.WRITE_SECONDS`.
    """

    conn: _Parser

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = _Parser(h11.SERVER, limits.HEAD_BYTES)
        self.is_own = self._is_rejected = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        client: socket.socket = transport.get_extra_info("socket")
        self.is_own = client.family == getattr(socket, "AF_UNIX", None)
        if self.is_own and _is_stranger(client):
            transport.set_protocol(asyncio.Protocol())
            transport.abort()
        elif not self.is_own and _count_tcp(self.connections) >= limits.CONNECTIONS:
            transport.set_protocol(_OverLimit(transport))
        else:
            transport.set_write_buffer_limits(0)  # `pause_writing` is called whenever something is left to write
            super().connection_made(transport)
            self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        if self._is_rejected:
            return
        previous = self.cycle
        if self._head_timer is None and (previous is None or previous.response_complete):
            self._start_head_timer()
        start = 0
        while start < len(data) and not self._is_rejected and not self.transport.is_closing():
            end = len(data) if self.conn.is_in_plain_body else start + _SLICE
            super().data_received(data[start:end])
            start = end
        if self.cycle is not previous:
            self._stop_head_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        has_more = self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]
        if has_more and not self._head_timer and self.cycle.response_complete and not self.transport.is_closing():
            self._start_head_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        if not self.is_own:  # the user may suspend a command for a while
            self._write_timer = self.loop.call_later(limits.WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Sends the error in OpenAI's form, unless a response has begun."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # nothing can be added to its response
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        self._is_rejected = True
        self._stop_head_timer()
        self.flow.resume_reading()
        _respond_and_close(self.transport, self.conn.error or ApiError(400, msg))

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(limits.HEAD_SECONDS, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class _Parser(h11.Connection):
    """Refuses requests that are expensive to parse; `error` is what was wrong with the last one."""

    error: ApiError | None = None
    _is_chunked = False
    _chunks = _body_bytes = 0

    @property
    def is_in_plain_body(self) -> bool:
        """Whether the next bytes belong to a body that is not chunked, and so need no parsing."""
        return self.their_state is h11.SEND_BODY and not self._is_chunked

    def next_event(self) -> Any:
        try:
            self._check_head()
            event = super().next_event()
            self._check_chunks(event)
        except h11.RemoteProtocolError as error:
            self.error = ApiError(error.error_status_hint, f"this is no HTTP request: {one_line(str(error))}")
            raise
        return event

    def _check_head(self) -> None:
        if self.their_state is h11.IDLE:
            head = self.trailing_data[0].partition(b"\r\n\r\n")[0]
            if head.count(b"\n") > limits.HEAD_FIELDS:
                raise h11.RemoteProtocolError(f"more than {limits.HEAD_FIELDS} headers", error_status_hint=431)

    def _check_chunks(self, event: Any) -> None:
        if isinstance(event, h11.Request):
            self._is_chunked = any(name == b"transfer-encoding" for name, _ in event.headers)
            self._chunks = self._body_bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._body_bytes += len(event.data)
            if self._chunks > _FREE_CHUNKS + self._body_bytes // limits.BODY_CHUNK_BYTES:
                raise h11.RemoteProtocolError(f"chunks of less than {limits.BODY_CHUNK_BYTES} bytes, and many of them")


class _OverLimit(asyncio.Protocol):
    """A connection too many: it gets an error and is closed, at once if there are very many of these."""

    _open: ClassVar[int] = 0

    def __init__(self, transport: asyncio.Transport) -> None:
        _OverLimit._open += 1
        reason = f"there are {limits.CONNECTIONS} connections already"
        _respond_and_close(transport, ApiError(503, reason, code="too_many_connections", retry_after=1))
        if _OverLimit._open > limits.CONNECTIONS:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        _OverLimit._open -= 1


def _count_tcp(connections: Collection[Any]) -> int:
    return sum(not connection.is_own for connection in connections)


def _is_stranger(client: socket.socket) -> bool:
    """Whether the client's process belongs to another user, or it is not known to whom."""
    try:
        return Peer.of(client).is_stranger
    except OSError:
        return True


def _respond_and_close(transport: asyncio.Transport, error: ApiError) -> None:
    """Sends an error, and closes the connection when its client does, or after `limits.LINGER_SECONDS`.

    Until then the transport's protocol receives what the client is still sending.
    """
    body = json.dumps(error.body()).encode()
    headers = {**error.headers(), "Content-Type": "application/json", "Content-Length": str(len(body))}
    head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    head += [f"{name}: {value}" for name, value in {**headers, "Connection": "close"}.items()]
    transport.write("\r\n".join([*head, "", ""]).encode() + body)
    with suppress(OSError):  # the client has left already
        transport.write_eof()
    asyncio.get_running_loop().call_later(limits.LINGER_SECONDS, transport.abort)
