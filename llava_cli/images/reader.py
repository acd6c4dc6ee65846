"""Opens pictures from a path, a URL or stdin: their bytes are read here, and decoded in the sandbox.

Only regular files are read, up to a limit of bytes.
"""

from __future__ import annotations

import io
import os
import re
import sys
from functools import cache
from typing import TYPE_CHECKING, Union

from llava_cli import limits
from llava_cli.conversation import Picture
from llava_cli.errors import InputMissing, LlavaError, UsageError, printable
from llava_cli.images import formats
from llava_cli.images.local_file import read_path
from llava_cli.images.remote_names import is_cloud_url
from llava_cli.images.sandbox import SandboxPool

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Source = Union[str, os.PathLike[str], bytes, "PillowImage", Picture]
"""A path, a URL, a file's bytes, Pillow's image, or a picture that is open."""
SUFFIXES = (*formats.SINGLE_SUFFIXES, *formats.SUFFIXES_OF_SEVERAL)
"""Suffixes of pictures: of those that we open, and of some others, whose error says what they are."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Modes of Pillow's images that PNG has."""


def is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def local_path(source: str) -> str:
    """The path in a `file:` URL, as file managers and browsers write it (RFC 8089); any other source unchanged.

    Raises `InputMissing` for a URL of another machine.
    """
    if source[:6].lower() != "file:/" or os.path.lexists(source):
        return source
    from urllib.parse import unquote

    match = re.fullmatch(r"(?://([^/?#]*))?([^?#]*)([?#].*)?", source[5:], re.DOTALL)
    assert match  # each part may be empty
    host, path, suffix = match[1] or "", unquote(match[2], errors="surrogateescape"), match[3]
    if host.lower() not in ("", "localhost", "127.0.0.1"):
        raise InputMissing(printable(source), f"a file of another machine ({printable(host)})")
    if suffix and os.path.lexists(path + suffix):  # "?" or "#" in a name, not escaped, as people type it
        path += suffix
    return path[1:] if re.match(r"/[A-Za-z]:/", path) and os.name == "nt" else path


def looks_like_picture(text: str) -> bool:
    """Whether an argument is meant as a picture: it exists, is "-" or a URL, or has a picture's suffix."""
    if text == "-" or is_url(text) or is_cloud_url(text) or text[:6].lower() == "file:/":
        return True
    return os.path.lexists(text) or text.lower().endswith(SUFFIXES)


def open_picture(source: str, allow_truncated: bool = False, public: bool = False) -> Picture:
    """Opens a path, the URL of a file or of an object in a bucket, or "-" for stdin.

    With `public` neither a URL of a private network nor one of a bucket, which takes this user's credentials.

    Raises `InputMissing` if it cannot be read, and `BadImage` if it is not a picture that we take.
    """
    source = local_path(source)
    picture = sandbox_pool().open(source, read(source, public), allow_truncated)
    if isinstance(picture, LlavaError):
        raise picture
    return picture


def picture_from(source: Source) -> Picture:
    """A picture from what a program has. Raises as `open_picture`."""
    if isinstance(source, Picture):
        return source
    if isinstance(source, (str, os.PathLike)):
        return open_picture(os.fspath(source))
    if not isinstance(source, bytes):
        source = _as_png(source)
    picture = sandbox_pool().open("picture", source, False)
    if isinstance(picture, LlavaError):
        raise picture
    return picture


def _as_png(image: PillowImage) -> bytes:
    """A file of Pillow's image, since the only way to a picture is a file's: RGB, on white. It is upright."""
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        reason = f"{type(image).__name__} is neither a path, nor a file's bytes, nor an image of Pillow"
        raise UsageError("picture", reason, "PIL.Image.fromarray(…) makes an image of an array")
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in _PNG_MODES:
        upright = upright.convert("RGB")
    file = io.BytesIO()
    upright.save(file, "PNG")
    return file.getvalue()


def start_sandbox() -> None:
    """Starts a process that decodes pictures before `open_picture` needs it. Raises `WorkerDied`."""
    sandbox_pool().start_one()


@cache
def sandbox_pool() -> SandboxPool:
    return SandboxPool()


def read(source: str, public: bool = False, follow: bool = True) -> bytes:
    """The bytes of a source of `open_picture`; with `follow` false not those of a symbolic link's target.

    Raises `InputMissing`, or `BadImage` if they are too many.
    """
    if source == "-":
        return _read_stdin()
    if is_url(source):
        from llava_cli.images.fetch import fetch

        return fetch(source, public)
    if is_cloud_url(source) and not public:
        from llava_cli.images.cloud import Cloud

        return Cloud(source).read(source)
    return read_path(source, follow)


def _read_stdin() -> bytes:
    try:
        return sys.stdin.buffer.read(limits.PICTURE_BYTES + 1)
    except (AttributeError, OSError):  # sys.stdin is None if it was closed
        raise InputMissing("-", "stdin cannot be read") from None
