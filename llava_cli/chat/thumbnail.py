"""Draws a small picture on the terminal.

It is only a decoration, so it must never lose a keystroke or end the chat. Therefore the terminal is not queried, since
its answer would arrive on stdin: environment variables tell which graphics protocol it has, if any.
"""

from __future__ import annotations

import io
import os
import sys
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from llava_cli.conversation import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS = 10
_CELL = (10, 20)
"""Pixels of a character where the terminal does not report them; those of a VT340."""
_PAYLOAD = 4096
"""The largest payload of one escape sequence in Kitty's protocol, in characters."""


def draw(picture: Picture) -> None:
    """Draws a picture; draws nothing on a terminal without colors or Unicode, or if anything fails."""
    with suppress(Exception):
        from rich.console import Console

        console = Console()
        is_terminal = os.environ.get("TERM") or os.name == "nt"
        is_unicode = "utf" in (sys.stdout.encoding or "").lower()
        if not is_terminal or not is_unicode or console.no_color or console.color_system is None:
            return
        columns, rows = _cells(picture.image, console.width - 1)
        with suppress(Exception):
            if encode := _graphics_protocol():
                sys.stdout.write(encode(picture.image.convert("RGB"), columns, rows) + "\n")
                sys.stdout.flush()
                return
        console.print(_half_blocks(picture.image, columns, rows), no_wrap=True, overflow="crop")


def _cells(image: Image, max_columns: int) -> tuple[int, int]:
    """Columns and rows for a picture; a character is twice as high as wide."""
    scale = min(2 * ROWS / image.height, max(max_columns, 1) / image.width)
    return max(round(image.width * scale), 1), max(round(image.height * scale / 2), 1)


def _half_blocks(image: Image, columns: int, rows: int) -> object:
    """The picture as rich text, two pixels in a character."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    small = image.convert("RGB").resize((columns, 2 * rows))
    data = small.tobytes()
    pixels = [Color.from_rgb(*data[i : i + 3]) for i in range(0, len(data), 3)]
    lines = [pixels[i : i + columns] for i in range(0, len(pixels), columns)]
    drawn = []
    for upper, lower in zip(lines[::2], lines[1::2], strict=True):
        drawn.append(Text.assemble(*(("▀", Style(color=u, bgcolor=d)) for u, d in zip(upper, lower, strict=True))))
    return Text("\n").join(drawn)


def _kitty(image: Image, columns: int, rows: int) -> str:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol/; `q=2` suppresses its answers."""
    image.resize(_pixels(columns, rows)).save(data := io.BytesIO(), "PNG")
    text = b64encode(data.getvalue()).decode()
    sequences, keys = "", f"a=T,f=100,q=2,c={columns},r={rows},"
    for i in range(0, len(text), _PAYLOAD):
        sequences += f"\x1b_G{keys}m={int(i + _PAYLOAD < len(text))};{text[i : i + _PAYLOAD]}\x1b\\"
        keys = ""
    return sequences


def _sixel(image: Image, columns: int, rows: int) -> str:
    from textual_image._sixel import image_to_sixels

    return image_to_sixels(image.resize(_pixels(columns, rows)))


def _pixels(columns: int, rows: int) -> tuple[int, int]:
    """The size of so many characters in pixels."""
    width, height = _CELL
    with suppress(ImportError, OSError, ZeroDivisionError):  # no termios, or a terminal that reports no size
        import fcntl
        import struct
        import termios

        size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
        all_rows, all_columns, x_pixels, y_pixels = struct.unpack("4H", size)
        width, height = x_pixels // all_columns or width, y_pixels // all_rows or height
    return columns * width, rows * height


_GRAPHICS: dict[tuple[str, str], Callable[[Image, int, int], str]] = {
    ("TERM", "xterm-kitty"): _kitty,
    ("TERM", "xterm-ghostty"): _kitty,
    ("TERM_PROGRAM", "ghostty"): _kitty,
    ("TERM_PROGRAM", "WezTerm"): _sixel,
    ("TERM_PROGRAM", "iTerm.app"): _sixel,
    ("TERM", "foot"): _sixel,
    ("TERM", "foot-extra"): _sixel,
    ("TERM", "mlterm"): _sixel,
    ("TERM", "mlterm-256color"): _sixel,
}


def _graphics_protocol() -> Callable[[Image, int, int], str] | None:
    """The function that encodes pictures for this terminal; None if it shows none, or tmux or screen is in between."""
    if os.environ.get("TMUX") or os.environ.get("STY") or os.environ.get("TERM", "").startswith(("screen", "tmux")):
        return None
    if os.environ.get("KONSOLE_VERSION") and not os.environ.get("TERM_PROGRAM"):
        return _sixel
    return next((encode for (name, value), encode in _GRAPHICS.items() if os.environ.get(name) == value), None)
