"""The job that decodes pictures.

A request is one byte, whether truncated ones are allowed, 4 bytes, the most pixels a side of the result (0: any), and
the file's bytes. A reply is `_HEADER` and, if all went well, the pixels, RGB, 3 bytes each; else the index of a hint in
`decode.HINTS` in the place of the width, and the reason as UTF-8. Whatever else comes is no reply.
"""

from __future__ import annotations

import hashlib
import os
import queue
import struct
from contextlib import suppress
from importlib import import_module

from llava_cli import limits
from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, LlavaError
from llava_cli.files import quoted
from llava_cli.images import decode
from llava_cli.images.decode import Decoded
from llava_cli.sandbox.process import Worker, WorkerDied, WorkerLate
from llava_cli.untrusted_text import one_line, printable

_REQUEST = struct.Struct("<?I")
_HEADER = struct.Struct("<?III?B?")
"""Whether it is a picture; its width, height and number of frames; whether its end was missing; its format's place in
`_FORMATS`; whether it is plain, as `decode` has it."""
_FORMATS = ("", "JPEG", "PNG")
"""Those that somebody asks for."""
JOB, HEIF = "llava_cli.images.sandbox", "pillow_heif"


def too_large(name: str) -> BadImage:
    """What is said of a picture called `name` that is not even decoded."""
    return BadImage(name, f"larger than {limits.PICTURE_BYTES // 1_000_000} MB")


class Crash(LlavaError):
    """A picture took its process down."""


class Sandbox:
    """One process at a time that decodes pictures, begun when it is needed; another one for HEIF's decoder."""

    def __init__(self, seconds: float | None = None) -> None:
        """`seconds` for one picture; None for `limits.DECODE_SECONDS`."""
        self._seconds = limits.DECODE_SECONDS if seconds is None else seconds
        self._workers = [Worker(JOB, limits.SANDBOX_MEMORY), Worker(JOB, limits.SANDBOX_MEMORY, HEIF)]

    def open(
        self, source: str, data: bytes, allow_truncated: bool = False, shrink: int | None = None
    ) -> Picture | LlavaError:
        """The picture that `data` is, called `source`, or what is wrong with it: `BadImage` or `Crash`.

        With `shrink` it comes no larger than that many pixels a side.
        """
        name = printable(source) or "''"
        if len(data) > limits.PICTURE_BYTES:
            return too_large(name)
        worker = self._workers[decode.is_heif(data)]
        try:
            request = _REQUEST.pack(allow_truncated, shrink or 0), data
            reply = worker.ask(request, _HEADER.size + 3 * limits.PICTURE_PIXELS, self._seconds)
            found = _parsed(name, reply)
        except BadImage as error:
            return BadImage(name, error.reason, _typeable(error.hint, source))
        except WorkerLate as error:
            return BadImage(name, f"takes longer than {error} s to decode")
        except WorkerDied as error:
            return Crash(name, str(error) or "crashes its decoder")
        except ValueError:
            worker.end()
            return Crash(name, "crashes its decoder")
        # Hashed here: a decoder that was taken over could call this picture by another one's hash.
        digest = hashlib.sha256(data).hexdigest()
        return Picture(source, found.image, digest, found.frames, found.truncated, data, found.format, found.plain)

    def start(self) -> None:
        """Starts its process, to be ready when it is needed."""
        self._workers[0].start()

    def layers(self) -> list[str]:
        """Which layers of `confine` its process has. Raises `Crash` where none can be started."""
        try:
            return self._workers[0].layers()
        except (WorkerDied, WorkerLate):
            raise Crash("sandbox", "its process does not start") from None

    def end(self) -> None:
        """Ends its processes, whatever they are at."""
        for worker in self._workers:
            worker.end()


class Sandboxes:
    """One for each core, up to four, for any thread; `begin` starts one before it is needed."""

    def __init__(self, seconds: float | None = None) -> None:
        self.all = [Sandbox(seconds) for _ in range(max(1, min(4, os.cpu_count() or 1)))]
        self._free: queue.LifoQueue[Sandbox] = queue.LifoQueue()  # so that no more are started than are needed
        for one in self.all:
            self._free.put(one)

    def begin(self) -> None:
        self.all[-1].start()

    def open(
        self, source: str, data: bytes, allow_truncated: bool = False, shrink: int | None = None
    ) -> Picture | LlavaError:
        """As `Sandbox.open`, once one is free."""
        one = self._free.get()
        try:
            return one.open(source, data, allow_truncated, shrink)
        finally:
            self._free.put(one)

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        for one in self.all:
            one.end()


def _parsed(name: str, reply: bytearray) -> Decoded:
    """What a reply says. Raises `BadImage` for the reason that it gives, `ValueError` for what is no reply."""
    from PIL import Image

    if len(reply) < _HEADER.size:
        raise ValueError("no header")
    good, width, height, frames, truncated, kind, plain = _HEADER.unpack_from(reply)
    body = memoryview(reply)[_HEADER.size :]
    if not good:
        hint = decode.HINTS[width] if width < len(decode.HINTS) else ""
        raise BadImage(name, one_line(bytes(body[:1000]).decode("utf-8", "replace")), hint)
    if not 0 < width * height <= limits.PICTURE_PIXELS or len(body) != 3 * width * height:
        raise ValueError("pixels of another number than the header says")
    if kind >= len(_FORMATS):
        raise ValueError("a format of no name")
    image = Image.frombytes("RGB", (width, height), body)
    return Decoded(image, max(1, frames), truncated, _FORMATS[kind], plain)


def _typeable(hint: str, source: str) -> str:
    """A hint with the picture's path in it, or for one that is no file here with how it becomes one."""
    if "{name}" not in hint:
        return hint
    if source.lower().startswith(("http://", "https://")):
        return f"curl -Lo FILE {quoted(source)}; {hint.replace('{name}', 'FILE')}"
    path = "FILE" if source == "-" else f"./{source}" if source.startswith("-") else source
    return hint.replace("{name}", quoted(path))


# Inside the sandbox.


_IMPORTS = (
    "encodings.utf_16",
    "PIL.ImageOps",
    "PIL.ImagePalette",
    *(f"PIL.{name}ImagePlugin" for name in ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Tiff", "WebP")),
)


def prepare(extra: str = "") -> None:
    """Imports all that decoding may come to need: afterwards no file can be opened."""
    for name in _IMPORTS:
        import_module(name)
    if extra:
        with suppress(ImportError):  # the extra is not installed, which `decode` says
            import_module(extra)


def answer(request: bytes) -> tuple[bytes, ...]:
    """A reply's parts."""
    allow_truncated, shrink = _REQUEST.unpack_from(request)
    try:
        found = decode.decode(request[_REQUEST.size :], "", allow_truncated)
        if shrink:  # here, for a large picture takes long to send
            found.image.thumbnail((shrink, shrink))
    except MemoryError:
        return _refusal("takes too much memory to decode", "")
    except BadImage as error:
        return _refusal(error.reason, error.hint)
    kind = _FORMATS.index(found.format) if found.format in _FORMATS else 0
    frames = min(found.frames, 2**32 - 1)
    header = _HEADER.pack(True, *found.image.size, frames, found.truncated, kind, found.plain)
    return header, found.image.tobytes()


def _refusal(reason: str, hint: str) -> tuple[bytes, ...]:
    return _HEADER.pack(False, decode.HINTS.index(hint), 0, 0, False, 0, False), reason.encode()
