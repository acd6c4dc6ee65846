"""The sandboxed job that decodes pictures.

A request is `REQUEST_HEADER` and the file's bytes. A reply is `_HEADER` and the pixels, RGB, 3 bytes each; for a
picture that cannot be decoded the reason as UTF-8, with the index of a hint in `decode.HINTS` in place of the width.
Anything else is not a reply.
"""

from __future__ import annotations

import hashlib
import os
import queue
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from llava_cli import limits
from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, LlavaError
from llava_cli.files import quoted
from llava_cli.images import decode, films, formats
from llava_cli.images.decode import Decoded
from llava_cli.images.films import FilmReader
from llava_cli.images.local_file import read_path, shown_name, too_large
from llava_cli.parts import WHOLE, Content, Part
from llava_cli.sandbox.process import Worker, WorkerDied, WorkerLate
from llava_cli.untrusted_text import one_line

T = TypeVar("T")
REQUEST_HEADER = struct.Struct("<?I")
"""Whether truncated pictures are allowed; the most pixels per side of the result, 0 for any number."""
_HEADER = struct.Struct("<?III?B?")
"""Whether it is a picture; its width, height and number of frames; whether its end was missing; the index of its format
in `_FORMATS`; whether it is plain (see `Decoded`)."""
_FORMATS = ("", "JPEG", "PNG")
"""The formats that callers distinguish."""
JOB, HEIF = "llava_cli.images.sandbox", "pillow_heif"


class Crash(LlavaError):
    """A picture has crashed its decoder's process."""


class Sandbox:
    """Decodes one picture at a time in a process, started when needed; HEIF's decoder has a second process."""

    def __init__(self, seconds: float | None = None, takes_films: bool = True) -> None:
        """`seconds` for one picture; None for `limits.DECODE_SECONDS`. Without `takes_films`, films are refused."""
        self._seconds = limits.DECODE_SECONDS if seconds is None else seconds
        self._films = FilmReader() if takes_films else None
        self._workers = [Worker(JOB, limits.SANDBOX_MEMORY), Worker(JOB, limits.SANDBOX_MEMORY, HEIF)]

    def inspect(self, source: str, file: bytes | Path) -> Content | LlavaError:
        """What a file, called `source`, contains, or the error with it: as `open`."""
        if self._films and films.is_film(file):
            length = self._tried(source, partial(self._films.length, file))
            return length if isinstance(length, LlavaError) else Content("film", 0, length)
        picture = self.open(source, file)
        return picture if isinstance(picture, LlavaError) else Content("picture", picture.frames)

    def open(
        self,
        source: str,
        file: bytes | Path,
        allow_truncated: bool = False,
        shrink: int | None = None,
        part: Part = WHOLE,
        dpi: int = 150,
    ) -> Picture | LlavaError:
        """A picture of a file, called `source`, or the error with it: `BadImage`, `InputMissing` or `Crash`.

        `file` is its bytes, or the resolved path of one on this disk. With `shrink` the picture is made no larger than
        that many pixels per side. Pages are drawn with `dpi` dots an inch.
        """
        if self._films and films.is_film(file):
            return self._tried(source, partial(self._frame, source, file, shrink, part))
        try:
            # A path is resolved: a link that is there now was put there since.
            data = file if isinstance(file, bytes) else read_path(str(file), follow=False)
        except LlavaError as error:
            return error
        if len(data) > limits.PICTURE_BYTES:
            return too_large(source)
        return self._tried(source, partial(self._picture, source, data, allow_truncated, shrink))

    def _picture(self, source: str, data: bytes, allow_truncated: bool, shrink: int | None) -> Picture:
        worker = self._workers[formats.is_heif(data)]
        request = REQUEST_HEADER.pack(allow_truncated, shrink or 0), data
        reply = worker.ask(request, _HEADER.size + 3 * limits.PICTURE_PIXELS, self._seconds)
        try:
            image, frames, truncated, picture_format, plain = _parse_reply(reply)
        except ValueError:
            worker.end()
            raise WorkerDied from None
        # Hashed here: a decoder that was taken over could claim the hash of another picture.
        digest = hashlib.sha256(data).hexdigest()
        return Picture(source, image, digest, frames, truncated, data, picture_format, plain)

    def _frame(self, source: str, file: bytes | Path, shrink: int | None, part: Part) -> Picture:
        assert self._films
        if part.page is not None:
            raise BadImage("", "a film has times, not pages", "{name}#t=1.5 is its frame at 1.5 s")
        image, digest = self._films.frame(file, part.time or 0.0, shrink)
        return Picture(source, image, digest, part=part)

    def _tried(self, source: str, work: Callable[[], T]) -> T | LlavaError:
        """What `work` returns, or what is wrong with the file that it is about."""
        try:
            return work()
        except BadImage as error:
            return BadImage(shown_name(source), error.reason, _complete_hint(error.hint, source))
        except LlavaError as error:
            return error
        except WorkerLate as error:
            return BadImage(shown_name(source), f"takes longer than {error} s to decode")
        except WorkerDied as error:
            return Crash(shown_name(source), str(error) or "crashes its decoder")

    def start(self) -> None:
        """Starts the process before it is needed. Raises `WorkerDied`."""
        self._workers[0].start()

    def layers(self) -> list[str]:
        """The layers of `confine` that its process has. Raises `Crash` if it cannot be started."""
        try:
            return self._workers[0].layers()
        except (WorkerDied, WorkerLate):
            raise Crash("sandbox", "its process does not start") from None

    @property
    def is_running(self) -> bool:
        return any(one.is_running for one in (*self._workers, self._films) if one)

    def end(self) -> None:
        """Kills its processes."""
        for one in (*self._workers, self._films):
            if one:
                one.end()


class SandboxPool:
    """A sandbox for each core, up to four, which threads share."""

    def __init__(self, seconds: float | None = None, takes_films: bool = True) -> None:
        self.all = [Sandbox(seconds, takes_films) for _ in range(max(1, min(4, os.cpu_count() or 1)))]
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


def _parse_reply(reply: bytearray) -> Decoded:
    """The content of a reply. Raises `BadImage` with the reason that it gives, `ValueError` if it is malformed."""
    from PIL import Image

    if len(reply) < _HEADER.size:
        raise ValueError("no header")
    is_picture, width, height, frames, truncated, format_index, plain = _HEADER.unpack_from(reply)
    body = memoryview(reply)[_HEADER.size :]
    if not is_picture:
        hint = decode.HINTS[width] if width < len(decode.HINTS) else ""
        raise BadImage("", one_line(bytes(body[:1000]).decode("utf-8", "replace")), hint)
    if not 0 < width * height <= limits.PICTURE_PIXELS or len(body) != 3 * width * height:
        raise ValueError("pixels of another number than the header says")
    if format_index >= len(_FORMATS):
        raise ValueError("a format of no name")
    image = Image.frombytes("RGB", (width, height), body)
    return Decoded(image, max(1, frames), truncated, _FORMATS[format_index], plain)


def _complete_hint(hint: str, source: str) -> str:
    """A hint with the picture's path filled in; for a picture at a URL also the command that downloads it."""
    if "{name}" not in hint:
        return hint
    if source.lower().startswith(("http://", "https://")):
        return f"curl -Lo FILE {quoted(source)}; {hint.replace('{name}', 'FILE')}"
    path = "FILE" if source == "-" else f"./{source}" if source.startswith("-") else source
    return hint.replace("{name}", quoted(path))


# Below: inside the sandbox.

_IMPORTS = (
    "encodings.utf_16",
    "PIL.ImageOps",
    "PIL.ImagePalette",
    *(f"PIL.{name}ImagePlugin" for name in ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Tiff", "WebP")),
)


def prepare(extra: str = "") -> None:
    """Imports everything that decoding may need: after this no file can be opened."""
    for name in _IMPORTS:
        import_module(name)
    if extra:
        with suppress(ImportError):  # the extra is not installed, which `decode` says
            import_module(extra)


def answer(request: bytes) -> tuple[bytes, ...]:
    """The parts of a reply."""
    allow_truncated, shrink = REQUEST_HEADER.unpack_from(request)
    try:
        decoded = decode.decode(request[REQUEST_HEADER.size :], "", allow_truncated)
        if shrink:  # here, because sending a large picture takes long
            decoded.image.thumbnail((shrink, shrink))
    except MemoryError:
        return refusal("takes too much memory to decode", "")
    except BadImage as error:
        return refusal(error.reason, error.hint)
    format_index = _FORMATS.index(decoded.format) if decoded.format in _FORMATS else 0
    frames = min(decoded.frames, 2**32 - 1)
    header = _HEADER.pack(True, *decoded.image.size, frames, decoded.truncated, format_index, decoded.plain)
    return header, decoded.image.tobytes()


def refusal(reason: str, hint: str) -> tuple[bytes, ...]:
    return _HEADER.pack(False, decode.HINTS.index(hint), 0, 0, False, 0, False), reason.encode()
