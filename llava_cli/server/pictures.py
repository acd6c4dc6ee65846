"""The images of requests: fetched and decoded so that one client's slow images do not delay another's quick ones."""

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
from llava_cli.errors import LlavaError
from llava_cli.images.fetch import fetch
from llava_cli.images.reader import is_url
from llava_cli.images.resize import Resize
from llava_cli.images.sandbox import SandboxPool
from llava_cli.server.api_error import ApiError
from llava_cli.server.generation import ClientGone
from llava_cli.server.worker_lane import WorkerLane

T = TypeVar("T")
_HEAD_CHARACTERS = 1000
"""How much of a URL is searched for the comma of a `data:` URL, or for its scheme."""
_SIGNATURES = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkq", "TU0A")
"""How JPEG, PNG, GIF, WebP and TIFF begin in base64: some clients send it without `data:`."""
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_TEXT_REQUESTS = 4
"""Requests without images that are prepared at a time."""
_SLOW_REQUESTS = 2
"""Requests with slow images that are prepared at a time: their pixels take up to 300 MB each."""


class _TooSlow(Exception):
    """A request's images are not all open within the time for quick ones."""


class PictureOpener:
    """Opens the images of one request: `data:` URLs, or URLs whose bytes were `fetched`; never a file of this machine.

    An image is opened only while the request `is_wanted`. With `time_limit`, an image that fails after that many
    seconds, or would begin after twice as many, counts as slow. The user's own requests may be as large as their files.
    """

    def __init__(
        self,
        decode: Callable[[str, bytes], Picture | LlavaError],
        fetched: Mapping[str, bytes],
        is_own: bool,
        is_wanted: Callable[[], bool],
        time_limit: float = math.inf,
    ) -> None:
        self._decode, self._fetched, self._is_wanted, self._time_limit = decode, fetched, is_wanted, time_limit
        self._begin = time.monotonic()
        self._max_bytes = limits.PICTURE_BYTES if is_own else limits.REQUEST_PICTURE_BYTES
        self._pixels_left: float = math.inf if is_own else limits.REQUEST_PIXELS

    def __call__(self, url: str, name: str) -> Picture:
        """Raises `ApiError`, `ClientGone` or `_TooSlow`."""
        if not self._is_wanted():
            raise ClientGone
        begin = time.monotonic()
        if begin - self._begin > 2 * self._time_limit:
            raise _TooSlow
        picture = self._decode(name, self._bytes(url, name))
        if isinstance(picture, LlavaError):
            if time.monotonic() - begin >= self._time_limit:
                raise _TooSlow
            raise ApiError(400, f"{name}: {picture.reason}", "messages", "invalid_image")
        # A decoder that was taken over could claim a small size.
        self._pixels_left -= max(picture.size[0] * picture.size[1], picture.image.width * picture.image.height)
        if self._pixels_left < 0:
            reason = f"at most {limits.REQUEST_PIXELS // 1_000_000} megapixels in all pictures together"
            raise ApiError(400, reason, "messages", "image_too_large")
        return picture

    def _bytes(self, url: str, name: str) -> bytes:
        if is_url(url[:_HEAD_CHARACTERS]):
            if url in self._fetched:
                return self._fetched[url]
            raise ApiError(400, f"{name}: remote pictures are off; send a data: URI", "messages", "remote_url")
        if len(url) > 3 * self._max_bytes + _HEAD_CHARACTERS:  # percent-encoding makes three characters of a byte
            raise self._too_large(name)
        try:
            data = decode_data_url(url)
        except ValueError as error:
            raise ApiError(400, f"{name}: {error}", "messages", "invalid_image_url") from None
        if len(data) > self._max_bytes:
            raise self._too_large(name)
        return data

    def _too_large(self, name: str) -> ApiError:
        reason = f"{name}: larger than {self._max_bytes // 1_000_000} MB"
        return ApiError(400, reason, "messages", "image_too_large")


def decode_data_url(url: str) -> bytes:
    """The bytes in a `data:` URL (RFC 2397), or in plain base64 of an image. Raises `ValueError` with a reason."""
    comma = url.find(",", 0, _HEAD_CHARACTERS)
    if url[:5].lower() == "data:" and comma > 0:
        data = unquote_to_bytes(url[comma + 1 :])
        options = [option.strip().lower() for option in url[5:comma].split(";")[1:]]
        return _decode_base64(data) if "base64" in options else data
    if url.startswith(_SIGNATURES):
        return _decode_base64(url.encode())
    raise ValueError("not a data: URI")


def _decode_base64(data: bytes) -> bytes:
    """Either alphabet of RFC 4648, also with line breaks and without padding. Raises `ValueError` with a reason."""
    digits = data.translate(_URL_SAFE, b" \t\r\n\f\v").rstrip(b"=")
    try:
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except ValueError:
        raise ValueError("not base64") from None


@dataclass(frozen=True)
class _Lanes:
    text: WorkerLane
    """For requests without images."""
    quick: WorkerLane
    slow: WorkerLane


class RequestPictures:
    """Opens the images of all requests, resized for the model; with `allow_urls` these may be public URLs.

    How long an image takes is not known before it is decoded. So each request first gets
    `limits.QUICK_DECODE_SECONDS`, which is enough for most. One that needs longer begins again in the slow lane, which
    has sandboxes of its own.
    """

    def __init__(self, allow_urls: bool, resize: Resize | None) -> None:
        self._allow_urls = allow_urls
        self._quick = SandboxPool(limits.QUICK_DECODE_SECONDS, takes_films=False)
        self._slow = SandboxPool(limits.SERVED_DECODE_SECONDS, takes_films=False)
        self._quick.start_one()
        self._decode_quickly, self._decode_slowly = (
            partial(pool.open, resize=resize) for pool in (self._quick, self._slow)
        )
        self._fetch_lane = WorkerLane(limits.FETCHES)
        quick = len(self._quick.all)
        # The user's own commands do not wait behind other clients.
        self._lanes = {
            is_own: _Lanes(WorkerLane(_TEXT_REQUESTS), WorkerLane(quick), WorkerLane(_SLOW_REQUESTS))
            for is_own in (False, True)
        }

    async def use(
        self,
        urls: Sequence[str],
        is_own: bool,
        is_wanted: Callable[[], bool],
        work: Callable[[PictureOpener], T],
        discard: Callable[[T], None] | None = None,
    ) -> T:
        """Calls `work` in a thread, with an opener for these URLs, and returns its result.

        If the caller is canceled meanwhile, `discard` gets the result. Raises `ApiError`, and what `work` raises.
        """
        lanes = self._lanes[is_own]
        if not urls:
            return await lanes.text.run(
                lambda: work(PictureOpener(self._decode_quickly, {}, is_own, is_wanted)), discard
            )
        fetched = await self._fetch_all(urls)
        quick = partial(PictureOpener, self._decode_quickly, fetched, is_own, is_wanted, limits.QUICK_DECODE_SECONDS)
        slow = partial(PictureOpener, self._decode_slowly, fetched, is_own, is_wanted)
        try:
            return await lanes.quick.run(lambda: work(quick()), discard)
        except _TooSlow:
            return await lanes.slow.run(lambda: work(slow()), discard)

    def close(self) -> None:
        """Ends the sandboxes, whatever they are doing."""
        self._quick.close()
        self._slow.close()

    async def _fetch_all(self, urls: Sequence[str]) -> dict[str, bytes]:
        """URL -> bytes, for those that are remote. Raises `ApiError`."""
        if not self._allow_urls:
            return {}
        try:
            return await asyncio.wait_for(self._fetch_each(urls), limits.BODY_SECONDS)
        except asyncio.TimeoutError:
            reason = f"pictures by URL take at most {limits.BODY_SECONDS:.0f} s together"
            raise ApiError(400, reason, "messages", "invalid_image") from None

    async def _fetch_each(self, urls: Sequence[str]) -> dict[str, bytes]:
        fetched: dict[str, bytes] = {}
        bytes_left = limits.BODY_BYTES
        for number, url in enumerate(urls, 1):
            if not is_url(url[:_HEAD_CHARACTERS]) or url in fetched:
                continue
            try:
                fetched[url] = await self._fetch_lane.run(partial(fetch, url, public=True))
            except LlavaError as error:
                raise ApiError(400, f"picture {number}: {error.reason}", "messages", "invalid_image") from None
            bytes_left -= len(fetched[url])
            if bytes_left < 0:
                reason = f"at most {limits.BODY_BYTES // 1_000_000} MB behind all URLs together"
                raise ApiError(400, reason, "messages", "image_too_large")
        return fetched
