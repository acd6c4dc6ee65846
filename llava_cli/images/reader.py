"""Where pictures come from: a path, a URL or stdin -> bytes -> a picture, decoded in the sandbox.

Files are read here, by the process that may: regular ones only, and no more of them than the limit.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from functools import cache
from typing import TYPE_CHECKING, Literal

from llava_cli import files, limits, regular_files
from llava_cli.conversation import Picture
from llava_cli.errors import InputMissing, LlavaError, printable
from llava_cli.images.sandbox import Sandboxes, too_large
from llava_cli.regular_files import NotRegular, TooLarge

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
    *(".heic", ".heif", ".hif"),
    *(".tif", ".tiff", ".avif", ".svg"),
)
"""Of pictures that are opened, and of some whose error says what they are."""
_SCHEME = r"([A-Za-z][A-Za-z0-9+.-]+)://"
_DOWNLOADERS = {
    "s3": "aws s3 cp {url} - | llava ask - QUESTION",
    "gs": "gcloud storage cat {url} | llava ask - QUESTION",
    "ftp": "curl -L {url} | llava ask - QUESTION",
    "ftps": "curl -L {url} | llava ask - QUESTION",
    "sftp": "curl {url} | llava ask - QUESTION",
    "hf": "hf download REPO FILE",
}
"""What to type for a URL that is none of ours."""


def is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def local_path(source: str) -> str:
    """The path that a `file:` URL is, as file managers and browsers write it (RFC 8089); any other source as it is.

    Raises `InputMissing` for one of another machine.
    """
    if source[:6].lower() != "file:/" or os.path.lexists(source):
        return source
    from urllib.parse import unquote

    found = re.fullmatch(r"(?://([^/?#]*))?([^?#]*)([?#].*)?", source[5:], re.DOTALL)
    assert found  # each part may be empty
    host, path = found[1] or "", unquote(found[2], errors="surrogateescape")
    if host.lower() not in ("", "localhost", "127.0.0.1"):
        raise InputMissing(printable(source), f"a file of another machine ({printable(host)})")
    if found[3] and os.path.lexists(path + found[3]):  # not escaped, as people type it
        path += found[3]
    return path[1:] if re.match(r"/[A-Za-z]:/", path) and os.name == "nt" else path


def looks_like_picture(text: str) -> bool:
    """Whether an argument was meant as a picture: it exists, is "-" or a URL, or ends like one."""
    if text == "-" or is_url(text) or text[:6].lower() == "file:/":
        return True
    return os.path.lexists(text) or text.lower().endswith(SUFFIXES)


def open_picture(source: str, allow_truncated: bool = False, public: bool = False) -> Picture:
    """Opens a path, an http(s) or file URL that the user typed, or "-"; with `public` no URL of a private network.

    Raises `InputMissing` where there is nothing to read and `BadImage` where it is no picture for us.
    """
    source = local_path(source)
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
        from llava_cli.images.fetch import fetch

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
        raise too_large(name) from None
    except NotRegular:
        if os.path.isdir(path):
            raise InputMissing(name, "is a directory", f"llava ask {files.quoted(path)}/PICTURE QUESTION") from None
        raise InputMissing(name, "not a regular file") from None
    except (OSError, ValueError) as error:
        _refuse_url(path)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputMissing(name, reason[:1].lower() + reason[1:], _neighbour(path)) from None


def _refuse_url(source: str) -> None:
    """Raises `InputMissing` for what is no file because it is a URL of another kind than those that are fetched."""
    if source[:5].lower() == "data:":
        raise InputMissing("data:…", "data: URLs are not taken", "base64 -d FILE | llava ask - QUESTION")
    if found := re.match(_SCHEME, source):
        scheme = found[1].lower()
        hint = _DOWNLOADERS.get(scheme, "").replace("{url}", files.quoted(source))
        raise InputMissing(printable(source), f"{scheme}:// URLs are not fetched", hint)


def _neighbour(path: str) -> str:
    """A hint with the name that was probably meant, as a shell takes it."""
    folder, file = os.path.split(path)
    try:
        close = difflib.get_close_matches(file, os.listdir(folder or "."), 1, 0.6)
    except (OSError, ValueError):
        return ""
    if not close or close[0] == file:
        return ""
    near = os.path.join(folder, close[0])
    return f"did you mean {files.quoted(f'./{near}' if near.startswith('-') else near)}?"


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
