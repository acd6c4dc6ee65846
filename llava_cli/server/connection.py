"""Connections, with a stranger at the other end who may say anything, nothing, or never listen."""

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
from llava_cli.server.openai import Refusal
from llava_cli.untrusted_text import one_line

_SLICE = 16_384
"""Bytes that are parsed at a time: only between two of them h11 looks at how long a head has become."""
_FIRST_CHUNKS = 100


class Connection(H11Protocol):
    """One of at most `limits.CONNECTIONS` over TCP, or of any number from this user's own processes.

    It ends where a request's head takes longer than `limits.HEAD_SECONDS`, for which uvicorn waits for ever: counted
    from when the connection is there, and later from the head's first byte. So it does where a body that nobody reads
    has not arrived by then, and over TCP where an answer is not taken within `limits.WRITE_SECONDS`.
    """

    conn: _Parser

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = _Parser(h11.SERVER, limits.HEAD_BYTES)
        self.is_own = self._is_over = False
        self._late: asyncio.TimerHandle | None = None
        self._untaken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer: socket.socket = transport.get_extra_info("socket")
        self.is_own = peer.family == getattr(socket, "AF_UNIX", None)
        if self.is_own and _is_stranger(peer):
            transport.set_protocol(asyncio.Protocol())
            transport.abort()
        elif not self.is_own and _over_tcp(self.connections) >= limits.CONNECTIONS:
            transport.set_protocol(_TurnedAway(transport))
        else:
            transport.set_write_buffer_limits(0)  # so that `pause_writing` says that anything is left to be taken
            super().connection_made(transport)
            self._expect()

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        before = self.cycle
        if self._late is None and (before is None or before.response_complete):
            self._expect()
        start = 0
        while start < len(data) and not self._is_over and not self.transport.is_closing():
            end = len(data) if self.conn.takes_any_length else start + _SLICE
            super().data_received(data[start:end])
            start = end
        if self.cycle is not before:
            self._expect_no_more()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        half = self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]
        if half and self._late is None and self.cycle.response_complete and not self.transport.is_closing():
            self._expect()

    def pause_writing(self) -> None:
        super().pause_writing()
        if not self.is_own:  # whose commands may well be stopped for a while
            self._untaken = self.loop.call_later(limits.WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._expect_no_taking()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_no_more()
        self._expect_no_taking()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused in OpenAI's shape too, unless an answer to it has begun."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # nothing can be added to that
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        self._is_over = True
        self._expect_no_more()
        self.flow.resume_reading()
        _say_goodbye(self.transport, self.conn.refusal or Refusal(400, msg))

    def _expect(self) -> None:
        self._late = self.loop.call_later(limits.HEAD_SECONDS, self.transport.close)

    def _expect_no_more(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _expect_no_taking(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None


class _Parser(h11.Connection):
    """Refuses what takes long to parse; `refusal` says what was wrong."""

    refusal: Refusal | None = None
    _is_chunked = False
    _chunks = _body = 0

    @property
    def takes_any_length(self) -> bool:
        """Whether what comes next is of a body without marks, which is not parsed."""
        return self.their_state is h11.SEND_BODY and not self._is_chunked

    def next_event(self) -> Any:
        try:
            self._check_head()
            event = super().next_event()
            self._check_chunks(event)
        except h11.RemoteProtocolError as error:
            self.refusal = Refusal(error.error_status_hint, f"this is no HTTP request: {one_line(str(error))}")
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
            self._chunks = self._body = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._body += len(event.data)
            if self._chunks > _FIRST_CHUNKS + self._body // limits.BODY_CHUNK_BYTES:
                raise h11.RemoteProtocolError(f"chunks of less than {limits.BODY_CHUNK_BYTES} bytes, and many of them")


class _TurnedAway(asyncio.Protocol):
    """One connection too many: it is told so, and closed; where there are very many of those, at once."""

    _open: ClassVar[int] = 0

    def __init__(self, transport: asyncio.Transport) -> None:
        _TurnedAway._open += 1
        reason = f"there are {limits.CONNECTIONS} connections already"
        _say_goodbye(transport, Refusal(503, reason, code="too_many_connections", retry=1))
        if _TurnedAway._open > limits.CONNECTIONS:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        _TurnedAway._open -= 1


def _over_tcp(connections: Collection[Any]) -> int:
    return sum(not one.is_own for one in connections)


def _is_stranger(peer: socket.socket) -> bool:
    try:
        return Peer.of(peer).is_stranger
    except OSError:
        return True


def _say_goodbye(transport: asyncio.Transport, refusal: Refusal) -> None:
    """Answers, and closes the connection once its client has heard that, or soon after.

    Until then whoever is the transport's protocol gets what the client is still sending.
    """
    body = json.dumps(refusal.body()).encode()
    lines = {**refusal.headers(), "Content-Type": "application/json", "Content-Length": str(len(body))}
    head = [f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}"]
    head += [f"{name}: {value}" for name, value in {**lines, "Connection": "close"}.items()]
    transport.write("\r\n".join([*head, "", ""]).encode() + body)
    with suppress(OSError):  # it has left already
        transport.write_eof()
    asyncio.get_running_loop().call_later(limits.LINGER_SECONDS, transport.abort)
