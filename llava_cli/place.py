"""Where a user's server is: its socket, and what it says of itself. Light, for every command looks."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from llava_cli.errors import OutputTaken, plainly

SECONDS = 2.0
"""For a server to say that it is there."""


def socket_path() -> Path:
    """The socket that serves this user's own commands: `LLAVA_SOCKET`, or in the user's runtime folder."""
    if named := os.environ.get("LLAVA_SOCKET"):
        return Path(named)
    from platformdirs import user_runtime_path

    return user_runtime_path("llava") / "server.sock"


class SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float | None = None) -> None:
        super().__init__("llava", timeout=timeout)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._path)
        except BaseException:
            self.sock.close()
            raise


def status(path: Path | None = None) -> dict[str, Any] | None:
    """What the server at a socket says of itself; None where there is none."""
    path = path or socket_path()
    with suppress(OSError, ValueError, http.client.HTTPException):
        if not is_ours(path):
            return None
        connection = SocketConnection(path, SECONDS)
        try:
            connection.request("GET", "/llava")
            said: dict[str, Any] = json.loads(connection.getresponse().read())
            return said
        finally:
            connection.close()
    return None


def is_ours(path: Path) -> bool:
    """Whether there is a socket that nobody but this user could have put there."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISSOCK(found.st_mode) and found.st_uid == os.getuid()


def check_free(path: Path) -> None:
    """Raises `OutputTaken` where a server has the socket."""
    if said := status(path):
        raise OutputTaken(str(path), f"{said['model']} is being served (pid {said['pid']})", "llava serve --stop")
    if pid := in_between(path):
        raise OutputTaken(str(path), f"a server is beginning or ending there (pid {pid})", "llava serve --status")


def in_between(path: Path) -> str | None:
    """The process that has the socket's place, whether it answers yet, or any more, or not."""
    import fcntl  # which not every system has, and without a server is not needed

    with suppress(OSError), open(_beside(path, "lock")) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "?"
    return None


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket of mode 0600 at `path`, that is nobody else's until the end. Raises `OutputTaken`.

    A lock beside it says whose it is: while a model is loaded or answers are finished nobody answers there, and still
    another server may neither take the socket for left behind nor delete it.
    """
    import fcntl

    check_free(path)
    with open_beside(path, "lock") as lock, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            check_free(path)
            raise OutputTaken(str(path), "another server has just been there", "llava serve --status") from None
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        try:
            if is_ours(path):
                path.unlink()
            with _umask(0o177):  # from the first moment on
                one.bind(str(path))
            one.listen(128)
        except OSError as error:
            raise _unusable(path, error) from None
        try:
            yield one
        finally:
            with suppress(OSError):
                path.unlink()


def open_beside(path: Path, kind: str) -> TextIO:
    """A file of mode 0600 beside a socket, for its `kind` of thing. Raises `OutputTaken` where there can be none."""
    try:
        with _umask(0o077):
            path.parent.mkdir(parents=True, exist_ok=True)
            return open(_beside(path, kind), "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise _unusable(path, error) from None


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}")


def _unusable(path: Path, error: OSError) -> OutputTaken:
    return OutputTaken(str(path), error.strerror or plainly(error), "LLAVA_SOCKET=PATH names another one")


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
