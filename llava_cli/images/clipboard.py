"""The picture on the clipboard: its bytes, or the files that were copied in a file manager.

On Linux, the programs that read it are run here: Pillow's way of running them waits for ever for a program that was
copied from and hangs. What they print is a stranger's, and decoded in the sandbox.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from llava_cli import limits
from llava_cli.errors import InputMissing, os_reason
from llava_cli.images import desktop_program
from llava_cli.images.reader import CLIPBOARD, Opened, as_png, local_path, open_chosen, open_file
from llava_cli.settings import PictureOptions
from llava_cli.untrusted_text import decoded


class _Tool(NamedTuple):
    """A program that prints what is on the clipboard."""

    display: str
    """The environment variable of the display that it asks."""
    program: str
    package: str
    types: tuple[str, ...]
    """The arguments with which it lists the types of what is there."""
    get: tuple[str, ...]
    """The arguments before a type, with which it prints that."""


_XCLIP = ("-selection", "clipboard", "-o", "-t")
_TOOLS = (
    _Tool("WAYLAND_DISPLAY", "wl-paste", "wl-clipboard", ("--list-types",), ("--no-newline", "--type")),
    _Tool("DISPLAY", "xclip", "xclip", (*_XCLIP, "TARGETS"), _XCLIP),
)
_FILES = "text/uri-list"
_PICTURES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/tiff", "image/bmp")
"""Types of pictures, the preferred ones first; any other `image/` comes after them."""
_TEXTS = ("text/plain;charset=utf-8", "UTF8_STRING", "text/plain", "STRING", "TEXT")
_NO_DISPLAY = re.compile("can't open display|failed to connect|cannot connect", re.IGNORECASE)


class NoPicture(InputMissing):
    """The clipboard can be read, and has no picture."""


def open_clipboard(options: PictureOptions, allow_truncated: bool = False) -> Opened:
    """The picture on the clipboard, or the pictures of the files that were copied.

    Raises `NoPicture` where there is none, `InputMissing` where nothing can be read, and what `open_chosen` raises.
    """
    found = _on_linux() if sys.platform not in ("darwin", "win32") else _by_pillow()
    if isinstance(found, bytes):
        return open_file(CLIPBOARD, found, options, allow_truncated)
    opened = [open_chosen(path, options, allow_truncated) for path in found]
    pictures = [picture for one in opened for picture in one.pictures]
    return Opened(pictures, tuple(note for one in opened for note in one.notes))


def clipboard_text() -> str:
    """The text on the clipboard; empty if there is none. Raises `InputMissing` where nothing can be read."""
    if sys.platform == "win32":
        return ""  # its terminals paste text themselves
    if sys.platform == "darwin":
        data = desktop_program.run(CLIPBOARD, ["pbpaste"], limits.CLIPBOARD_SECONDS).data
    else:
        tool = _tool()
        types = _types(tool)
        data = next((_get(tool, kind) for kind in _TEXTS if kind in types), b"")
    return decoded(data[: 4 * limits.TEXT_CHARACTERS])


def _on_linux() -> bytes | list[str]:
    """A picture's bytes, or paths of files."""
    tool = _tool()
    types = _types(tool)
    if _FILES in types and (paths := list(_paths(_get(tool, _FILES)))):
        return paths
    others = [kind for kind in types if kind.startswith("image/")]
    for kind in (*_PICTURES, *others):
        if kind in types and (data := _get(tool, kind)):
            return data
    if not types:
        raise NoPicture(CLIPBOARD, "is empty", "copy a picture first")
    is_text = any(kind in types for kind in _TEXTS)
    raise NoPicture(CLIPBOARD, "has text, no picture" if is_text else "has no picture", "copy a picture first")


def _tool() -> _Tool:
    """The program that reads the clipboard of this display. Raises `InputMissing` if there is none."""
    shown = [tool for tool in _TOOLS if os.environ.get(tool.display)]
    if not shown:
        raise desktop_program.no_display(CLIPBOARD)
    for tool in shown:
        if shutil.which(tool.program):
            return tool
    raise InputMissing(CLIPBOARD, f"{shown[0].program} is not installed", f"apt install {shown[0].package}")


def _types(tool: _Tool) -> list[str]:
    """The types of what is on the clipboard; none if it is empty. Raises `InputMissing` without a display."""
    listed = desktop_program.run(CLIPBOARD, [tool.program, *tool.types], limits.CLIPBOARD_SECONDS)
    if listed.code and _NO_DISPLAY.search(listed.message):
        raise desktop_program.no_display(CLIPBOARD, os.environ[tool.display])
    return [] if listed.code else decoded(listed.data).split("\n")


def _get(tool: _Tool, kind: str) -> bytes:
    """What is on the clipboard as this type; empty if it is no longer there."""
    got = desktop_program.run(CLIPBOARD, [tool.program, *tool.get, kind], limits.CLIPBOARD_SECONDS)
    return b"" if got.code else got.data


def _paths(uris: bytes) -> Iterator[str]:
    """The files of this machine in a list of URIs (RFC 2483). Others are not fetched: nobody has typed them."""
    lines = decoded(uris[:1_000_000]).splitlines()
    for line in [line.strip() for line in lines if line[:5].lower() == "file:"][: limits.CLIPBOARD_FILES]:
        with suppress(InputMissing):  # another machine's
            yield local_path(line)


def _by_pillow() -> bytes | list[str]:
    """The same on macOS and Windows."""
    from PIL import ImageGrab

    try:
        found = ImageGrab.grabclipboard()
    except (OSError, NotImplementedError) as error:
        raise InputMissing(CLIPBOARD, os_reason(error)) from None
    if found is None:
        raise NoPicture(CLIPBOARD, "has no picture", "copy a picture first")
    if isinstance(found, list):
        return [os.fspath(path) for path in found][: limits.CLIPBOARD_FILES]
    file = getattr(found, "fp", None)
    if found.format == "PNG" and isinstance(file, io.BytesIO):
        return file.getvalue()  # only its header was looked at
    return as_png(found)  # Windows' own bitmap
