"""The thread that starts sandboxed processes, and kills those that miss their deadline.

There is one for all of them: Linux kills a process when the thread that started it ends (`confine.py` asks for that),
so that thread has to live as long as we do; and a timer for each picture would be a thread for each picture.
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


class Supervisor:
    """Starts processes, and kills a watched process at its deadline unless it is released before."""

    def __init__(self) -> None:
        self._starts: list[Callable[[], None]] = []
        self._watched: dict[int, tuple[float, subprocess.Popen[bytes]]] = {}
        self._numbers = itertools.count()
        self._next_check = _NEVER  # when the thread wakes next
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="sandbox supervisor", daemon=True).start()

    def start(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Runs `start` in the supervisor's thread, and returns or raises what it does."""
        result: list[subprocess.Popen[bytes] | OSError] = []
        done = threading.Event()

        def run() -> None:
            try:
                result.append(start())
            except OSError as error:
                result.append(error)
            done.set()

        with self._changed:
            self._starts.append(run)
            self._changed.notify()
        done.wait()
        if isinstance(result[0], OSError):
            raise result[0]
        return result[0]

    def watch(self, process: subprocess.Popen[bytes], seconds: float) -> int:
        """Will kill the process after `seconds`; returns a number for `release`."""
        deadline, number = time.monotonic() + seconds, next(self._numbers)
        with self._changed:
            self._watched[number] = deadline, process
            if deadline < self._next_check:
                self._changed.notify()
        return number

    def release(self, number: int) -> bool:
        """Ends the watch; returns whether the process was in time."""
        with self._changed:
            return self._watched.pop(number, None) is not None

    def _run(self) -> None:
        while True:
            self._kill_late_and_wait()
            self._start_all()

    def _kill_late_and_wait(self) -> None:
        """Kills what is late, then waits for the next deadline or start."""
        with self._changed:
            now = time.monotonic()
            for number, (deadline, process) in list(self._watched.items()):
                if deadline <= now:
                    del self._watched[number]
                    process.kill()
            self._next_check = min((deadline for deadline, _ in self._watched.values()), default=_NEVER)
            if not self._starts:
                self._changed.wait(min(self._next_check - now, threading.TIMEOUT_MAX))

    def _start_all(self) -> None:
        with self._changed:
            starts, self._starts = self._starts, []
        for start in starts:
            start()


def supervisor() -> Supervisor:
    """The supervisor of this process; a fork needs its own, because it has only the thread that forked."""
    return _supervisor(os.getpid())


@cache
def _supervisor(process_id: int) -> Supervisor:
    return Supervisor()
