"""Reads a picture's file from this disk: a regular file, up to a limit of bytes."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader

from llava_cli import files, limits, regular_files
from llava_cli.errors import BadImage, InputMissing, os_reason
from llava_cli.regular_files import NotRegular, TooLarge
from llava_cli.untrusted_text import printable

_SCHEME = r"([A-Za-z][A-Za-z0-9+.-]+)://"
_DOWNLOADERS = {
    "ftp": "curl -L {url} | llava ask - QUESTION",
    "ftps": "curl -L {url} | llava ask - QUESTION",
    "sftp": "curl {url} | llava ask - QUESTION",
}
"""Commands for URLs of other schemes."""


def shown_name(source: str) -> str:
    """What errors call the picture at a path, URL or "-"."""
    return printable(source) or "''"


def too_large(source: str) -> BadImage:
    """The error for a picture that has too many bytes to be decoded."""
    return BadImage(shown_name(source), f"larger than {limits.PICTURE_BYTES // 1_000_000} MB")


def read_path(path: str, follow: bool = True) -> bytes:
    """Raises `InputMissing`, or `BadImage` if it is too large; with `follow` false also for a symbolic link."""
    try:
        with _errors_of(path):
            return regular_files.read(path, limits.PICTURE_BYTES, follow)
    except TooLarge:
        raise too_large(path) from None


def open_path(path: str, follow: bool = True) -> BufferedReader:
    """Opens a file of any size. Raises as `read_path`."""
    with _errors_of(path):
        return regular_files.open_regular(path, follow)


@contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """Raises `InputMissing` for a file that cannot be opened; `TooLarge` is passed on."""
    try:
        yield
    except TooLarge:
        raise
    except NotRegular:
        if os.path.isdir(path):
            hint = f"llava ask {files.quoted(path)}/PICTURE QUESTION"
            raise InputMissing(shown_name(path), "is a directory", hint) from None
        raise InputMissing(shown_name(path), "not a regular file") from None
    except (OSError, ValueError) as error:
        _refuse_url(path)
        raise InputMissing(shown_name(path), os_reason(error), _close_match(path)) from None


def _refuse_url(source: str) -> None:
    """Raises `InputMissing` for a URL of a scheme that is not fetched."""
    if source[:5].lower() == "data:":
        raise InputMissing("data:…", "data: URLs are not taken", "base64 -d FILE | llava ask - QUESTION")
    if match := re.match(_SCHEME, source):
        scheme = match[1].lower()
        hint = _DOWNLOADERS.get(scheme, "").replace("{url}", files.quoted(source))
        raise InputMissing(printable(source), f"{scheme}:// URLs are not fetched", hint)


def _close_match(path: str) -> str:
    """A hint with the name that was probably meant, quoted for a shell; empty if there is none."""
    folder, file = os.path.split(path)
    try:
        close = difflib.get_close_matches(file, os.listdir(folder or "."), 1, 0.6)
    except (OSError, ValueError):
        return ""
    if not close or close[0] == file:
        return ""
    near = os.path.join(folder, close[0])
    return f"did you mean {files.quoted(f'./{near}' if near.startswith('-') else near)}?"
