"""Where a user's server is: its socket, and what it says of itself. Light, for every command looks.

Anybody may have put something there, for the folder may be one that users share. So a socket counts only in a folder
where no other user can put one, and the process at its other end proves by its credentials that it is this user's.
Whatever else is there is as no server to `llava ask`, and one line of `llava serve`.
"""

from __future__ import annotations

import errno
import http.client
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from llava_cli import bounded_http, bounded_json, files, limits
from llava_cli.errors import ModelUnusable, OutputTaken, plainly
from llava_cli.regular_files import open_regular
from llava_cli.untrusted_text import one_line

_ANOTHER = "LLAVA_SOCKET=PATH names another one"
_STATUS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "precision": (str,),
    "device": (str,),
    "precisions": (list,),
    "devices": (list,),
    "family": (str, type(None)),
    "context": (int, type(None)),
    "memory": (int,),
    "pid": (int,),
    "url": (str,),
}
"""What a server says of itself that commands rely on."""


def socket_path() -> Path:
    """The socket that serves this user's own commands: `LLAVA_SOCKET`, or in the user's runtime folder."""
    if named := os.environ.get("LLAVA_SOCKET"):
        return Path(named)
    from platformdirs import user_runtime_path

    try:
        return user_runtime_path("llava") / "server.sock"
    except (OSError, RuntimeError):  # another user has made the folder, in which no socket is trusted; or there is none
        return Path(os.environ.get("TMPDIR") or "/tmp", f"runtime-{os.geteuid()}", "server.sock")


def has_sockets() -> bool:
    """Whether this system has Unix sockets, of which it can be told whose they are. Windows has not."""
    return hasattr(socket, "AF_UNIX") and hasattr(os, "geteuid")


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a Unix socket, as the system tells; None is what it does not."""

    user: int | None
    process: int | None

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        """Raises `OSError`. Of a server it is the process that began to listen."""
        if sys.platform == "linux":
            process, user, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return cls(user, process)
        if sys.platform == "darwin":  # sys/un.h: SOL_LOCAL is 0, LOCAL_PEERCRED 1, LOCAL_PEERPID 2
            return cls(struct.unpack_from("II", connection.getsockopt(0, 1, 76))[1], connection.getsockopt(0, 2))
        return cls(None, None)

    @property
    def is_stranger(self) -> bool:
        """Whether it is another user's."""
        return self.user not in (None, os.geteuid())


class SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket, to a process of this user's."""

    peer = Peer(None, None)

    def __init__(self, path: Path, timeout: float | None = None) -> None:
        super().__init__("llava", timeout=timeout)
        self._path = str(path)

    def connect(self) -> None:
        """Raises `OSError`, also where another user is at the other end."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._path)
            self.peer = Peer.of(self.sock)
            if self.peer.is_stranger:
                raise PermissionError(errno.EPERM, "it is another user's server")
        except BaseException:
            self.sock.close()
            raise


def status(path: Path | None = None) -> dict[str, Any] | None:
    """What the server at a socket says of itself; None where there is none."""
    if not has_sockets():
        return None
    path = path or socket_path()
    if is_ours(path):
        with suppress(OSError), closing(SocketConnection(path, limits.STATUS_SECONDS)) as connection:
            connection.connect()
            return status_over(connection)
    return None


def status_over(connection: SocketConnection) -> dict[str, Any] | None:
    """What a server says of itself over an open connection, which this ends; None for what no server of ours says."""
    deadline = bounded_http.Deadline(limits.STATUS_SECONDS)
    with suppress(OSError, ValueError, bounded_http.TooLarge):
        with closing(bounded_http.ask(connection.sock, deadline, "GET", "/llava", {"Host": "llava"})) as response:
            body = response.read(limits.STATUS_BYTES)
        said = bounded_json.loads(body, bounded_json.Bounds(limits.STATUS_BYTES, depth=3, items=1000))
        if response.status == 200 and isinstance(said, dict):
            said = {name: _cleaned(value) for name, value in said.items()}
            if all(type(said.get(name, ...)) in kinds for name, kinds in _STATUS.items()):
                return said
    return None


def _cleaned(value: Any) -> Any:
    if isinstance(value, list):
        return [_cleaned(one) for one in value]
    return one_line(value, limits.PATH_CHARACTERS) if isinstance(value, str) else value


def is_ours(path: Path) -> bool:
    """Whether there is a socket that nobody but this user could have put there."""
    try:
        found = path.lstat()
        return stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid() and not _distrust(path.parent)
    except OSError:
        return False


def _distrust(folder: Path) -> str:
    """Why a socket in a folder could be anybody's; nothing where it could not. Raises `OSError`."""
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if found.st_uid not in (os.geteuid(), 0):
        return "its folder belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        return "other users can write to its folder"
    return ""


def check_free(path: Path) -> None:
    """Raises `OutputTaken` where a server has the socket, and `ModelUnusable` where this system has no such sockets."""
    if not has_sockets():
        hint = "--server URL asks one that runs on another system; ask, chat and batch need none"
        raise ModelUnusable("llava serve", "needs Unix sockets, which this system has not", hint)
    if said := status(path):
        raise OutputTaken(str(path), f"{said['model']} is being served (pid {said['pid']})", "llava serve --stop")
    if pid := in_between(path):
        raise OutputTaken(str(path), f"a server is beginning or ending there (pid {pid})", "llava serve --status")


def in_between(path: Path) -> str | None:
    """The process that has the socket's place, whether it answers yet, or any more, or not."""
    if not has_sockets():
        return None
    import fcntl  # with which a server that is not there need not be looked for

    with suppress(OSError), open_regular(_beside(path, "lock"), follow=False) as file:
        if not _is_only_ours(file.fileno()):
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = file.read(20).strip()
            return pid.decode() if pid.isdigit() else "?"
    return None


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket of mode 0600 at `path`, that is nobody else's until the end.

    Raises as `check_free` does, and `OutputTaken` where it cannot be made.
    A lock beside it says whose it is: while a model is loaded or answers are finished nobody answers there, and still
    another server may neither take the socket for left behind nor delete it.
    """
    check_free(path)
    import fcntl

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
    beside = _beside(path, kind)
    try:
        with _umask(0o077):
            if not os.path.lexists(path.parent):
                files.make_folder(path.parent, 0o700)
        if distrust := _distrust(path.parent):
            raise OutputTaken(str(path), distrust, _ANOTHER)
        descriptor = files.open_for_writing(beside, os.O_RDWR | os.O_APPEND, files.SECRET)
    except OSError as error:
        raise _unusable(path if error.filename != str(beside) else beside, error) from None
    if not _is_only_ours(descriptor):
        os.close(descriptor)
        raise OutputTaken(str(beside), "is another user's, or has a second name", _ANOTHER)
    return open(descriptor, "a+", encoding="utf-8", errors="replace")


def _is_only_ours(descriptor: int) -> bool:
    """Whether an open file is this user's and has no other name: in a shared folder anybody may link one of theirs."""
    found = os.fstat(descriptor)
    return found.st_uid == os.geteuid() and found.st_nlink == 1


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}")


def _unusable(path: Path, error: OSError) -> OutputTaken:
    return OutputTaken(str(path), one_line(error.strerror or plainly(error)), _ANOTHER)


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
