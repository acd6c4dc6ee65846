"""The pages of a TIFF (revision 6.0, also BigTIFF): of its pictures those that are neither thumbnails nor masks."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice

from llava_cli import limits

_SUBFILE_TYPE, _SUB_DIRECTORIES, _DNG_VERSION = 254, 330, 50706
_REDUCED, _MASK = 1, 4
"""Bits of a picture's `NewSubfileType`."""
_SHORT = 3
"""The type of values of 16 bits."""


def page_indexes(data: bytes) -> list[int]:
    """The numbers, from 0, of the pictures that are pages; not more than `limits.PAGES` and one."""
    pages = (index for index, tags in enumerate(_directories(data)) if not _is_beside_a_page(tags))
    return list(islice(pages, limits.PAGES + 1))


def is_raw(data: bytes) -> bool:
    """Whether a file is a camera's RAW, whose first picture is a small one of the picture that it keeps elsewhere."""
    tags = next(_directories(data), {})
    return _DNG_VERSION in tags or (_is_beside_a_page(tags) and _SUB_DIRECTORIES in tags)


def _is_beside_a_page(tags: dict[int, int]) -> bool:
    return bool(tags.get(_SUBFILE_TYPE, 0) & (_REDUCED | _MASK))


def _directories(data: bytes) -> Iterator[dict[int, int]]:
    """The tags of each picture, in their chain, up to its end or to one that is cut off or came before."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    count, entry, offset = ("Q", "HHQ8s", "Q") if is_big else ("H", "HHI4s", "I")
    count, entry, offset = order + count, order + entry, order + offset
    seen: set[int] = set()
    try:
        (at,) = struct.unpack_from(offset, data, 8 if is_big else 4)
        while at and at not in seen:
            seen.add(at)
            (entries,) = struct.unpack_from(count, data, at)
            start = at + struct.calcsize(count)
            end = start + entries * struct.calcsize(entry)
            if end > len(data):
                return
            yield dict(_tags(data[start:end], entry, order))
            (at,) = struct.unpack_from(offset, data, end)
    except struct.error:
        return


def _tags(entries: bytes, entry: str, order: str) -> Iterator[tuple[int, int]]:
    """Each tag that counts here, and its first value, where that stands in its entry."""
    for tag, kind, _, value in struct.iter_unpack(entry, entries):
        if tag in (_SUBFILE_TYPE, _SUB_DIRECTORIES, _DNG_VERSION):
            yield tag, struct.unpack_from(order + ("H" if kind == _SHORT else "I"), value)[0]
