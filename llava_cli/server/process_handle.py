"""Signals to a process that cannot reach another one which has its pid later."""

from __future__ import annotations

import os
import signal
import sys


class ProcessHandle:
    """A process of this user, by a pidfd where the system has those (Linux 5.3 and later)."""

    def __init__(self, pid: int) -> None:
        """Raises `ProcessLookupError` if there is no such process."""
        self.pid = pid
        self._pidfd: int | None = None
        if sys.platform == "linux":
            try:
                self._pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                raise
            except OSError:  # an older kernel, or a container that forbids it
                pass

    def signal(self, number: int) -> bool:
        """Whether the process still existed to get the signal."""
        try:
            if sys.platform == "linux" and self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def is_alive(self) -> bool:
        return self.signal(0)

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
