"""Runs a small program of the user's desktop, such as one that prints the clipboard, with limits on time and output."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from contextlib import suppress
from typing import NamedTuple

from llava_cli import limits
from llava_cli.errors import InputMissing, os_reason
from llava_cli.images.local_file import too_large
from llava_cli.untrusted_text import decoded, one_line, printable

_MESSAGE_BYTES = 10_000
"""Of what a program says on stderr; the rest is dropped."""


class Output(NamedTuple):
    code: int
    """Its exit code."""
    data: bytes
    """What it wrote to stdout."""
    message: str
    """What it wrote to stderr, in one line."""


def no_display(thing: str, display: str = "") -> InputMissing:
    """The error where nobody can be asked for the clipboard or the screen; `display` is what was tried."""
    is_remote = bool(os.environ.get("SSH_CONNECTION"))
    reason = " ".join(filter(None, ("there is no display", printable(display), "over ssh" if is_remote else "")))
    hint = "ssh -X brings your display along" if is_remote else "llava ask - QUESTION < PICTURE"
    return InputMissing(thing, reason, hint)


def run(thing: str, command: list[str], seconds: float) -> Output:
    """Runs a program; errors are about `thing`, which is what it was asked for.

    Raises `InputMissing` if it does not start or takes longer than `seconds`, `BadImage` if it prints more than a
    picture may have.
    """
    end = time.monotonic() + seconds
    try:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, start_new_session=True, **pipes)  # type: ignore[call-overload]
    except OSError as error:
        raise InputMissing(thing, f"{command[0]}: {os_reason(error)}") from None
    with process:
        try:
            data, message = _read(process, end)
            if len(data) > limits.PICTURE_BYTES:
                raise too_large(thing)
            code = process.wait(max(0.0, end - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise InputMissing(thing, f"{command[0]} does not answer within {seconds:g} s") from None
        finally:
            if process.returncode is None:
                with suppress(OSError):  # it ends just now
                    os.killpg(process.pid, signal.SIGKILL)
    return Output(code, data, one_line(decoded(message)))


def _read(process: subprocess.Popen[bytes], end: float) -> tuple[bytes, bytes]:
    """Both outputs, until they end or stdout is larger than a picture may be. Raises `TimeoutError` at `end`."""
    assert process.stdout
    assert process.stderr
    found = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    data, message = found.values()
    with selectors.DefaultSelector() as waiting:
        for descriptor in found:
            waiting.register(descriptor, selectors.EVENT_READ)
        while waiting.get_map() and len(data) <= limits.PICTURE_BYTES:
            ready = waiting.select(max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                piece = os.read(key.fd, 65_536)
                found[key.fd] += piece
                del message[_MESSAGE_BYTES:]
                if not piece:
                    waiting.unregister(key.fd)
    return bytes(data), bytes(message)
