"""`llava` at a terminal."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from helpers import fork_server
from ptyprocess import PtyProcess


class Terminal(pexpect.spawn):  # type: ignore[type-arg]
    """A terminal of `size` rows and columns in which `llava WORDS...` runs."""

    def __init__(self, *words: str | Path, size: tuple[int, int], echo: bool, **variables: str) -> None:
        arguments = ["-m", "llava_cli", *map(str, words)]
        environment = {**os.environ, **variables}
        super().__init__(
            sys.executable, arguments, timeout=600, env=environment, echo=echo, encoding="utf-8", dimensions=size
        )

    def _spawnpty(self, args: Any, **options: Any) -> PtyProcess:
        ours, its = os.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", *options["dimensions"], 0, 0))
        if not options["echo"]:
            attributes = termios.tcgetattr(its)
            attributes[3] &= ~termios.ECHO
            termios.tcsetattr(its, termios.TCSANOW, attributes)
        pid = fork_server.fork(args, options["env"], options["cwd"], [its] * 3, new_session=True)
        os.close(its)
        if pid:
            return PtyProcess(pid, ours)
        os.close(ours)
        return super()._spawnpty(args, **options)

    def leave(self) -> int:
        """The exit code, once it has ended; what it said is in `before`."""
        self.expect(pexpect.EOF)
        self.close()
        assert "Traceback" not in (self.before or "")
        return -1 if self.exitstatus is None else int(self.exitstatus)


Open = Callable[..., Terminal]


@pytest.fixture
def terminal() -> Iterator[Open]:
    """Runs `llava WORDS...` at a terminal that answers nothing: `terminal("chat", "-q", TERM="foot")`."""
    opened: list[Terminal] = []

    def start(*words: str | Path, size: tuple[int, int] = (40, 100), echo: bool = True, **variables: str) -> Terminal:
        opened.append(Terminal(*words, size=size, echo=echo, **{"TERM": "xterm-256color", **variables}))
        return opened[-1]

    yield start
    for one in opened:
        if not one.closed:
            one.kill(signal.SIGKILL)
            one.wait()
            one.close()
