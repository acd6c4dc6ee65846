"""Pictures are decoded where nothing can be reached, and what comes back is not believed."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import platform
import struct
import sys
from pathlib import Path

import psutil
import pytest
from helpers.tables import for_each
from PIL import Image

from llava_cli import limits
from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, LlavaError
from llava_cli.images import job
from llava_cli.images import sandbox as pictures
from llava_cli.images.sandbox import Crash, Sandbox
from llava_cli.sandbox.confine import LAYERS

SUPPORTED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="Landlock and seccomp are Linux's, on these two processors")


CONTENT = job.CONTENT


def header(width: int, height: int, format_index: int = 1, size: tuple[int, int] = (9, 9)) -> bytes:
    return job.PICTURE.pack(job.IS_PICTURE, width, height, *size, 1, False, format_index, True)


@for_each(
    "reply",
    [
        b"",
        b"x",
        header(10, 10),  # no pixels
        header(10, 10) + bytes(299),
        header(10, 10) + bytes(301),
        header(1, 1, 99) + bytes(3),
        header(1, 1, size=(0, 9)) + bytes(3),
        header(1, 1, size=(2**20, 2**20)) + bytes(3),
        header(0, 0),
        header(0, 5),
        header(2**32 - 1, 2**32 - 1) + bytes(3),
        header(2**31, 2),
        header(limits.PICTURE_PIXELS + 1, 1) + bytes(30),
        bytes([3]) + bytes(30),
        CONTENT.pack(job.IS_CONTENT, len(job.KINDS), 1, 0),
        CONTENT.pack(job.IS_CONTENT, 1, 0, 0),
        CONTENT.pack(job.IS_CONTENT, 1, 1, -1),
        CONTENT.pack(job.IS_CONTENT, 1, 1, float("nan")),
        CONTENT.pack(job.IS_CONTENT, 1, 1, float("inf")),
        CONTENT.pack(job.IS_CONTENT, 1, 1, 0) + b"x",
    ],
)
def test_a_reply_of_another_form_is_none(reply: bytes) -> None:
    with pytest.raises(ValueError):
        pictures._parse_reply(bytearray(reply))


@pytest.mark.parametrize("hint", [99, 2**32 - 1])
def test_a_reason_is_one_clean_line_and_a_hint_is_ours(hint: int) -> None:
    with pytest.raises(BadImage) as raised:
        head = job.REFUSAL.pack(job.IS_REFUSAL, hint)
        pictures._parse_reply(bytearray(head + b"\x1b[2Jdamaged\nrm -rf ~" * 500))
    assert raised.value.reason.startswith("\\x1b[2Jdamaged")
    assert len(raised.value.reason) <= limits.NAME_CHARACTERS
    assert "\n" not in str(raised.value)
    assert raised.value.hint == ""


def test_the_hash_is_not_its_to_say() -> None:
    """A picture stands for its bytes in caches: one that could call itself by another's hash would answer for it."""
    data = png(Image.new("RGB", (8, 8), "red"))
    found = Sandbox().open("a.png", data)
    assert isinstance(found, Picture)
    assert found.sha256 == hashlib.sha256(data).hexdigest()


def png(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_pictures_are_decoded_where_nothing_can_be_reached() -> None:
    sandbox = Sandbox()
    assert sandbox.layers() == list(LAYERS)
    assert isinstance(sandbox.open("a.png", png(Image.new("RGB", (8, 8)))), Picture)
    sandbox.end()


def test_a_fork_has_processes_of_its_own() -> None:
    """As `multiprocessing` makes them: what the two ask must not run into each other."""
    sandbox = Sandbox()
    red, blue = (png(Image.new("RGB", (8, 8), color)) for color in ("red", "blue"))
    assert isinstance(sandbox.open("red", red), Picture)
    if (child := os.fork()) == 0:
        right = False
        try:
            found = sandbox.open("blue", blue)
            right = isinstance(found, Picture) and found.image.getpixel((0, 0)) == (0, 0, 255)
            sandbox.end()
        finally:
            os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert sandbox.is_running
    found = sandbox.open("red", red)
    assert isinstance(found, Picture)
    assert found.image.getpixel((0, 0)) == (255, 0, 0)
    sandbox.end()


def test_one_that_nobody_holds_any_more_is_ended() -> None:
    before = set(psutil.Process().children())
    sandbox = Sandbox()
    sandbox.start()
    started = set(psutil.Process().children()) - before
    assert len(started) == 1
    del sandbox
    gc.collect()
    assert not any(process.is_running() for process in started)


def test_limits_of_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Sandbox()
    monkeypatch.setattr(limits, "PICTURE_BYTES", 50)
    assert str(sandbox.open("a.png", bytes(51))) == "a.png: larger than 0 MB"
    wide = png(Image.new("L", (limits.PICTURE_ASPECT * 2 + 1, 2)))
    monkeypatch.undo()
    assert "too narrow" in str(sandbox.open("a.png", wide))
    header = struct.pack(">IIBBBBB", limits.PICTURE_PIXELS // 1000 + 1, 1000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + header + bytes(4)
    assert isinstance(found := sandbox.open("a.png", bomb), LlavaError)
    assert found.exit_code == 65
    sandbox.end()


def test_memory_of_a_decoder(hooked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SANDBOX_MEMORY", 1 << 30)
    sandbox = Sandbox()
    assert str(sandbox.open("a.png", b"EATS")) == "a.png: takes too much memory to decode"
    assert isinstance(sandbox.open("a.png", b"SEGV"), Crash)
    assert isinstance(sandbox.open("a.png", png(Image.new("RGB", (8, 8)))), Picture)
    sandbox.end()
