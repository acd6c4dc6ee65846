"""Request bodies: counted and scanned while they arrive, parsed in a thread, refused before they cost much.

Nothing here holds the GIL for long: meanwhile the event loop could serve nobody else.
"""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from llava_cli import limits
from llava_cli.bounded_json import Bounds, Scanner, TooMuch
from llava_cli.server.answer_form import FIELDS
from llava_cli.server.api_error import ApiError
from llava_cli.server.chat_request import ChatRequest, validation_error
from llava_cli.server.worker_lane import WorkerLane
from llava_cli.untrusted_text import one_line

N = TypeVar("N", int, float)
_BLOCK = 1 << 20
_PARSERS = 2
Receive = Callable[[], Awaitable[Any]]
"""ASGI's `receive`."""


class ClientDisconnected(Exception):
    """Nobody waits for the response any more."""


@dataclass
class ByteBudget:
    """The bytes that all requests over TCP hold at this moment."""

    used: int = 0

    def take(self, count: int, limit: int) -> None:
        """Raises `ApiError` if more than `limit` bytes would be in use."""
        if self.used + count > limit:
            raise ApiError(503, "too many large requests at once", code="busy", retry_after=1, close=True)
        self.used += count

    def give_back(self, count: int) -> None:
        self.used -= count


class RequestBodies:
    """What the bodies of all requests share. Those of the user's own commands are not counted."""

    def __init__(self) -> None:
        self.arriving, self.opening_pictures = ByteBudget(), ByteBudget()
        self._large_body = asyncio.Lock()
        self._lane = WorkerLane(_PARSERS)

    @contextmanager
    def open(self, is_own: bool) -> Iterator[RequestBody]:
        """A request's body, counted until the end of the block."""
        body = RequestBody(self, is_own)
        try:
            yield body
        finally:
            body.close()

    async def parse(self, data: bytearray) -> ChatRequest:
        """Raises `ApiError`."""
        async with self._large_body if len(data) > limits.LARGE_BODY_BYTES else nullcontext():
            return await self._lane.run(lambda: parse_chat_request(data))


class RequestBody:
    """The body of one request: `receive` it, then `parse` it."""

    def __init__(self, bodies: RequestBodies, is_own: bool) -> None:
        self._bodies, self._is_own = bodies, is_own
        self._arriving = self._opening_pictures = 0
        self._limit = limits.OWN_BODY_BYTES if is_own else limits.BODY_BYTES
        self._scanner = Scanner(Bounds(self._limit, limits.BODY_DEPTH, limits.BODY_ITEMS))
        self._data = bytearray()

    async def receive(self, receive: Receive) -> None:
        """Waits until all of it is there. Raises `ApiError` or `ClientDisconnected`."""
        try:
            await asyncio.wait_for(self._receive_all(receive), limits.BODY_SECONDS)
        except asyncio.TimeoutError:
            reason = f"a request takes at most {limits.BODY_SECONDS:.0f} s to arrive"
            raise ApiError(408, reason, close=True) from None

    async def parse(self) -> ChatRequest:
        """Raises `ApiError`."""
        data, self._data = self._data, bytearray()
        chat = await self._bodies.parse(data)
        self._move_to_opening_pictures()
        return chat

    def close(self) -> None:
        self._bodies.arriving.give_back(self._arriving)
        self._bodies.opening_pictures.give_back(self._opening_pictures)
        self._arriving = self._opening_pictures = 0

    async def _receive_all(self, receive: Receive) -> None:
        has_more = True
        while has_more:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientDisconnected
            has_more = message.get("more_body", False)
            self._add(message.get("body", b""))

    def _add(self, data: bytes) -> None:
        try:
            self._scanner.feed(data)
        except TooMuch as error:
            status = 413 if self._scanner.bytes > self._limit else 400
            raise ApiError(status, f"the body: {error}", close=True) from None
        if not self._is_own:
            is_small = self._scanner.bytes <= limits.LARGE_BODY_BYTES
            # The last quarter of the budget is for small bodies.
            limit = limits.BODIES_BYTES if is_small else limits.BODIES_BYTES * 3 // 4
            self._bodies.arriving.take(len(data), limit)
            self._arriving += len(data)
        self._data += data

    def _move_to_opening_pictures(self) -> None:
        size, self._arriving = self._arriving, 0
        self._bodies.arriving.give_back(size)
        self._bodies.opening_pictures.take(size, limits.WAITING_BYTES)
        self._opening_pictures = size


def parse_chat_request(data: bytearray) -> ChatRequest:
    """Raises `ApiError`."""
    try:
        value = json.loads(
            _decode_utf8(data),
            parse_int=_bounded_number(int),
            parse_float=_bounded_number(float),
            parse_constant=_reject_constant,
            object_pairs_hook=_members,
        )
    except UnicodeError:
        raise ApiError(400, "the body is no JSON in UTF-8") from None
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON") from None
    try:
        return ChatRequest.model_validate(_without_nulls(value))
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_context=False, include_input=False)) from None


def _decode_utf8(data: bytearray) -> str:
    """Decodes block by block, which lets other threads run. `json.loads` would accept UTF-16 and UTF-32, too, in which
    the scanner of bytes sees no brackets."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    starts = range(0, len(data), _BLOCK)
    return "".join([decoder.decode(data[start : start + _BLOCK], start + _BLOCK >= len(data)) for start in starts])


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's members. A duplicate is refused: parsers differ in which one counts."""
    if len(members := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = one_line(next(name for name in names if names.count(name) > 1))
        raise ApiError(400, f"the body has {duplicate!r} twice in one object")
    return members


def _without_nulls(value: Any) -> Any:
    """Without the members that are null, which many clients send for nothing; in a schema null says something."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: member if name in FIELDS else _without_nulls(member)
        for name, member in value.items()
        if member is not None
    }


def _bounded_number(convert: Callable[[str], N]) -> Callable[[str], N]:
    """Refuses long numbers, since converting one takes time quadratic in its length."""

    def read(text: str) -> N:
        if len(text) > limits.NUMBER_CHARACTERS:
            raise ValueError(f"a number of more than {limits.NUMBER_CHARACTERS} characters")
        return convert(text)

    return read


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
