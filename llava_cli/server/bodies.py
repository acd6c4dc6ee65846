"""Request bodies: counted and looked over while they arrive, parsed in a thread, refused before they cost anything.

Nothing here holds Python's lock for long, for meanwhile nobody else would be answered.
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
from llava_cli.server.lane import Lane
from llava_cli.server.openai import ChatRequest, Refusal, mistake
from llava_cli.untrusted_text import one_line

N = TypeVar("N", int, float)
_PIECE = 1 << 20
Receive = Callable[[], Awaitable[Any]]


class Left(Exception):
    """The client has gone."""


@dataclass
class Account:
    """Bytes that requests over TCP hold together."""

    held: int = 0

    def take(self, count: int, most: int) -> None:
        """Raises `Refusal` where it would be more than `most`."""
        if self.held + count > most:
            raise Refusal(503, "too many large requests at once", code="busy", retry=1, close=True)
        self.held += count

    def give_back(self, count: int) -> None:
        self.held -= count


class Bodies:
    """All requests' bodies. Those of the user's own commands are not counted with the others."""

    def __init__(self) -> None:
        self.arriving, self.waiting = Account(), Account()
        self._large = asyncio.Lock()
        self._lane = Lane(2)

    @contextmanager
    def one(self, own: bool) -> Iterator[Body]:
        """A request's body, which is counted until the end."""
        body = Body(self, own)
        try:
            yield body
        finally:
            body.end()

    async def parsed(self, data: bytearray) -> ChatRequest:
        """Raises `Refusal`."""
        async with self._large if len(data) > limits.LARGE_BODY_BYTES else nullcontext():
            return await self._lane.run(lambda: parse(data))


class Body:
    """One request's body."""

    def __init__(self, bodies: Bodies, own: bool) -> None:
        self._bodies, self._own = bodies, own
        self._arrived = self._waiting = 0
        self._most = limits.OWN_BODY_BYTES if own else limits.BODY_BYTES
        self._scanner = Scanner(Bounds(self._most, limits.BODY_DEPTH, limits.BODY_ITEMS))
        self._data = bytearray()

    async def arrive(self, receive: Receive) -> None:
        """Waits until it is there. Raises `Refusal`, or `Left` where its sender goes before."""
        try:
            await asyncio.wait_for(self._arrive(receive), limits.BODY_SECONDS)
        except asyncio.TimeoutError:
            reason = f"a request takes at most {limits.BODY_SECONDS:.0f} s to arrive"
            raise Refusal(408, reason, close=True) from None

    async def parsed(self) -> ChatRequest:
        """What it asks for. Raises `Refusal`."""
        data, self._data = self._data, bytearray()
        chat = await self._bodies.parsed(data)
        self._wait()
        return chat

    def end(self) -> None:
        """Its request is prepared, or over."""
        self._bodies.arriving.give_back(self._arrived)
        self._bodies.waiting.give_back(self._waiting)
        self._arrived = self._waiting = 0

    async def _arrive(self, receive: Receive) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise Left
            more = message.get("more_body", False)
            self._feed(message.get("body", b""))

    def _feed(self, piece: bytes) -> None:
        try:
            self._scanner.feed(piece)
        except TooMuch as error:
            status = 413 if self._scanner.bytes > self._most else 400
            raise Refusal(status, f"the body: {error}", close=True) from None
        self._count(len(piece))
        self._data += piece

    def _count(self, size: int) -> None:
        if not self._own:
            small = self._scanner.bytes <= limits.LARGE_BODY_BYTES
            self._bodies.arriving.take(size, limits.BODIES_BYTES if small else limits.BODIES_BYTES * 3 // 4)
            self._arrived += size

    def _wait(self) -> None:
        """Counts it from now on among those that wait for their pictures to be opened."""
        size = self._arrived
        self._bodies.arriving.give_back(size)
        self._arrived = 0
        self._bodies.waiting.take(size, limits.WAITING_BYTES)
        self._waiting = size


def parse(data: bytearray) -> ChatRequest:
    """A body as a request. Raises `Refusal`."""
    try:
        value = json.loads(
            _text(data),
            parse_int=_short(int),
            parse_float=_short(float),
            parse_constant=_no_number,
            object_pairs_hook=_members,
        )
    except UnicodeError:
        raise Refusal(400, "the body is no JSON in UTF-8") from None
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is no JSON") from None
    try:
        return ChatRequest.model_validate(value)
    except ValidationError as error:
        raise mistake(error.errors(include_url=False, include_context=False, include_input=False)) from None


def _text(data: bytearray) -> str:
    """As UTF-8, in pieces. The parser takes other encodings too, in which a scanner of bytes would see no marks."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    pieces = range(0, len(data), _PIECE)
    return "".join([decoder.decode(data[start : start + _PIECE], start + _PIECE >= len(data)) for start in pieces])


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's members: null is as if it were left out, and of one that is there twice nobody knows which counts."""
    if len(members := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        twice = one_line(next(name for name in names if names.count(name) > 1))
        raise Refusal(400, f"the body has {twice!r} twice in one object")
    return {name: value for name, value in members.items() if value is not None}


def _short(number: Callable[[str], N]) -> Callable[[str], N]:
    def read(text: str) -> N:
        if len(text) > limits.NUMBER_CHARACTERS:
            raise ValueError(f"a number of more than {limits.NUMBER_CHARACTERS} characters")
        return number(text)

    return read


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
