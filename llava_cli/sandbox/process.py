"""A sandboxed process from outside: started when needed, killed when late, replaced when it has ended."""

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
from llava_cli.errors import os_reason
from llava_cli.processes import worker_command
from llava_cli.sandbox.messages import receive, send
from llava_cli.sandbox.supervisor import supervisor

_PIPE_BYTES = 1 << 20
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
"""Environment variables without which Python does not start on some systems. Workers get no others."""
_RETIREMENT = 0.8
"""The fraction of its CPU time limit after which a process is replaced."""


class WorkerDied(Exception):
    """The process ended, sent a malformed message, or did not start; in the last case the message says why."""


class WorkerLate(Exception):
    """The process missed its deadline, and was killed; the message is the number of seconds that it had."""


class Worker:
    """A process that does one job, for one thread at a time; if it has ended, the next request starts a new one."""

    def __init__(
        self, job: str, memory: int, *arguments: str, file: BinaryIO | None = None, has_threads: bool = False
    ) -> None:
        """`job` is a module's name; its `prepare` gets the arguments. `memory` is address space in bytes.

        The job can read and seek in `file`, if there is one: what it does moves this process's position, too. It can
        start threads only with `has_threads`.
        """
        number = str(file.fileno()) if file else ""
        threads = "threads" if has_threads else ""
        self._command = job, str(memory), str(limits.SANDBOX_CPU_SECONDS), number, threads, *arguments
        self._file = file  # which keeps it open for processes that are started later
        self._process: subprocess.Popen[bytes] | None = None
        self._parent = 0
        self.starts = 0
        """The number of processes so far: the next one does not know what the last one was sent."""
        self._layers: list[str] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The id of the process, if it runs."""
        return self._process.pid if self._process and self.is_running else None

    def start(self) -> None:
        """Starts the process unless it runs, without waiting until it is ready. Raises `WorkerDied`."""
        if not self.is_running or self._parent != os.getpid():
            self.end()
        if self._process is None:
            self._parent, self._layers = os.getpid(), None
            self.starts += 1
            _workers.add(self)
            _end_all_at_exit()
            try:
                self._process = supervisor().start(self._popen)
            except OSError as error:
                raise WorkerDied(f"its process cannot be started ({os_reason(error)})") from None
            for pipe in (self._process.stdin, self._process.stdout):
                _widen(pipe)

    def _popen(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            worker_command("llava_cli.sandbox.worker", *self._command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            pass_fds=(self._file.fileno(),) if self._file else (),
            cwd=os.path.abspath(os.sep),
            start_new_session=True,  # a terminal's Ctrl-C is for us to handle
        )

    def ask(self, request: tuple[bytes, ...], most: int, seconds: float) -> bytearray:
        """The reply to a request, of at most `most` bytes, within `seconds`, not counting the start of the process.

        Raises `WorkerDied` or `WorkerLate`.
        """
        self.layers()
        with self._deadline(seconds) as (requests, replies):
            send(requests, *request)
            reply = receive(replies, most)
        if self._process and _should_retire(self._process):
            self.end()
        return reply

    def layers(self) -> list[str]:
        """The layers of `confine` that are in force. Raises as `ask`."""
        self.start()
        if self._layers is None:
            with self._deadline(limits.SANDBOX_START_SECONDS) as (_, replies):
                self._layers = receive(replies, 100).decode("ascii", "replace").split()
        return self._layers

    def end(self) -> None:
        """Kills the process; does nothing to it in a fork of the process that started it."""
        if (process := self._process) is not None:
            self._process = None
            if self._parent == os.getpid():
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]  # both are pipes

    def __del__(self) -> None:
        with suppress(Exception):  # modules may be gone when Python exits
            self.end()

    @contextmanager
    def _deadline(self, seconds: float) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """The process's pipes, which end when it is killed after `seconds`; a process that failed is not used again."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise WorkerDied
        number = supervisor().watch(process, seconds)
        try:
            yield process.stdin, process.stdout  # type: ignore[misc]
        except BaseException as error:
            self.end()  # also after Ctrl-C: its late reply would be taken for the next one
            in_time = supervisor().release(number)
            if isinstance(error, (OSError, EOFError, ValueError)):  # ValueError: another thread has closed the pipe
                raise WorkerDied if in_time else WorkerLate(f"{seconds:.0f}") from error
            raise
        if not supervisor().release(number):
            self.end()  # killed after its reply


_workers: WeakSet[Worker] = WeakSet()


def _end_all() -> None:
    """Kills all workers before this process exits, so that none outlives it."""
    for worker in list(_workers):
        worker.end()


@cache
def _end_all_at_exit() -> None:
    """Registers `_end_all`, with the first process and not at import: what is registered last runs first.

    The command's own exit handler (`start.py`) is registered first, and exits without running any after it.
    """
    atexit.register(_end_all)


def _should_retire(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has used most of its CPU time."""
    if sys.platform != "linux":
        return False
    try:
        cpu_seconds = time.clock_gettime(~process.pid << 3 | 2)  # its CPU clock: clock_getcpuclockid(3)
    except OSError:
        return True
    return cpu_seconds > _RETIREMENT * limits.SANDBOX_CPU_SECONDS


def _widen(pipe: object) -> None:
    """Enlarges a pipe's buffer, for fewer switches between the two processes: pictures have megabytes."""
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # type: ignore[call-overload]  # only on Linux
