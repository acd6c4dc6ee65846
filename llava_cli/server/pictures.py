"""The pictures of requests: fetched, decoded, and one client's slow ones not in the way of another's small ones."""

from __future__ import annotations

import asyncio
import base64
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from urllib.parse import unquote_to_bytes

from llava_cli import limits
from llava_cli.conversation import Picture
from llava_cli.engine.generate.live import Unwanted
from llava_cli.errors import LlavaError
from llava_cli.images.fetch import fetch
from llava_cli.images.reader import is_url
from llava_cli.images.sandbox import Sandboxes
from llava_cli.server.lane import Lane
from llava_cli.server.openai import Refusal

T = TypeVar("T")
_DATA_HEAD = 1000
"""Characters of a data: URI before its data, and of another URL as far as it is looked at."""
_SIGNATURES = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkq", "TU0A")
"""How base64 of JPEG, PNG, GIF, WebP and TIFF begins: some clients send it without `data:`."""
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_TEXTS = 4
"""Requests at a time that have no pictures."""
_PATIENT = 2
"""Requests at a time whose pictures take long: their pixels are up to 300 MB each."""


class _TakesLong(Exception):
    """A request's pictures are not all open in the time of those that are quick."""


class Opener:
    """Opens the pictures of one request: those that it brings, or that were `fetched` for it.

    A file of this machine's never. `own` requests may be as large as this user's files may be. Each picture is opened
    only while the request is `wanted`. Where it is to be `quick`, one that fails after so many seconds, or that would
    begin after twice as many, is one that takes long.
    """

    def __init__(
        self,
        sandboxes: Sandboxes,
        fetched: Mapping[str, bytes],
        own: bool,
        wanted: Callable[[], bool],
        quick: float = math.inf,
    ) -> None:
        self._sandboxes, self._fetched, self._wanted, self._quick = sandboxes, fetched, wanted, quick
        self._begin = time.monotonic()
        self._most = limits.PICTURE_BYTES if own else limits.REQUEST_PICTURE_BYTES
        self._pixels: float = math.inf if own else limits.REQUEST_PIXELS

    def __call__(self, url: str, name: str) -> Picture:
        """Raises `Refusal`, `Unwanted` or `_TakesLong`."""
        if not self._wanted():
            raise Unwanted
        begin = time.monotonic()
        if begin - self._begin > 2 * self._quick:
            raise _TakesLong
        found = self._sandboxes.open(name, self._data(url, name))
        if isinstance(found, LlavaError):
            if time.monotonic() - begin >= self._quick:
                raise _TakesLong
            raise Refusal(400, f"{name}: {found.reason}", "messages", "invalid_image")
        self._pixels -= found.image.width * found.image.height
        if self._pixels < 0:
            most = f"at most {limits.REQUEST_PIXELS // 1_000_000} megapixels in all pictures together"
            raise Refusal(400, most, "messages", "image_too_large")
        return found

    def _data(self, url: str, name: str) -> bytes:
        """What a URL holds, or what was behind it."""
        if is_url(url[:_DATA_HEAD]):
            if url in self._fetched:
                return self._fetched[url]
            raise Refusal(400, f"{name}: remote pictures are off; send a data: URI", "messages", "remote_url")
        if len(url) > 3 * self._most + _DATA_HEAD:  # as long as it is where each byte is percent-encoded
            raise self._too_large(name)
        try:
            data = data_of(url)
        except ValueError as error:
            raise Refusal(400, f"{name}: {error}", "messages", "invalid_image_url") from None
        if len(data) > self._most:
            raise self._too_large(name)
        return data

    def _too_large(self, name: str) -> Refusal:
        return Refusal(400, f"{name}: larger than {self._most // 1_000_000} MB", "messages", "image_too_large")


def data_of(url: str) -> bytes:
    """What a data: URI holds (RFC 2397), or base64 without one. Raises `ValueError`, in words, for what is neither."""
    comma = url.find(",", 0, _DATA_HEAD)
    if url[:5].lower() == "data:" and comma > 0:
        data = unquote_to_bytes(url[comma + 1 :])
        options = [option.strip().lower() for option in url[5:comma].split(";")[1:]]
        return _from_base64(data) if "base64" in options else data
    if url.startswith(_SIGNATURES):
        return _from_base64(url.encode())
    raise ValueError("not a data: URI")


def _from_base64(data: bytes) -> bytes:
    """Either alphabet of RFC 4648, with line breaks and without padding too. Raises `ValueError` in words."""
    plain = data.translate(_URL_SAFE, b" \t\r\n\f\v").rstrip(b"=")
    try:
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except ValueError:
        raise ValueError("not base64") from None


@dataclass(frozen=True)
class _Lanes:
    """For requests without pictures, with pictures, and with pictures that take long."""

    texts: Lane
    quick: Lane
    patient: Lane


class Pictures:
    """Where requests' pictures are opened; with `remote` they may be behind public URLs.

    Nobody knows before how long a picture takes. So each gets `limits.QUICK_DECODE_SECONDS` when its request's turn
    comes, with which most are done. What is not begins anew among those that take long, with processes of their own.
    """

    def __init__(self, remote: bool) -> None:
        self._remote = remote
        self._quick, self._patient = Sandboxes(limits.QUICK_DECODE_SECONDS), Sandboxes(limits.SERVED_DECODE_SECONDS)
        self._quick.begin()
        self._fetching = Lane(limits.FETCHES)
        # Our own commands have lanes of their own, where no one else is waiting.
        self._lanes = {own: _Lanes(Lane(_TEXTS), Lane(len(self._quick.all)), Lane(_PATIENT)) for own in (False, True)}

    async def opened(
        self,
        urls: Sequence[str],
        own: bool,
        wanted: Callable[[], bool],
        work: Callable[[Opener], T],
        unwanted: Callable[[T], None] | None = None,
    ) -> T:
        """What `work` in a thread makes of an opener for these pictures; `unwanted` gets it where nobody waits more.

        Raises `Refusal`, and what `work` raises.
        """
        lanes = self._lanes[own]
        if not urls:
            return await lanes.texts.run(lambda: work(Opener(self._quick, {}, own, wanted)), unwanted)
        fetched = await self._fetched(urls)
        quick = partial(Opener, self._quick, fetched, own, wanted, limits.QUICK_DECODE_SECONDS)
        patient = partial(Opener, self._patient, fetched, own, wanted)
        try:
            return await lanes.quick.run(lambda: work(quick()), unwanted)
        except _TakesLong:
            return await lanes.patient.run(lambda: work(patient()), unwanted)

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        self._quick.close()
        self._patient.close()

    async def _fetched(self, urls: Sequence[str]) -> dict[str, bytes]:
        """What is behind those that are remote. Raises `Refusal`."""
        if not self._remote:
            return {}
        try:
            return await asyncio.wait_for(self._fetch(urls), limits.BODY_SECONDS)
        except asyncio.TimeoutError:
            reason = f"pictures by URL take at most {limits.BODY_SECONDS:.0f} s together"
            raise Refusal(400, reason, "messages", "invalid_image") from None

    async def _fetch(self, urls: Sequence[str]) -> dict[str, bytes]:
        fetched: dict[str, bytes] = {}
        left = limits.BODY_BYTES
        for number, url in enumerate(urls, 1):
            if not is_url(url[:_DATA_HEAD]) or url in fetched:
                continue
            try:
                fetched[url] = await self._fetching.run(partial(fetch, url, public=True))
            except LlavaError as error:
                raise Refusal(400, f"picture {number}: {error.reason}", "messages", "invalid_image") from None
            left -= len(fetched[url])
            if left < 0:
                most = f"at most {limits.BODY_BYTES // 1_000_000} MB behind all URLs together"
                raise Refusal(400, most, "messages", "image_too_large")
        return fetched
