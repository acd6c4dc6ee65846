"""A process that opens pictures for this one: where a decoder crashes, hangs or eats memory, that one goes.

Run as `python -m llava_cli.sandbox DESCRIPTOR` it is that process.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, cast

from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, LlavaError, printable
from llava_cli.images import open_picture, picture_of

MEMORY = 4 * 2**30
COMPUTING = 60
"""Seconds of computing that one picture may take."""
SECONDS = 120.0
"""That one picture may take in all, for a disk or a network may hang as well."""


class Crash(LlavaError):
    """A picture took its process down."""


class Sandbox:
    """One process at a time, begun when it is needed; after a crash the next picture gets a new one."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def open(self, source: str, data: bytes | None = None, **options: Any) -> Picture | LlavaError:
        """The picture at `source`, or that `data` is, or what is wrong with it.

        Options are those of `open_picture`; with `shrink` it comes no larger than that many pixels a side.
        """
        from PIL import Image

        try:
            pipe = self.start()
            pipe.send((source, data, options))
            if not pipe.poll(self._seconds):
                self.end()
                return BadImage(printable(source), f"took longer than {self._seconds:.0f} s")
            answer: tuple[Any, ...] = pipe.recv()
        except (EOFError, OSError):
            self.end()
            return Crash(printable(source), "crashes its decoder")
        if isinstance(answer[0], Picture):
            picture, size, pixels = answer
            return replace(cast("Picture", picture), image=Image.frombytes("RGB", size, pixels))
        kind, *words = answer
        return cast("LlavaError", kind(*words))

    def end(self) -> None:
        """Ends the process, whatever it is at."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            with suppress(OSError):
                self._pipe.close()
        self._process = self._pipe = None

    def start(self) -> Connection:
        if self._pipe is None:
            self._pipe, theirs = Pipe()
            command = [sys.executable, "-m", "llava_cli.sandbox", str(theirs.fileno())]
            # In a session of its own: what a terminal sends (Ctrl-C) is for us to deal with.
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
            theirs.close()
        return self._pipe


class Sandboxes:
    """One for each core, up to four, for any thread; `begin` starts one before it is needed."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.all = [Sandbox(seconds) for _ in range(max(1, min(4, os.cpu_count() or 1)))]
        self._free: queue.LifoQueue[Sandbox] = queue.LifoQueue()  # so that no more are started than are needed
        for one in self.all:
            self._free.put(one)

    def begin(self) -> None:
        self.all[-1].start()

    def open(self, source: str, data: bytes | None = None, **options: Any) -> Picture | LlavaError:
        """As `Sandbox.open`, once one is free."""
        one = self._free.get()
        try:
            return one.open(source, data, **options)
        finally:
            self._free.put(one)

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        for one in self.all:
            one.end()


def main() -> None:
    """Opens what it is asked to until nobody asks any more."""
    import resource

    def limit(what: int, most: int) -> None:
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

    limit(resource.RLIMIT_AS, MEMORY)
    asked = Connection(int(sys.argv[1]))
    with suppress(EOFError, OSError):  # whoever asked is gone
        while True:
            source, data, options = asked.recv()
            limit(resource.RLIMIT_CPU, int(time.process_time()) + COMPUTING)
            asked.send(_opened(source, data, **options))


def _opened(source: str, data: bytes | None, shrink: int | None = None, **options: bool) -> tuple[Any, ...]:
    """What a picture is made of, or the class, thing, reason and hint of the error."""
    try:
        picture = open_picture(source, **options) if data is None else picture_of(data, source, **options)
        if shrink:  # here, for a large picture takes long to send
            picture.image.thumbnail((shrink, shrink))
    except LlavaError as error:
        return type(error), error.thing, error.reason, error.hint
    except MemoryError:
        return BadImage, printable(source), "takes too much memory", ""
    if data is not None:
        picture = replace(picture, data=None)  # who asked has it
    return replace(picture, image=None), picture.image.size, picture.image.tobytes()  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
