"""Where pictures come from: a path, a URL or stdin -> bytes -> a picture, decoded in the sandbox.

Files are read here, by the process that may: regular ones only, and no more of them than the limit.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from functools import cache
from typing import TYPE_CHECKING, Literal

from llava_cli import limits, regular_files
from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, InputMissing, LlavaError, printable
from llava_cli.regular_files import NotRegular, TooLarge
from llava_cli.sandbox.pictures import Sandboxes

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".heic", ".heif", ".tif", ".tiff", ".avif", ".svg")


def is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def looks_like_picture(text: str) -> bool:
    """Whether an argument was meant as a picture: it exists, is "-" or a URL, or ends like one."""
    return text == "-" or is_url(text) or os.path.lexists(text) or text.lower().endswith(SUFFIXES)


def open_picture(source: str, allow_truncated: bool = False, public: bool = False) -> Picture:
    """Opens a path, an http(s) URL that the user typed, or "-" for stdin; with `public` no URL of a private network.

    Raises `InputMissing` where there is nothing to read and `BadImage` where it is no picture for us.
    """
    found = _sandboxes().open(source, read(source, public), allow_truncated)
    if isinstance(found, LlavaError):
        raise found
    return found


def begin() -> None:
    """Starts the process that decodes pictures, to be ready when `open_picture` needs it. Raises `WorkerDied`."""
    _sandboxes().begin()


@cache
def _sandboxes() -> Sandboxes:
    """Those of this process, which end with it."""
    return Sandboxes()


def read(source: str, public: bool = False, follow: bool = True) -> bytes:
    """The bytes behind a source, as `open_picture` takes it; with `follow` false not of a path that is a link.

    Raises `InputMissing`, or `BadImage` for too many.
    """
    name = printable(source) or "''"
    if source == "-":
        return _read_stdin(name)
    if is_url(source):
        from llava_cli.fetch import fetch

        return fetch(source, public)
    return _read_file(source, name, follow)


def _read_stdin(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read(limits.PICTURE_BYTES + 1)
    except (AttributeError, OSError):  # there is no sys.stdin where it was closed
        raise InputMissing(name, "stdin cannot be read") from None


def _read_file(path: str, name: str, follow: bool) -> bytes:
    try:
        return regular_files.read(path, limits.PICTURE_BYTES, follow)
    except TooLarge:
        raise BadImage(name, f"larger than {limits.PICTURE_BYTES // 1_000_000} MB") from None
    except NotRegular:
        if os.path.isdir(path):
            raise InputMissing(name, "is a directory", f"llava ask {shlex.quote(name)}/PICTURE QUESTION") from None
        raise InputMissing(name, "not a regular file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputMissing(name, reason[:1].lower() + reason[1:], _neighbour(path)) from None


def _neighbour(path: str) -> str:
    """A hint with the name that was probably meant."""
    folder, file = os.path.split(path)
    try:
        close = difflib.get_close_matches(file, os.listdir(folder or "."), 1, 0.6)
    except (OSError, ValueError):
        return ""
    return f"did you mean {printable(os.path.join(folder, close[0]))}?" if close and close[0] != file else ""


def reduce(image: Image) -> Image:
    """The picture itself, or one small enough that padding it to a square stays within the limit."""
    if max(image.size) ** 2 <= limits.PICTURE_PIXELS:
        return image
    image = image.copy()
    side = int(limits.PICTURE_PIXELS**0.5)
    image.thumbnail((side, side))
    return image


def square(image: Image, how: Literal["pad", "crop"], fill: tuple[int, int, int]) -> Image:
    """A square of the longer side, padded with `fill` all around, or the middle square."""
    from PIL import Image

    # Whole pixels and rounding down, as LLaVA does; ImageOps.pad and .fit round and resample.
    image = reduce(image)
    width, height = image.size
    if how == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))
    side = max(width, height)
    padded = Image.new("RGB", (side, side), fill)
    padded.paste(image, ((side - width) // 2, (side - height) // 2))
    return padded
