"""Pictures in a ZIP archive (PKWARE's APPNOTE.TXT 6.3.10, whose section numbers are given).

Its central directory is read entry by entry: `zipfile` keeps an object for each member, 100 MB for 100,000 of them.
Nothing is unpacked to the disk, so names such as `../x` are only names.
"""

from __future__ import annotations

import bz2
import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from llava_cli import files, limits
from llava_cli.batch.sources.containers.archive_file import ArchiveFile, reading
from llava_cli.batch.sources.containers.container import Entry, OpenFile
from llava_cli.batch.sources.containers.member_index import MORE_THAN_ONCE, Member, MemberIndex
from llava_cli.batch.sources.folders import Selection
from llava_cli.errors import BadData, BadImage
from llava_cli.images.formats import MAGIC_BYTES
from llava_cli.images.local_file import shown_name, too_large
from llava_cli.untrusted_text import printable

_END = struct.Struct("<4s4H2LH")  # 4.3.16: the end of the central directory
_LOCATOR = struct.Struct("<4sLQL")  # 4.3.15: where ZIP64's is
_END64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
_ENTRY = struct.Struct("<4s6H3L5H2L")  # 4.3.12: an entry of the central directory
_LOCAL = struct.Struct("<4s5H3L2H")  # 4.3.7: the header before a member's bytes
_COMMENT_BYTES = 65_535
_UNKNOWN16, _UNKNOWN32 = 0xFFFF, 0xFFFFFFFF
_ZIP64, _UNICODE_PATH = 0x0001, 0x7075  # 4.5.3, 4.6.9
_ENCRYPTED, _UTF8 = 0x0001, 0x0800  # 4.4.4
_UNIX, _MACOS = 3, 19  # 4.4.2: where it was made
_STORED, _DEFLATED, _BZIP2 = 0, 8, 12  # 4.4.5
_METHODS = {1: "shrinking", 6: "imploding", 9: "Deflate64", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd"}
_HEAD_STORED = 4096
"""Compressed bytes from which a member's first ones are made."""


class ZipArchive:
    """Pictures in a ZIP archive, in the order of its directory."""

    readers = 4
    has_questions = has_paths = False

    def __init__(self, name: str, open_file: OpenFile, include: Sequence[str] = ()) -> None:
        """`name` is what messages call it. What `open_file` opens must be seekable."""
        self._name, self._typed = printable(name), files.quoted(name)
        self._file = ArchiveFile(self._name, open_file)
        self._selection = Selection(include)
        self._shift = 0
        """Bytes before the archive's own, such as those of a program that unpacks it."""
        self._index: MemberIndex | None = None

    def entries(self) -> Iterator[Entry]:
        return self._filled_index().entries()

    def read(self, name: str) -> bytes:
        member = self._filled_index().find(name)
        self._check(member)
        data = self._unpack(member, member.stored, member.size)
        if len(data) != member.size or zlib.crc32(data) != member.checksum:
            raise BadImage(shown_name(name), f"damaged in {self._name}", f"unzip -t {self._typed}")
        return data

    def note(self) -> str:
        parts = [self._selection.skipped.note()]
        if self._index and self._index.doubles:
            parts.append(f"{MORE_THAN_ONCE}: {self._index.doubles:,}")
        return "; ".join(filter(None, parts))

    def close(self) -> None:
        self._file.close()
        if self._index:
            self._index.close()

    def _filled_index(self) -> MemberIndex:
        if self._index is None:
            index = MemberIndex(self._name)
            index.fill(self._pictures())
            self._index = index
        return self._index

    def _pictures(self) -> Iterator[Member]:
        """The members that are taken. Raises `BadData` if the directory is damaged."""
        for member in self._members():
            is_file = member.name and not member.name.endswith("/")
            if is_file and self._selection.takes(member.name, lambda: self._head(member)):  # noqa: B023
                yield member

    def _members(self) -> Iterator[Member]:
        with reading(self._name):
            size = self._file.size()
            begin, directory_bytes = self._directory(size)
            file = self._file.file()
            file.seek(begin)
            directory = io.BufferedReader(_Part(file, begin, directory_bytes), 1 << 16)  # of its own: `file` moves
            while directory.peek(1):  # not counted: some programs write more than the 65,535 that they can count
                member = self._next(directory)
                if member.offset + member.stored > size:
                    raise self._damaged()
                yield member

    def _directory(self, size: int) -> tuple[int, int]:
        """Where the central directory begins, and how many bytes it has."""
        tail_bytes = min(size, _END.size + _COMMENT_BYTES)
        tail = self._file.read_at(size - tail_bytes, tail_bytes)
        place = tail.rfind(b"PK\5\6")
        if place < 0 or len(tail) - place < _END.size:
            hint = f"load it again, or repair it: zip -FF {self._typed} --out whole.zip"
            raise BadData(self._name, "its end is missing", hint)
        _, disk, _, _, _, directory_bytes, offset, _ = _END.unpack_from(tail, place)
        end = size - tail_bytes + place
        locator = self._file.read_at(max(end - _LOCATOR.size, 0), _LOCATOR.size)
        if len(locator) == _LOCATOR.size and locator.startswith(b"PK\6\7"):
            end64 = self._file.read_at(min(_LOCATOR.unpack(locator)[2], size), _END64.size)
            if len(end64) < _END64.size or not end64.startswith(b"PK\6\6"):  # something stands before the archive
                end64 = self._file.read_at(max(end - _LOCATOR.size - _END64.size, 0), _END64.size)
            if len(end64) < _END64.size or not end64.startswith(b"PK\6\6"):
                raise self._damaged()
            disk, *_, directory_bytes, offset = _END64.unpack(end64)[4:]
            end -= _LOCATOR.size + _END64.size
        if disk not in (0, _UNKNOWN16):
            raise BadData(self._name, "one part of several", f"zip -s 0 {self._typed} --out whole.zip joins them")
        begin = end - directory_bytes
        self._shift = begin - offset
        if begin < 0 or self._shift < 0:
            raise self._damaged()
        return begin, directory_bytes

    def _next(self, directory: BinaryIO) -> Member:
        """The next entry of the central directory."""
        header = directory.read(_ENTRY.size)
        if len(header) < _ENTRY.size or not header.startswith(b"PK\1\2"):
            raise self._damaged()
        fields = _ENTRY.unpack(header)
        made_by, flags, method, checksum, stored, size = fields[1], fields[3], fields[4], *fields[7:10]
        name_bytes, extra_bytes, comment_bytes, offset = *fields[10:13], fields[16]
        raw_name, extra = directory.read(name_bytes), directory.read(extra_bytes)
        directory.read(comment_bytes)
        blocks = _extra_blocks(extra)
        size, stored, offset = _with_zip64((size, stored, offset), blocks.get(_ZIP64, b""))
        name = _decoded(raw_name, flags, made_by >> 8, blocks.get(_UNICODE_PATH, b""))
        return Member(name, offset + self._shift, size, stored, method, checksum, bool(flags & _ENCRYPTED))

    def _head(self, member: Member) -> bytes:
        """A member's first bytes; none if they cannot be read."""
        if member.is_encrypted or member.method not in (_STORED, _DEFLATED, _BZIP2):
            return b""
        try:
            return self._unpack(member, min(member.stored, _HEAD_STORED), min(member.size, MAGIC_BYTES))
        except BadImage:
            return b""

    def _check(self, member: Member) -> None:
        """Raises `BadImage` for a picture that is not unpacked."""
        unpack = f"unzip {self._typed} -d FOLDER asks for its password; then: llava batch FOLDER …"
        if member.is_encrypted:
            raise BadImage(shown_name(member.name), f"encrypted in {self._name}", unpack)
        if member.method not in (_STORED, _DEFLATED, _BZIP2):
            method = _METHODS.get(member.method, f"method {member.method}")
            raise BadImage(shown_name(member.name), f"compressed by {method}, which is not read", f"7z x {self._typed}")
        if member.size > limits.PICTURE_BYTES or member.stored > limits.PICTURE_BYTES:
            raise too_large(member.name)

    def _unpack(self, member: Member, stored: int, most: int) -> bytes:
        """A member's first bytes, at most `most`, from its first `stored` bytes. Raises `BadImage` if damaged."""
        header = self._file.read_at(member.offset, _LOCAL.size)
        problem = BadImage(shown_name(member.name), f"damaged in {self._name}", f"unzip -t {self._typed}")
        if len(header) < _LOCAL.size or not header.startswith(b"PK\3\4"):
            raise problem
        *_, name_bytes, extra_bytes = _LOCAL.unpack(header)
        data = self._file.read_at(member.offset + _LOCAL.size + name_bytes + extra_bytes, stored)
        if member.method == _STORED:
            return data[: most + 1]
        decompressor: Any = zlib.decompressobj(-zlib.MAX_WBITS) if member.method == _DEFLATED else bz2.BZ2Decompressor()
        try:
            return bytes(decompressor.decompress(data, most + 1))  # one more shows that a size is a lie
        except (zlib.error, OSError, EOFError):
            raise problem from None

    def _damaged(self) -> BadData:
        return BadData(self._name, "its directory is damaged", f"zip -FF {self._typed} --out whole.zip repairs some")


class _Part(io.RawIOBase):
    """A part of a file that others move in."""

    def __init__(self, file: BinaryIO, begin: int, count: int) -> None:
        self._file, self._begin, self._end = file, begin, begin + count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin)
        data = self._file.read(min(len(buffer), self._end - self._begin))
        buffer[: len(data)] = data
        self._begin += len(data)
        return len(data)


def _extra_blocks(extra: bytes) -> dict[int, bytes]:
    """The blocks of an extra field by their numbers (4.5.1)."""
    blocks: dict[int, bytes] = {}
    place = 0
    while place + 4 <= len(extra):
        number, count = struct.unpack_from("<2H", extra, place)
        blocks.setdefault(number, extra[place + 4 : place + 4 + count])
        place += 4 + count
    return blocks


def _with_zip64(numbers: tuple[int, int, int], block: bytes) -> tuple[int, ...]:
    """Size, stored size and offset; those that do not fit 32 bits are in the block, in this order (4.5.3)."""
    values = iter(struct.unpack(f"<{len(block) // 8}Q", block[: len(block) // 8 * 8]))
    return tuple(next(values, number) if number == _UNKNOWN32 else number for number in numbers)


def _decoded(name: bytes, flags: int, system: int, unicode_path: bytes) -> str:
    """A member's name: in UTF-8 where something says so, else in DOS's code page (appendix D).

    macOS and many Unix programs write UTF-8 and do not say so.
    """
    version, checksum = struct.unpack_from("<BL", unicode_path) if len(unicode_path) >= 5 else (0, 0)
    if version == 1 and checksum == zlib.crc32(name):
        name, flags = unicode_path[5:], flags | _UTF8
    name = name.partition(b"\0")[0]
    if not flags & _UTF8:
        try:
            return name.decode("utf-8" if system in (_UNIX, _MACOS) else "ascii")
        except UnicodeDecodeError:
            return name.decode("cp437")
    return name.decode("utf-8", "surrogateescape")
