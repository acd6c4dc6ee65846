"""Pictures of files, decoded in processes without rights: `job.py` is what they do."""

from __future__ import annotations

import hashlib
import math
import os
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llava_cli import limits
from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, InputMissing, LlavaError
from llava_cli.files import quoted
from llava_cli.images import films, formats
from llava_cli.images.decode import Decoded
from llava_cli.images.films import FilmReader
from llava_cli.images.job import (
    CONTENT,
    FORMATS,
    HINTS,
    IS_CONTENT,
    IS_PICTURE,
    IS_REFUSAL,
    KINDS,
    PICTURE,
    REFUSAL,
    REQUEST,
)
from llava_cli.images.local_file import read_path, shown_name, too_large
from llava_cli.images.remote_names import is_cloud_url
from llava_cli.images.resize import Resize, pack
from llava_cli.parts import WHOLE, Content, Part
from llava_cli.sandbox.process import Worker, WorkerDied, WorkerLate
from llava_cli.untrusted_text import one_line

T = TypeVar("T")
JOB = "llava_cli.images.job"


class Crash(LlavaError):
    """A picture has crashed its decoder's process."""


class _Decoder:
    """A process that decodes, and the file that it has open."""

    def __init__(self, package: str = "") -> None:
        """`package` is what opens its files; empty for Pillow."""
        memory = limits.DOCUMENT_MEMORY if package == formats.PDF else limits.SANDBOX_MEMORY
        # libde265 decodes no HEIC without a thread; all other decoders are told to use none, or do without.
        self.worker = Worker(JOB, memory, *[package] * bool(package), has_threads=package == formats.HEIF)
        self._open: tuple[int, str] | None = None
        """The number of the process that has a file open, and the file's hash."""

    def ask(self, asked: tuple[int | bytes, ...], data: bytes, digest: str, seconds: float) -> Decoded | Content:
        """What the process replies about a file, which is sent only if it is not open there; `asked` is for `REQUEST`.

        Raises `WorkerDied` or `WorkerLate`, `BadImage` with its reason, `ValueError` for a malformed reply.
        """
        is_open = self.worker.is_running and self._open == (self.worker.starts, digest)
        self._open = None
        most = PICTURE.size + 3 * limits.PICTURE_PIXELS
        request = REQUEST.pack(is_open, *asked), b"" if is_open else data
        found = _parse_reply(self.worker.ask(request, most, seconds))
        if (found.count if isinstance(found, Content) else found.frames) > 1:
            self._open = self.worker.starts, digest
        return found


class Sandbox:
    """Decodes one picture at a time in processes that are started when needed, one for each package that decodes."""

    def __init__(self, seconds: float | None = None, takes_films: bool = True) -> None:
        """`seconds` for one picture; None for `limits.DECODE_SECONDS`. Pages have at most `limits.PAGE_SECONDS`.

        Without `takes_films`, films are refused.
        """
        self._seconds = limits.DECODE_SECONDS if seconds is None else seconds
        self._films = FilmReader() if takes_films else None
        self._decoders = {name: _Decoder(name) for name in ("", formats.HEIF, formats.JPEG_XL, formats.PDF)}
        self._late_pages: tuple[str, int] = "", 0
        """The hash of the last file of which a page took too long, and how many of its pages did."""

    def inspect(self, source: str, file: bytes | Path) -> Content | LlavaError:
        """What a file, called `source`, contains, or the error with it: as `open`."""
        if self._films and films.is_film(file):
            length = self._tried(source, WHOLE, partial(self._films.length, file))
            return length if isinstance(length, LlavaError) else Content("film", 0, length)
        data = _read(source, file)
        if isinstance(data, LlavaError):
            return data
        found = self._ask(source, WHOLE, data, hashlib.sha256(data).hexdigest(), (True, False, 0, 0, pack(None)))
        return _malformed(source) if isinstance(found, Decoded) else found

    def open(
        self,
        source: str,
        file: bytes | Path,
        allow_truncated: bool = False,
        part: Part = WHOLE,
        dpi: int = 150,
        resize: Resize | None = None,
    ) -> Picture | LlavaError:
        """A picture of a file, called `source`, or the error with it: `BadImage`, `InputMissing` or `Crash`.

        `file` is its bytes, or the resolved path of one on this disk. Pages are drawn with `dpi` dots an inch. With
        `resize` the picture's pixels are what that makes of them.
        """
        if self._films and films.is_film(file):
            return self._tried(source, part, partial(self._frame, self._films, source, file, resize, part))
        data = _read(source, file)
        if isinstance(data, LlavaError):
            return data
        # Hashed here: a decoder that was taken over could claim the hash of another picture.
        digest = hashlib.sha256(data).hexdigest()
        asked = False, allow_truncated, part.page or 0, dpi, pack(resize)
        found = self._ask(source, part, data, digest, asked)
        if isinstance(found, LlavaError):
            return found
        if isinstance(found, Content):
            return _malformed(source)
        if part.time is not None:
            hint = _complete_hint("{name}#2 is its second page or frame", source)
            return BadImage(shown_name(source) + str(part), "only a film has times", hint)
        image, frames, truncated, picture_format, plain, size = found
        drawn_with = dpi if formats.is_pdf(data) else None
        kept = data if part == WHOLE and drawn_with is None else None
        facts = frames, truncated, kept, picture_format, plain, part
        return Picture(source, image, digest, *facts, dpi=drawn_with, original_size=size if resize else None)

    def _ask(
        self, source: str, part: Part, data: bytes, digest: str, asked: tuple[int | bytes, ...]
    ) -> Decoded | Content | LlavaError:
        """What the right process replies, or the error."""
        decoder, is_pdf = self._decoders[formats.package_for(data)], formats.is_pdf(data)
        is_page = part != WHOLE or is_pdf
        seconds = min(self._seconds, limits.PAGE_SECONDS if is_page else math.inf)
        # A server tries again with more time what takes longer than a moment.
        counts = is_page and seconds == limits.PAGE_SECONDS

        def ask() -> Decoded | Content:
            if self._late_pages == (digest, limits.LATE_PAGES):
                reason = f"not tried: {limits.LATE_PAGES} of its pages took too long, or too much memory"
                raise BadImage("", reason)
            try:
                return decoder.ask(asked, data, digest, seconds)
            except WorkerLate:
                self._count_late(digest, counts)
                raise
            except WorkerDied as error:
                if is_pdf and not str(error):  # PDFium ends its process where memory ends
                    self._count_late(digest, is_page)
                    memory = f"{limits.DOCUMENT_MEMORY >> 30} GB of memory"
                    raise BadImage("", f"takes more than {memory}, or crashes PDFium") from None
                raise
            except ValueError:
                decoder.worker.end()
                raise WorkerDied from None

        return self._tried(source, part, ask)

    def _frame(self, reader: FilmReader, source: str, file: bytes | Path, resize: Resize | None, part: Part) -> Picture:
        if part.page is not None:
            raise BadImage("", "a film has times, not pages", "{name}#t=1.5 is its frame at 1.5 s")
        image, size, digest = reader.frame(file, part.time or 0.0, resize)
        return Picture(source, image, digest, part=part, original_size=size if resize else None)

    def _tried(self, source: str, part: Part, work: Callable[[], T]) -> T | LlavaError:
        """What `work` returns, or what is wrong with the file that it is about."""
        name = shown_name(source) + str(part)
        try:
            return work()
        except BadImage as error:
            return BadImage(name, error.reason, _complete_hint(error.hint, source))
        except InputMissing as error:
            return InputMissing(error.thing or name, error.reason, error.hint)
        except LlavaError as error:
            return error
        except WorkerLate as error:
            return BadImage(name, f"takes longer than {error} s to decode")
        except WorkerDied as error:
            return Crash(name, str(error) or _CRASHES)

    def _count_late(self, digest: str, is_page: bool) -> None:
        last, count = self._late_pages
        if is_page:
            self._late_pages = digest, count + 1 if last == digest else 1

    def start(self) -> None:
        """Starts the process for most pictures before it is needed. Raises `WorkerDied`."""
        self._decoders[""].worker.start()

    def layers(self) -> list[str]:
        """The layers of `confine` that its process has. Raises `Crash` if it cannot be started."""
        try:
            return self._decoders[""].worker.layers()
        except (WorkerDied, WorkerLate):
            raise Crash("sandbox", "its process does not start") from None

    @property
    def is_running(self) -> bool:
        return bool(self.processes)

    @property
    def processes(self) -> list[int]:
        """The ids of those that run."""
        workers = [decoder.worker for decoder in self._decoders.values()]
        if self._films and self._films.worker:
            workers.append(self._films.worker)
        return [pid for worker in workers if (pid := worker.pid)]

    def end(self) -> None:
        """Kills its processes."""
        for decoder in self._decoders.values():
            decoder.worker.end()
        if self._films:
            self._films.end()


_CRASHES = "crashes its decoder"


def _malformed(source: str) -> Crash:
    """The error for a reply that is none to the request."""
    return Crash(shown_name(source), _CRASHES)


def _read(source: str, file: bytes | Path) -> bytes | LlavaError:
    """A file's bytes, within the limit."""
    try:
        # A path is resolved: a link that is there now was put there since.
        data = file if isinstance(file, bytes) else read_path(str(file), follow=False)
    except LlavaError as error:
        return error
    return too_large(source) if len(data) > limits.PICTURE_BYTES else data


class SandboxPool:
    """Sandboxes that threads share: one for each of `count` cores, by default all, up to 4; half as many, up to 8."""

    def __init__(self, seconds: float | None = None, takes_films: bool = True, count: int | None = None) -> None:
        count = count or os.cpu_count() or 1
        self.all = [Sandbox(seconds, takes_films) for _ in range(max(min(4, count), min(8, count // 2)))]
        self._free: queue.LifoQueue[Sandbox] = queue.LifoQueue()  # last in, first out: starts no more than are needed
        for sandbox in self.all:
            self._free.put(sandbox)

    def start_one(self) -> None:
        """Starts a process before it is needed. Raises `WorkerDied`."""
        self.all[-1].start()

    def inspect(self, source: str, file: bytes | Path) -> Content | LlavaError:
        """As `Sandbox.inspect`, in the first one that is free."""
        with self._one() as sandbox:
            return sandbox.inspect(source, file)

    def open(self, source: str, file: bytes | Path, *arguments: Any, **options: Any) -> Picture | LlavaError:
        """As `Sandbox.open`, in the first one that is free."""
        with self._one() as sandbox:
            return sandbox.open(source, file, *arguments, **options)

    @contextmanager
    def _one(self) -> Iterator[Sandbox]:
        sandbox = self._free.get()
        try:
            yield sandbox
        finally:
            self._free.put(sandbox)

    def close(self) -> None:
        """Kills the processes."""
        for sandbox in self.all:
            sandbox.end()


def _parse_reply(reply: bytearray) -> Decoded | Content:
    """The content of a reply. Raises `BadImage` with the reason that it gives, `ValueError` if it is malformed."""
    kind = reply[0] if reply else IS_REFUSAL
    header = {IS_REFUSAL: REFUSAL, IS_PICTURE: PICTURE, IS_CONTENT: CONTENT}.get(kind)
    if header is None or len(reply) < header.size:
        raise ValueError("no header")
    _, *values = header.unpack_from(reply)
    body = memoryview(reply)[header.size :]
    if kind == IS_PICTURE:
        return _parse_picture(body, *values)
    if kind == IS_CONTENT:
        kind_index, count, seconds = values
        if kind_index >= len(KINDS) or not count or not 0 <= seconds < math.inf or body:
            raise ValueError("no content that a file has")
        return Content(KINDS[kind_index], count, seconds)
    (hint_index,) = values
    hint = HINTS[hint_index] if hint_index < len(HINTS) else ""
    raise BadImage("", one_line(bytes(body[:1000]).decode("utf-8", "replace")), hint)


def _parse_picture(
    pixels: memoryview,
    width: int,
    height: int,
    original_width: int,
    original_height: int,
    frames: int,
    truncated: bool,
    format_index: int,
    plain: bool,
) -> Decoded:
    """Raises `ValueError` if it is malformed."""
    from PIL import Image

    if not 0 < width * height <= limits.PICTURE_PIXELS or len(pixels) != 3 * width * height:
        raise ValueError("pixels of another number than the header says")
    if not 0 < original_width * original_height <= limits.PICTURE_PIXELS:
        raise ValueError("no size that a picture has")
    if format_index >= len(FORMATS):
        raise ValueError("a format of no name")
    image = Image.frombytes("RGB", (width, height), pixels)
    size = original_width, original_height
    return Decoded(image, max(1, frames), truncated, FORMATS[format_index], plain, size)


def _complete_hint(hint: str, source: str) -> str:
    """A hint with the picture's path filled in; for a picture at a URL also the command that downloads it."""
    if "{name}" not in hint:
        return hint
    if source.lower().startswith(("http://", "https://")):
        return f"curl -Lo FILE {quoted(source)}; {hint.replace('{name}', 'FILE')}"
    path = "FILE" if source == "-" or is_cloud_url(source) else f"./{source}" if source.startswith("-") else source
    return hint.replace("{name}", quoted(path))
