"""A picture of the screen: from Pillow, or on Wayland from the program that its compositor allows to take one."""

from __future__ import annotations

import os
import shutil
import sys
from typing import NamedTuple

from llava_cli import limits, regular_files
from llava_cli.errors import InputMissing, os_reason
from llava_cli.images import desktop_program
from llava_cli.images.reader import SCREEN, Opened, as_png, open_file
from llava_cli.paths import scratch_folder
from llava_cli.settings import PictureOptions


class _Program(NamedTuple):
    """A program that writes a picture of the screen to the file that follows its arguments."""

    desktop: str
    """In $XDG_CURRENT_DESKTOP where it works; empty: on those that are made of wlroots."""
    command: tuple[str, ...]
    package: str


_PROGRAMS = (
    _Program("GNOME", ("gnome-screenshot", "-f"), "gnome-screenshot"),
    _Program("KDE", ("spectacle", "-n", "-b", "-o"), "kde-spectacle"),
    _Program("", ("grim",), "grim"),
)


def open_screen(options: PictureOptions, allow_truncated: bool = False) -> Opened:
    """A picture of all screens. Raises `InputMissing` where none can be taken."""
    is_wayland = sys.platform not in ("darwin", "win32") and bool(os.environ.get("WAYLAND_DISPLAY"))
    data = _on_wayland() if is_wayland else _by_pillow()
    return open_file(SCREEN, data, options, allow_truncated)


def _by_pillow() -> bytes:
    """On macOS, Windows and X11."""
    from PIL import ImageGrab

    has_own = sys.platform in ("darwin", "win32")
    display = None if has_own else os.environ.get("DISPLAY")
    if not has_own and not display:
        raise desktop_program.no_display(SCREEN)
    try:
        return as_png(ImageGrab.grab(all_screens=True, xdisplay=display))
    except OSError as error:
        if display:  # "X connection failed", with a number
            raise desktop_program.no_display(SCREEN, display) from None
        raise InputMissing(SCREEN, os_reason(error)) from None


def _on_wayland() -> bytes:
    """From the first program that is there and succeeds, this desktop's own before the others."""
    desktop = os.environ.get("XDG_CURRENT_DESKTOP", "").upper()
    own = next(one for one in _PROGRAMS if one.desktop in desktop)
    reason = f"{own.command[0]} is not installed"
    with scratch_folder() as folder:
        for program in (own, *(one for one in _PROGRAMS if one != own)):
            if shutil.which(program.command[0]):
                file = folder / f"{program.package}.png"
                made = desktop_program.run(SCREEN, [*program.command, str(file)], limits.SCREEN_SECONDS)
                if not made.code and file.exists():
                    return regular_files.read(file, limits.PICTURE_BYTES)
                reason = f"{program.command[0]} takes no picture: {made.message or 'without a reason'}"
    raise InputMissing(SCREEN, reason, f"apt install {own.package}")
