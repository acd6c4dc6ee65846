"""Frames of films, from outside the process that decodes them (`film_frames.py`).

A film may have gigabytes, which do not go through a pipe: its process gets an open descriptor of it, and reads what it
needs. Each film has a process of its own, which keeps it open for the next frame.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from llava_cli import limits, regular_files
from llava_cli.errors import BadImage, InputMissing, os_reason
from llava_cli.images import formats
from llava_cli.images.film_frames import HINTS, REPLY, REQUEST
from llava_cli.images.local_file import open_path
from llava_cli.images.resize import Resize, pack
from llava_cli.sandbox.process import Worker, WorkerDied, WorkerLate
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
JOB = "llava_cli.images.film_frames"
_BLOCK_BYTES = 1 << 20
_MAKE_INDEX = "ffmpeg -i {name} -c copy INDEXED.mkv makes it quicker"
_FIRST_HOUR = "ffmpeg -i {name} -t 3600 -c copy FIRST-HOUR.mkv"


def is_film(file: bytes | Path) -> bool:
    """Whether a file can be read and begins like a film that we open."""
    if isinstance(file, bytes):
        return formats.is_film(file[: formats.MAGIC_BYTES])
    try:
        with regular_files.open_regular(file, follow=False) as stream:
            return formats.is_film(stream.read(formats.MAGIC_BYTES))
    except (OSError, ValueError):
        return False


class FilmReader:
    """Finds frames of one film at a time, for one thread at a time, in a process that is started when needed.

    Films are bytes, or resolved paths on this disk. Methods raise `InputMissing` or `BadImage`, in whose hint {name} is
    where the film's name is to be typed, and `WorkerDied` where a film ends its process.
    """

    def __init__(self) -> None:
        self._film: _Film | None = None

    def length(self, file: bytes | Path) -> float:
        """The time at which a film's last frame ends, in seconds."""
        return self._opened(file).length()

    def frame(self, file: bytes | Path, seconds: float, resize: Resize | None) -> tuple[Image, tuple[int, int], str]:
        """The frame that is shown at a time, resized; the size that it has in the film, whose SHA-256 is the last."""
        film = self._opened(file)
        return *film.frame(seconds, resize), film.sha256

    def _opened(self, file: bytes | Path) -> _Film:
        """The film, in the process that has it open, or in a new one."""
        if isinstance(file, bytes):
            identity: _Stamp | str = hashlib.sha256(file).hexdigest()
            film = self._with(identity) or _Film(identity, _in_memory(file))
        else:
            stream = open_path(str(file), follow=False)
            identity = _Stamp.of(stream)
            film = self._with(identity) or _Film(identity, stream)
        if film is not self._film:
            self.end()
            self._film = film
        return film

    def _with(self, identity: _Stamp | str) -> _Film | None:
        film = self._film
        return film if film and film.identity == identity else None

    @property
    def worker(self) -> Worker | None:
        """The process that has a film open."""
        film = self._film
        return film.worker if film else None

    def end(self) -> None:
        """Kills the process. The film is closed as soon as no thread uses it."""
        film, self._film = self._film, None
        if film:
            film.worker.end()


@dataclass(frozen=True)
class _Stamp:
    """A file on this disk, as it is now."""

    device: int
    inode: int
    size: int
    changed: int
    """Nanoseconds since 1970."""
    descriptor: int = field(compare=False)

    @classmethod
    def of(cls, stream: BinaryIO) -> _Stamp:
        """Raises `BadImage` for a file that is too large to be hashed."""
        status = os.fstat(stream.fileno())
        if status.st_size > limits.FILM_BYTES:
            raise BadImage("", f"larger than {limits.FILM_BYTES // 10**9} GB", _FIRST_HOUR)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, stream.fileno())


class _Film:
    """A film that is open, and the process that decodes it."""

    def __init__(self, identity: _Stamp | str, stream: BinaryIO) -> None:
        """`identity` of a film that was bytes is their hash."""
        self.identity = identity
        self.worker = Worker(JOB, limits.SANDBOX_MEMORY, file=stream)
        self._late = 0
        """How many of its frames took too long, one after the other."""

    @property
    def sha256(self) -> str:
        """Made here, since a decoder that was taken over could claim the hash of another film.

        Raises `InputMissing`.
        """
        try:
            return self.identity if isinstance(self.identity, str) else _digest(self.identity)
        except OSError as error:
            raise InputMissing("", os_reason(error)) from None

    def length(self) -> float:
        return self._asked(REQUEST.pack(math.nan, pack(None)), _parse_length)

    def frame(self, seconds: float, resize: Resize | None) -> tuple[Image, tuple[int, int]]:
        return self._asked(REQUEST.pack(seconds, pack(resize)), _parse_frame)

    def _asked(self, request: bytes, parse: Callable[[bytearray], T]) -> T:
        """What the reply to a request says. Raises `BadImage` with the reason that it gives."""
        if self._late == limits.LATE_PAGES:
            raise BadImage("", f"not tried: {limits.LATE_PAGES} of its frames took too long", _MAKE_INDEX)
        try:
            found = parse(self.worker.ask((request,), REPLY.size + 3 * limits.PICTURE_PIXELS, limits.PAGE_SECONDS))
        except WorkerLate as error:
            self._late += 1
            raise BadImage("", f"takes longer than {error} s to find a frame in", _MAKE_INDEX) from None
        except (ValueError, struct.error):  # it is none
            self.worker.end()
            raise WorkerDied from None
        self._late = 0
        return found


def _parse_length(reply: bytearray) -> float:
    *_, seconds, _ = _parse(reply)
    if not 0 <= seconds < math.inf:
        raise ValueError("no length")
    return min(seconds, limits.FILM_SECONDS)


def _parse_frame(reply: bytearray) -> tuple[Image, tuple[int, int]]:
    from PIL import Image

    size, original_size, _, pixels = _parse(reply)
    if len(pixels) != 3 * math.prod(size):
        raise ValueError("pixels of another number than the header says")
    if not all(0 < math.prod(one) <= limits.PICTURE_PIXELS for one in (size, original_size)):
        raise ValueError("no size that a frame has")
    return Image.frombytes("RGB", size, pixels), original_size


def _parse(reply: bytearray) -> tuple[tuple[int, int], tuple[int, int], float, memoryview]:
    """The sizes, the length and the pixels of a reply. Raises `BadImage` with the reason that it gives instead."""
    is_answer, width, height, original_width, original_height, seconds = REPLY.unpack_from(reply)
    body = memoryview(reply)[REPLY.size :]
    if not is_answer:
        hint = HINTS[width] if width < len(HINTS) else ""
        raise BadImage("", one_line(bytes(body[:1000]).decode("utf-8", "replace")), hint)
    return (width, height), (original_width, original_height), seconds, body


@lru_cache(maxsize=256)
def _digest(film: _Stamp) -> str:
    """The SHA-256 of a film. Its process may read at the same time: where each of them is does not matter.

    Raises `OSError`.
    """
    digest, offset = hashlib.sha256(), 0
    while block := os.pread(film.descriptor, _BLOCK_BYTES, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()


def _in_memory(data: bytes) -> BinaryIO:
    """A file of these bytes that has no name, and that nobody can change where the system has such files."""
    if not hasattr(os, "memfd_create"):
        from tempfile import TemporaryFile

        stream: BinaryIO = TemporaryFile()  # noqa: SIM115
        stream.write(data)
        stream.flush()
        return stream
    import fcntl

    stream = open(os.memfd_create("film", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")  # noqa: SIM115
    stream.write(data)
    stream.flush()
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(stream, fcntl.F_ADD_SEALS, seals)
    return stream
