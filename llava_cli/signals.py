"""SIGINT (Ctrl-C) and SIGTERM end the command with 128 plus their number, after cleanup where that is safe."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any


def start() -> None:
    """Handles both from now on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if not is_ignored(number):  # as shells ignore SIGINT for background jobs
            signal.signal(number, _end)
    sys.unraisablehook = _unraisable


def spare_imports() -> None:
    """From now on Ctrl-C waits until an import is done, since it stops an answer and not the whole chat."""
    if not is_ignored(signal.SIGINT):
        signal.signal(signal.SIGINT, _interrupt)


def end_at_once() -> None:
    """From now on a signal ends the process without cleanup: the command has done its work."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if not is_ignored(number):
            signal.signal(number, lambda number, frame: os._exit(128 + number))


def is_ignored(number: int) -> bool:
    """Whether the command was started with this signal ignored, which we respect."""
    return signal.getsignal(number) is signal.SIG_IGN


def _end(number: int, frame: FrameType | None) -> None:
    """Ends the process with an exception, so that everything is cleaned up; after SIGTERM, within two seconds.

    During an import the process ends at once: libraries catch an exception raised there, or abort.
    """
    if _is_importing(frame):
        if sys.stderr and sys.stderr.isatty():
            screen = os.dup(2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # so that no spinner's thread draws once more
            os.write(screen, b"\r\x1b[2K\x1b[?25h")  # clears the spinner's line and shows the cursor again
        os._exit(128 + number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    deadline = threading.Timer(2, os._exit, (128 + number,))
    deadline.daemon = True
    deadline.start()
    sys.exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _is_importing(frame):
        raise KeyboardInterrupt
    _send_later(number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame and "importlib._bootstrap" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


_timer: threading.Timer | None = None


def _send_later(number: int) -> None:
    """Repeats a signal in 10 ms, once however often it comes until then: a second Ctrl-C would leave the chat."""
    global _timer
    if _timer is None:
        _timer = threading.Timer(0.01, _send, (number,))
        _timer.daemon = True
        _timer.start()


def _send(number: int) -> None:
    global _timer
    _timer = None
    os.kill(os.getpid(), number)


def _unraisable(unraisable: Any) -> None:
    """Repeats a signal that came in an object's finalizer, from which no exception gets out."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _send_later(signal.SIGINT)
    elif isinstance(unraisable.exc_value, SystemExit):
        _send_later(signal.SIGTERM)
    else:
        sys.__unraisablehook__(unraisable)
