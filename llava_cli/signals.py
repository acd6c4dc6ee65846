"""SIGINT (Ctrl-C) and SIGTERM end the command with 128 and their number, in order wherever that is safe."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any


def start() -> None:
    """Takes both over for the process's life."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if not is_ignored(number):  # as a shell has SIGINT ignored by what it runs behind it
            signal.signal(number, _end)
    sys.unraisablehook = _unraisable


def spare_imports() -> None:
    """From now on Ctrl-C waits for what is being imported: it is to stop an answer, not the whole chat."""
    if not is_ignored(signal.SIGINT):
        signal.signal(signal.SIGINT, _interrupt)


def end_at_once() -> None:
    """From now on, when the command has done its work: nothing is left that has to be in order."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if not is_ignored(number):
            signal.signal(number, lambda number, frame: os._exit(128 + number))


def is_ignored(number: int) -> bool:
    """Whether who started the command has it ignore a signal, which is then not ours to take."""
    return signal.getsignal(number) is signal.SIG_IGN


def _end(number: int, frame: FrameType | None) -> None:
    """Ends the process in order, SIGTERM in two seconds at the latest.

    At once while something is imported: what is raised there, libraries catch, or abort.
    """
    if _is_importing(frame):
        if sys.stderr and sys.stderr.isatty():
            screen = os.dup(2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # lest a spinner's thread draws once more
            os.write(screen, b"\r\x1b[2K\x1b[?25h")  # its line goes, and the cursor that it hid comes back
        os._exit(128 + number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    anyway = threading.Timer(2, os._exit, (128 + number,))
    anyway.daemon = True
    anyway.start()
    sys.exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _is_importing(frame):
        raise KeyboardInterrupt
    _interrupt_later()


def _is_importing(frame: FrameType | None) -> bool:
    while frame and "importlib._bootstrap" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


_waiting: threading.Timer | None = None


def _interrupt_later() -> None:
    """Once, however often Ctrl-C was pressed by then: the second one would leave the chat."""
    global _waiting
    if _waiting is None:
        _waiting = threading.Timer(0.01, _interrupt_again)
        _waiting.daemon = True
        _waiting.start()


def _interrupt_again() -> None:
    global _waiting
    _waiting = None
    os.kill(os.getpid(), signal.SIGINT)


def _unraisable(ignored: Any) -> None:
    """Ctrl-C in the midst of an object's end, from where nothing can be raised, comes again a moment later."""
    if isinstance(ignored.exc_value, KeyboardInterrupt):
        _interrupt_later()
    else:
        sys.__unraisablehook__(ignored)
