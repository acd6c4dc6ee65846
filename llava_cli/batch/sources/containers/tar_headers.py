"""Headers of a tar: POSIX's ustar and pax, GNU's and the old ones (POSIX.1-2017, "pax"; GNU tar's manual, "Standard").

`tarfile` keeps an object for each member, and reads what a header claims whatever its size: both are unbounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from llava_cli import limits
from llava_cli.batch.sources.containers.archive_file import Forward

BLOCK = 512
_ZEROS = bytes(BLOCK)
_FILES, _FOLDER = b"\x0007", b"5"
_EMPTY = b"123456"
"""Links, devices, folders and FIFOs have no bytes, whatever their size says."""
_LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL = b"L", b"K", b"x", b"g"
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,8}) ([^=\n]+)=")
_MOST = 1 << 60
"""More bytes than any archive has."""


class TarMember(NamedTuple):
    """A member of a tar, whose `size` bytes are at `offset`."""

    name: str
    offset: int
    size: int
    is_file: bool
    """Whether it is a regular file: no link, no device, and no file with holes, whose bytes stand elsewhere."""
    is_folder: bool


class BrokenTar(Exception):
    """What is at this offset is no header: the archive is damaged, or was cut off."""


def is_header(block: bytes) -> bool:
    """Whether a file that begins with these 512 bytes is a tar."""
    return len(block) == BLOCK and block != _ZEROS and _has_checksum(block)


def members(file: Forward) -> Iterator[TarMember]:
    """The members of a tar, in order. Raises `BrokenTar`, or an error of the file's.

    Between two members the file may be read on, or moved anywhere if it can be.
    """
    position, end, next_one = 0, 0, _Extended()
    while True:
        reached = file.move_to(position)
        block = file.read(BLOCK)
        if not block and reached < end:
            raise BrokenTar(reached)
        if block in (b"", _ZEROS):
            return
        stored = _number(block[124:136]) if len(block) == BLOCK and _has_checksum(block) else None
        if stored is None or stored > _MOST:
            raise BrokenTar(position)
        kind = block[156:157]
        position += BLOCK
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL):
            data = _header_data(file, stored, position)
            if kind == _LONG_NAME:
                next_one.name = _text(data)
            elif kind == _PAX:
                next_one.read_pax(data)
            position += _padded(stored)
            continue
        size = stored if next_one.size is None else next_one.size
        name = next_one.name or _short_name(block)
        is_folder = kind == _FOLDER or (kind in _FILES and name.endswith("/"))
        is_file = kind in _FILES and bool(name) and not is_folder and not next_one.is_sparse
        yield TarMember(name, position, size, is_file, is_folder)
        size = 0 if kind in _EMPTY else size
        end, position, next_one = position + size, position + _padded(size), _Extended()


class _Extended:
    """What headers before a member's own say of it."""

    def __init__(self) -> None:
        self.name = ""
        self.size: int | None = None
        self.is_sparse = False

    def read_pax(self, data: bytes) -> None:
        """Reads a pax header's records, each `LENGTH KEY=VALUE` and a line end."""
        place = 0
        while match := _PAX_RECORD.match(data, place):
            value = data[match.end() : place + int(match[1]) - 1]
            place += int(match[1])
            if match[2] == b"path":
                self.name = _text(value)
            elif match[2] == b"size" and re.fullmatch(rb"[0-9]{1,18}", value):
                self.size = int(value)
            elif match[2].startswith(b"GNU.sparse."):
                self.is_sparse = True


def _header_data(file: Forward, count: int, position: int) -> bytes:
    """The bytes behind a header that is about the next member."""
    if count > limits.MEMBER_HEADER_BYTES:
        raise BrokenTar(position)
    data = file.read(_padded(count))
    if len(data) < count:
        raise BrokenTar(position)
    return data[:count]


def _padded(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


def _has_checksum(block: bytes) -> bool:
    """Whether a header's sum is right; its bytes are signed in old archives."""
    expected = _number(block[148:156])
    rest = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(rest)
    return expected in (unsigned, unsigned - 256 * sum(byte > 127 for byte in rest))


def _number(field: bytes) -> int | None:
    """An octal number, or one of base 256 (GNU's, for large ones); None for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip()
    return int(text or b"0", 8) if re.fullmatch(rb"[0-7]*", text) else None


def _short_name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    is_posix = block[257:263] == b"ustar\0"  # GNU has other things in the place of the prefix
    prefix = block[345:500].partition(b"\0")[0] if is_posix else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    return name.partition(b"\0")[0][: limits.MEMBER_NAME_BYTES].decode("utf-8", "surrogateescape")
