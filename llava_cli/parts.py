"""Which part of a file a picture is: a page, a frame or a moment of a film; and the region of it that is looked at.

A part is written behind the file's name: `doc.pdf#2`, `doc.pdf#page=2` (RFC 8118), `clip.mp4#t=12.5` (W3C's media
fragments). Pages and frames are counted from 1, times from 0 in seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from llava_cli import limits
from llava_cli.errors import UsageError, printable

_PAGES_EXAMPLE, _EVERY_EXAMPLE, _REGION_EXAMPLE = "--pages 1-3,5", "--every 5s", "--region 60%,0,100%,30%"
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?\s*(?:ms|min|[smh])\s*)+|[0-9]+(?:\.[0-9]*)?", re.IGNORECASE)
_REFERENCE = re.compile(r"(?P<path>.+)#(?:(?:page=)?(?P<page>[1-9][0-9]{0,8})|t=(?P<time>[0-9]{1,8}(?:\.[0-9]{1,6})?))")


class Part(NamedTuple):
    """One picture of a file that has several; the file's own or first one without a page and a time."""

    page: int | None = None
    """Of a document or an animation, from 1."""
    time: float | None = None
    """Of a film's frame, in seconds: the frame that is shown then."""

    def __str__(self) -> str:
        """As behind a file's name."""
        if self.page is not None:
            return f"#{self.page}"
        return "" if self.time is None else f"#t={self.time:.6f}".rstrip("0").rstrip(".")


WHOLE = Part()
"""A file's only or first picture."""


def split_reference(text: str) -> tuple[str, Part]:
    """`doc.pdf#2` -> its path and the part that it names; a text without one is all path."""
    match = _REFERENCE.fullmatch(text)
    if not match:
        return text, WHOLE
    page, time = match["page"], match["time"]
    return match["path"], Part(int(page) if page else None, float(time) if time else None)


def parse_pages(source: str, value: Any) -> str:
    """`1-3,5,8-` or `all`, without its spaces; `page_numbers` reads it. Raises `UsageError`, about `source`."""
    text = re.sub(r"\s", "", str(value)).lower() if isinstance(value, (str, int)) else ""
    text = "1-" if text == "all" else text
    spans = [re.fullmatch(r"([1-9][0-9]{0,8})(-([1-9][0-9]{0,8})?)?", span) for span in text.split(",")]
    if not all(spans) or any(span[3] and int(span[3]) < int(span[1]) for span in spans if span):
        raise UsageError(source, f"{printable(str(value))!r} is no list of pages", _PAGES_EXAMPLE)
    return text


def page_numbers(pages: str, count: int) -> Iterator[int]:
    """The pages, of `count`, that a text of `parse_pages` names, in its order; what is behind the end is left out."""
    for span in pages.split(","):
        first, dash, last = span.partition("-")
        end = int(last) if last else count if dash else int(first)
        yield from range(int(first), min(end, count) + 1)


def parse_every(source: str, value: Any) -> float:
    """`5s`, `500ms`, `1m30s` or `5` -> seconds. Raises `UsageError`, about `source`."""
    text = str(value).strip() if isinstance(value, (str, int, float)) else ""
    seconds = 0.0
    if _DURATION.fullmatch(text):
        parts = re.findall(r"([0-9.]+)\s*([a-z]*)", text.lower())
        seconds = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if not 0.001 <= seconds <= limits.FILM_SECONDS:
        raise UsageError(source, f"{printable(str(value))!r} is no time", _EVERY_EXAMPLE)
    return seconds


def parse_region(source: str, value: Any) -> str:
    """`left,top,right,bottom`, each in pixels or percent, without spaces; `region_box` reads it.

    Raises `UsageError`, about `source`.
    """
    text = re.sub(r"\s", "", value) if isinstance(value, str) else ""
    lengths = text.split(",")
    if len(lengths) != 4 or not all(re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?%?", length) for length in lengths):
        raise UsageError(source, f"{printable(str(value))!r} is no region: left,top,right,bottom", _REGION_EXAMPLE)
    for first, second in zip(lengths[:2], lengths[2:], strict=True):
        if first.endswith("%") == second.endswith("%") and float(first.strip("%")) >= float(second.strip("%")):
            raise UsageError(source, f"{text} is empty: {second} is not behind {first}", _REGION_EXAMPLE)
    if any(length.endswith("%") and float(length[:-1]) > 100 for length in lengths):
        raise UsageError(source, f"{text} reaches beyond 100%", _REGION_EXAMPLE)
    return text


def region_box(region: str, width: int, height: int) -> tuple[int, int, int, int] | None:
    """The pixels (left, top, right, bottom) of a region in a picture of this size; None if none of them is in it.

    What reaches beyond the picture is cut off; a fraction of a pixel counts as a whole one.
    """
    sizes = (width, height, width, height)
    ends = [
        float(length[:-1]) / 100 * size if length.endswith("%") else float(length)
        for length, size in zip(region.split(","), sizes, strict=True)
    ]
    left, top = math.floor(ends[0] + 1e-6), math.floor(ends[1] + 1e-6)
    right, bottom = min(math.ceil(ends[2] - 1e-6), width), min(math.ceil(ends[3] - 1e-6), height)
    return (left, top, right, bottom) if left < right and top < bottom else None


@dataclass(frozen=True)
class Content:
    """What a file contains, before any of its pictures is made."""

    kind: str
    """`picture`, `document` (PDF, TIFF), `animation` (GIF, WebP, …) or `film`."""
    count: int = 1
    """Of pages or frames; 0 for a film, whose frames are found by their time."""
    seconds: float = 0.0
    """How long an animation or a film takes; 0 if it does not say."""


class Chosen(NamedTuple):
    """The parts of a file that are looked at."""

    parts: list[Part]
    left_out: int = 0
    """How many pages or frames were not chosen only because there are too many."""


def choose(content: Content, pages: str | None, frames: int | None, every: float | None, most: int) -> Chosen:
    """The parts that the options --pages, --frames and --every choose, at most `most`.

    Without options: all pages of a document, the first frame of an animation, `limits.FILM_FRAMES` of a film. Pages are
    those of documents and animations, and frames those of animations and films, in the middle of equal spans of time.
    """
    if content.kind == "film":
        count = _moment_count(content.seconds, frames or limits.FILM_FRAMES, every)
        return _bounded((Part(time=time) for time in _moments(content.seconds, count, every)), count, most)
    if content.kind == "picture" or (content.kind == "animation" and not (pages or frames or every)):
        return Chosen([WHOLE])
    if content.kind == "animation" and not pages:
        numbers = _frame_numbers(content, frames, every)
    else:
        numbers = list(islice(page_numbers(pages or "1-", content.count), limits.PAGES + 1))
    return _bounded((Part(page=number) for number in numbers), len(numbers), most)


def _bounded(parts: Iterator[Part], count: int, most: int) -> Chosen:
    return Chosen(list(islice(parts, most)), max(count - most, 0))


def _moments(seconds: float, count: int, every: float | None) -> Iterator[float]:
    """The times of a film's frames: each `every` seconds from 0, or the middles of `count` equal spans."""
    for number in range(count):
        yield round(number * every if every else (number + 0.5) * seconds / count, 3)


def _moment_count(seconds: float, frames: int, every: float | None) -> int:
    if every:
        return max(1, math.ceil(seconds / every - 1e-9))
    return frames if seconds else 1


def _frame_numbers(content: Content, frames: int | None, every: float | None) -> list[int]:
    """The numbers of an animation's frames at the moments of `_moments`, as if all frames lasted equally long."""
    seconds = content.seconds or float(content.count)
    count = _moment_count(seconds, min(frames or content.count, content.count), every)
    moments = _moments(seconds, count, every)
    numbers = (min(content.count, int(time / seconds * content.count) + 1) for time in islice(moments, limits.PAGES))
    return list(dict.fromkeys(numbers))
