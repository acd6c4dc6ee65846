"""Pictures in a tar: of any programs, or a WebDataset, whose `.json`, `.txt` and `.cls` say more of the picture."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from llava_cli import limits
from llava_cli.batch.sources.containers.archive_file import ArchiveFile, Forward, reading
from llava_cli.batch.sources.containers.compression import UNPACK_ERRORS
from llava_cli.batch.sources.containers.container import Entry, OpenFile
from llava_cli.batch.sources.containers.member_index import MORE_THAN_ONCE, Member, MemberIndex
from llava_cli.batch.sources.containers.tar_headers import BrokenTar, TarMember, members
from llava_cli.batch.sources.folders import Selection
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import BadImage
from llava_cli.images.formats import MAGIC_BYTES
from llava_cli.images.local_file import shown_name, too_large
from llava_cli.untrusted_text import printable

_SIDECARS = ("json", "txt", "cls")
_STREAMS = 2
"""How often an archive that can only be read forward is open at a time."""
_PENDING = 1000
"""Pictures of one sample that are in memory at most."""


class TarArchive:
    """Pictures in a tar, in its order. One that can only be read forward is read anew for what is behind."""

    has_questions = has_paths = False

    def __init__(self, name: str, open_file: OpenFile, is_forward: bool, include: Sequence[str] = ()) -> None:
        """`name` is what messages call it; `is_forward` says that its file cannot be moved back."""
        self._name, self._open, self._is_forward = printable(name), open_file, is_forward
        self.readers = 1 if is_forward else 4
        self._selection = Selection(include)
        self._irregular, self._unread = 0, 0
        self._problem = ""
        self._index: MemberIndex | None = None
        self._file = ArchiveFile(self._name, open_file)
        self._streams: list[Forward] = []
        self._lock = threading.Lock()

    def entries(self) -> Iterator[Entry]:
        return self._filled_index().entries()

    def read(self, name: str) -> bytes:
        member = self._filled_index().find(name)
        if member.size > limits.PICTURE_BYTES:
            raise too_large(name)
        data = self._read_forward(member) if self._is_forward else self._file.read_at(member.offset, member.size)
        if len(data) < member.size:
            raise BadImage(shown_name(name), f"cut off in {self._name}")
        return data

    def note(self) -> str:
        counts = {
            "links, devices and files with holes that are passed over": self._irregular,
            "files beside pictures that cannot be read": self._unread,
            MORE_THAN_ONCE: self._index.doubles if self._index else 0,
        }
        parts = [self._selection.skipped.note(), *(f"{what}: {count:,}" for what, count in counts.items() if count)]
        return "; ".join(filter(None, [*parts, self._problem]))

    def close(self) -> None:
        self._file.close()
        for stream in self._streams:
            stream.close()
        if self._index:
            self._index.close()

    def _filled_index(self) -> MemberIndex:
        with self._lock:
            if self._index is None:
                index = MemberIndex(self._name)
                index.fill(self._pictures())
                self._index = index
            return self._index

    def _read_forward(self, member: Member) -> bytes:
        with self._lock, reading(self._name):
            stream = self._stream_before(member.offset)
            try:
                return stream.read(member.size) if stream.move_to(member.offset) == member.offset else b""
            except UNPACK_ERRORS:
                self._streams.remove(stream)
                stream.close()
                raise BadImage(shown_name(member.name), f"damaged in {self._name}") from None

    def _stream_before(self, offset: int) -> Forward:
        """The stream that is nearest before an offset. There are two: one looks for pages ahead of the other."""
        before = [stream for stream in self._streams if stream.position <= offset]
        if before:
            return max(before, key=lambda stream: stream.position)
        if len(self._streams) == _STREAMS:
            last = min(self._streams, key=lambda stream: stream.position)
            self._streams.remove(last)
            last.close()
        self._streams.append(Forward(self._open(), can_return=False))
        return self._streams[-1]

    def _pictures(self) -> Iterator[Member]:
        """The members that are taken, each with what stands beside it; says in `note` where the archive is damaged."""
        with reading(self._name):
            file = Forward(self._open(), can_return=not self._is_forward)
        sample = _Sample("")
        try:
            for member in members(file):
                if not member.is_file:
                    self._irregular += not member.is_folder
                    continue
                key, suffix = _sample_key(member.name)
                if key != sample.key or len(sample.pictures) >= _PENDING:
                    yield from self._finished(sample)
                    sample = _Sample(key)
                if suffix.rpartition(".")[2].lower() in _SIDECARS and not self._selection.is_asked_for(member.name):
                    sample.add_sidecar(member, suffix, file)
                elif self._takes(member, file):
                    sample.pictures.append(member)
        except (BrokenTar, *UNPACK_ERRORS):
            self._problem = f"damaged, or cut off: what is behind byte {file.position:,} is left out"
        finally:
            file.close()
        yield from self._finished(sample)

    def _takes(self, member: TarMember, file: Forward) -> bool:
        return self._selection.takes(member.name, lambda: file.read(min(member.size, MAGIC_BYTES)))

    def _finished(self, sample: _Sample) -> Iterator[Member]:
        """A sample's pictures; without one, its other files are counted like those of a folder."""
        if not sample.pictures:
            for name in sample.sidecars:
                self._selection.takes(name, bytes)
            return
        row, unread = sample.row()
        self._unread += unread
        for name, offset, size, *_ in sample.pictures:
            yield Member(name, offset, size, size, row=row)


class _Sample:
    """Files of one key that stand beside each other: a picture, and what others say of it."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.pictures: list[TarMember] = []
        self.sidecars: dict[str, tuple[str, bytes | None]] = {}
        """By their names: what is behind the first dot, and the bytes; None for too many."""
        self._bytes = 0

    def add_sidecar(self, member: TarMember, suffix: str, file: Forward) -> None:
        self._bytes += member.size + len(member.name)
        data = file.read(member.size) if self._bytes <= limits.CONTEXT_BYTES else None
        if len(self.sidecars) < limits.COUNTED_NAMES:
            self.sidecars[member.name] = suffix, data

    def row(self) -> tuple[dict[str, Any] | None, int]:
        """What the sidecars say, and how many of them cannot be read."""
        row: dict[str, Any] = {}
        unread = 0
        for suffix, data in self.sidecars.values():
            try:
                row |= _sidecar_values(suffix, data)
            except ValueError:
                unread += 1
        if len(json.dumps(row)) > limits.CONTEXT_BYTES:
            return None, len(self.sidecars)
        return row or None, unread


def _sidecar_values(suffix: str, data: bytes | None) -> dict[str, Any]:
    """Raises `ValueError`."""
    if data is None:
        raise ValueError
    if suffix.lower() == "json":
        value = loads(data, Bounds(limits.CONTEXT_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS))
        return value if isinstance(value, dict) else {suffix: value}
    text = data.decode().strip()
    return {suffix: int(text) if suffix.lower() == "cls" and text.isascii() and text.isdigit() else text}


def _sample_key(name: str) -> tuple[str, str]:
    """What comes before the first dot of a file's name, with its folder, and what comes after it, as in WebDataset."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix
