"""The thread that starts sandboxed processes, and kills those that are late.

One for all of them: Linux ends a process with the thread that has started it (`confine.py` asks for that), so this has
to live as long as we do; and a timer for each picture would be a thread for each picture.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
import time
from collections.abc import Callable
from functools import cache

_NEVER = float("inf")


class Keeper:
    """Starts processes, and kills one at its deadline, unless it is released before."""

    def __init__(self) -> None:
        self._to_start: list[Callable[[], None]] = []
        self._watched: dict[int, tuple[float, subprocess.Popen[bytes]]] = {}
        self._numbers = itertools.count()
        self._wakes = _NEVER  # when the thread will look next
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="sandbox keeper", daemon=True).start()

    def start(self, make: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """The process that `make` starts, or raises what it raises."""
        made: list[subprocess.Popen[bytes] | OSError] = []
        done = threading.Event()

        def run() -> None:
            try:
                made.append(make())
            except OSError as error:
                made.append(error)
            done.set()

        with self._changed:
            self._to_start.append(run)
            self._changed.notify()
        done.wait()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]

    def watch(self, process: subprocess.Popen[bytes], seconds: float) -> int:
        """Kills `process` in so many seconds; returns what `release` takes."""
        deadline, number = time.monotonic() + seconds, next(self._numbers)
        with self._changed:
            self._watched[number] = deadline, process
            if deadline < self._wakes:
                self._changed.notify()
        return number

    def release(self, number: int) -> bool:
        """Whether the process was still in time."""
        with self._changed:
            return self._watched.pop(number, None) is not None

    def _run(self) -> None:
        while True:
            self._wait()
            self._start_all()

    def _wait(self) -> None:
        """Until something is to be started, or a deadline passes: then kills what is late."""
        with self._changed:
            now = time.monotonic()
            for number, (deadline, process) in list(self._watched.items()):
                if deadline <= now:
                    del self._watched[number]
                    process.kill()
            self._wakes = min((deadline for deadline, _ in self._watched.values()), default=_NEVER)
            if not self._to_start:
                self._changed.wait(min(self._wakes - now, threading.TIMEOUT_MAX))

    def _start_all(self) -> None:
        with self._changed:
            starts, self._to_start = self._to_start, []
        for start in starts:
            start()


def keeper() -> Keeper:
    """This process's: a fork has no threads but the one that made it."""
    return _keeper(os.getpid())


@cache
def _keeper(process: int) -> Keeper:
    return Keeper()
