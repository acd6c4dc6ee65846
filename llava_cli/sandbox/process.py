"""One sandboxed process, from outside: started when it is needed, killed when it is late, replaced when it is gone."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import BinaryIO
from weakref import WeakSet

from llava_cli import limits
from llava_cli.processes import worker_command
from llava_cli.sandbox.keeper import keeper
from llava_cli.sandbox.messages import receive, send

_PIPE_BYTES = 1 << 20
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
"""Without which some systems' Python does not start. Nothing else of the environment is a worker's business."""
_USED_UP = 0.8
"""Of the computing that a process may do in its life: then a new one takes over."""


class WorkerDied(Exception):
    """The process ended, said what no worker of ours says, or did not start: then the message says why."""


class WorkerLate(Exception):
    """The process took longer than so many seconds, and was ended."""


class Worker:
    """A process that does one job, for one thread at a time. The next request after its end gets a new one."""

    def __init__(self, job: str, memory: int, *words: str) -> None:
        """`job` is a module's name, and its `prepare` gets the words; `memory` is in bytes of address space."""
        self._words = job, str(memory), str(limits.SANDBOX_CPU_SECONDS), *words
        self._process: subprocess.Popen[bytes] | None = None
        self._parent = 0
        self.starts = 0
        """How many processes there have been: what one was told, the next one does not know."""
        self._layers: list[str] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process, unless it runs; does not wait until it is ready. Raises `WorkerDied`."""
        if not self.is_running or self._parent != os.getpid():
            self.end()
        if self._process is None:
            self._parent, self._layers = os.getpid(), None
            self.starts += 1
            _workers.add(self)
            _end_all_at_exit()
            try:
                self._process = keeper().start(self._popen)
            except OSError as error:
                raise WorkerDied(f"its process cannot be started ({error.strerror})") from None
            for pipe in (self._process.stdin, self._process.stdout):
                _widen(pipe)

    def _popen(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            worker_command("llava_cli.sandbox.worker", *self._words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            cwd=os.path.abspath(os.sep),
            start_new_session=True,  # what a terminal sends (Ctrl-C) is for us to deal with
        )

    def ask(self, request: tuple[bytes, ...], most: int, seconds: float) -> bytearray:
        """The reply to a request, of at most so many bytes and seconds, the start not counted.

        Raises `WorkerDied` and `WorkerLate`.
        """
        self.layers()
        with self._deadline(seconds) as (requests, replies):
            send(requests, *request)
            reply = receive(replies, most)
        if self._process and _is_used_up(self._process):
            self.end()
        return reply

    def layers(self) -> list[str]:
        """Which layers of `confine` took hold. Raises as `ask` does."""
        self.start()
        if self._layers is None:
            with self._deadline(limits.SANDBOX_START_SECONDS) as (_, replies):
                self._layers = receive(replies, 100).decode("ascii", "replace").split()
        return self._layers

    def end(self) -> None:
        """Ends the process, whatever it is at; in a fork of the process that has started it, leaves it to that one."""
        if (process := self._process) is not None:
            self._process = None
            if self._parent == os.getpid():
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]  # both are pipes

    def __del__(self) -> None:
        with suppress(Exception):  # whatever is gone already when Python ends
            self.end()

    @contextmanager
    def _deadline(self, seconds: float) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """Its pipes, which end when it is killed after so many seconds; a worker that failed is not used again."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise WorkerDied
        number = keeper().watch(process, seconds)
        try:
            yield process.stdin, process.stdout  # type: ignore[misc]
        except BaseException as error:
            self.end()  # also after Ctrl-C: the reply that still comes would be taken for the next one
            in_time = keeper().release(number)
            if isinstance(error, (OSError, EOFError, ValueError)):  # ValueError: another thread has closed the pipe
                raise WorkerDied if in_time else WorkerLate(f"{seconds:.0f}") from error
            raise
        if not keeper().release(number):
            self.end()  # killed after its last word: the next request is not for it


_workers: WeakSet[Worker] = WeakSet()


def _end_all() -> None:
    """Before we leave, so that nothing that we have started outlives us, be it for a moment."""
    for worker in list(_workers):
        worker.end()


@cache
def _end_all_at_exit() -> None:
    """Once, with the first process, not where this is imported: what is registered last is run first.

    The command's own way out (`start.py`), registered before anything else is done, leaves without running the rest.
    """
    atexit.register(_end_all)


def _is_used_up(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has little computing left."""
    if sys.platform != "linux":
        return False
    try:
        computed = time.clock_gettime(~process.pid << 3 | 2)  # its CPU clock: clock_getcpuclockid(3)
    except OSError:
        return True
    return computed > _USED_UP * limits.SANDBOX_CPU_SECONDS


def _widen(pipe: object) -> None:
    """Pictures are megabytes: fewer turns between the two processes."""
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # type: ignore[call-overload]  # Linux alone has it
