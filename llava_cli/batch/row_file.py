"""A file that rows are appended to, each whole or not at all."""

from __future__ import annotations

import os
import time

from llava_cli import files

SYNC_ROWS, SYNC_SECONDS = 64, 1.0
"""How often rows are flushed to the disk: after as many rows, or as many seconds, whichever comes first."""


class RowFile:
    """An open file; its methods raise `OSError`."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` was opened to append, and is closed with this."""
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        """In bytes, as this process has left it."""
        self._unsynced, self._synced = 0, time.monotonic()

    def append(self, line: bytes) -> None:
        files.write_all(self.descriptor, line)
        self.size += len(line)
        self._unsynced += 1
        if self._unsynced >= SYNC_ROWS or time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def cut_off(self, size: int) -> None:
        """Leaves the first `size` bytes."""
        if size < os.fstat(self.descriptor).st_size:
            files.truncate(self.descriptor, size)
        self.size = size

    def sync(self) -> None:
        """Waits until all rows are on the disk."""
        os.fsync(self.descriptor)
        self._unsynced, self._synced = 0, time.monotonic()

    def close(self) -> None:
        """Syncs, and closes in any case."""
        try:
            self.sync()
        finally:
            os.close(self.descriptor)
