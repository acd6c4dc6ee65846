"""A desktop of its own for a test: an X server without a screen, whose clipboard is real."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.command import missing

WIDTH, HEIGHT = 640, 480
Copy = Callable[..., None]


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`$DISPLAY` of a new X server: a white screen and an empty clipboard."""
    if not shutil.which("Xvfb") or not shutil.which("xclip"):
        missing("Xvfb and xclip are not installed")
    command = ["Xvfb", "-displayfd", "1", "-wr", "-noreset", "-nolisten", "tcp", "-screen", "0", f"{WIDTH}x{HEIGHT}x24"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout
        number = server.stdout.readline().decode().strip()
        assert number, "Xvfb does not start"
        monkeypatch.setenv("DISPLAY", f":{number}")
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        monkeypatch.delenv("SSH_CONNECTION", raising=False)
        yield f":{number}"
        server.kill()


@pytest.fixture
def copy(display: str) -> Copy:
    """Copies to the clipboard: `copy(data, "image/png")`."""

    def to_clipboard(data: bytes | Path, kind: str = "UTF8_STRING") -> None:
        content = data if isinstance(data, bytes) else data.read_bytes()
        words = ["xclip", "-selection", "clipboard", "-i", "-t", kind]
        # It stays to answer who pastes, and would keep a pipe open.
        subprocess.run(words, input=content, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)

    return to_clipboard


def program(folder: Path, name: str, script: str) -> None:
    """Puts a program of a desktop that is not there into a folder for `$PATH`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o700)
