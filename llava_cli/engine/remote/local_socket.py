"""The Unix socket of the user's own server: who may listen there, who does, and what the server reports of itself.

Imported by every command, so it imports little. The socket's folder may be shared with other users: a socket is
trusted only in a folder where no other user can create one, and only if the process at its other end belongs to this
user. `llava ask` ignores any other socket, and `llava serve` refuses to start with one line about it.
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
from llava_cli.errors import ModelUnusable, OutputTaken, os_reason
from llava_cli.paths import socket_path
from llava_cli.regular_files import open_regular
from llava_cli.untrusted_text import one_line

_HINT = "LLAVA_SOCKET=PATH names another one"
_INFO_TYPES: dict[str, tuple[type, ...]] = {
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
"""The entries of `GET /llava` that commands rely on."""


def has_unix_sockets() -> bool:
    """Whether this system has Unix sockets with owners. Windows does not."""
    return hasattr(socket, "AF_UNIX") and hasattr(os, "geteuid")


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a Unix socket, according to the system; None if the system does not say."""

    uid: int | None
    pid: int | None

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        """The peer of a connected socket; for a client, the process that called `listen`. Raises `OSError`."""
        if sys.platform == "linux":
            pid, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return cls(uid, pid)
        if sys.platform == "darwin":  # sys/un.h: SOL_LOCAL is 0, LOCAL_PEERCRED 1, LOCAL_PEERPID 2
            return cls(struct.unpack_from("II", connection.getsockopt(0, 1, 76))[1], connection.getsockopt(0, 2))
        return cls(None, None)

    @property
    def is_stranger(self) -> bool:
        """Whether the process belongs to another user."""
        return self.uid not in (None, os.geteuid())


class UnixHTTPConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket to a process of this user."""

    peer = Peer(None, None)

    def __init__(self, path: Path, timeout: float | None = None) -> None:
        super().__init__("llava", timeout=timeout)
        self._path = str(path)

    def connect(self) -> None:
        """Raises `OSError`, and `PermissionError` if the process at the other end belongs to another user."""
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


def server_info(path: Path | None = None) -> dict[str, Any] | None:
    """What the server at a socket reports of itself; None if no server of this user answers there."""
    if not has_unix_sockets():
        return None
    path = path or socket_path()
    if is_trusted_socket(path):
        with suppress(OSError), closing(UnixHTTPConnection(path, limits.STATUS_SECONDS)) as connection:
            connection.connect()
            return read_server_info(connection)
    return None


def read_server_info(connection: UnixHTTPConnection) -> dict[str, Any] | None:
    """As `server_info`, over an open connection, which this closes; None if the server is not `llava serve`."""
    deadline = bounded_http.Deadline(limits.STATUS_SECONDS)
    with suppress(OSError, ValueError, bounded_http.ResponseTooLarge):
        response = bounded_http.send_request(connection.sock, deadline, "GET", "/llava", {"Host": "llava"})
        with closing(response):
            body = response.read(limits.STATUS_BYTES)
        info = bounded_json.loads(body, bounded_json.Bounds(limits.STATUS_BYTES, depth=3, items=1000))
        if response.status == 200 and isinstance(info, dict):
            info = {name: _printable(value) for name, value in info.items()}
            if all(type(info.get(name, ...)) in types for name, types in _INFO_TYPES.items()):
                return info
    return None


def _printable(value: Any) -> Any:
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return one_line(value, limits.PATH_CHARACTERS) if isinstance(value, str) else value


def is_trusted_socket(path: Path) -> bool:
    """Whether there is a socket that only this user can have created."""
    try:
        status = path.lstat()
        return stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid() and not _folder_problem(path.parent)
    except OSError:
        return False


def _folder_problem(folder: Path) -> str:
    """Why another user could have created a socket in this folder; empty if none could. Raises `OSError`."""
    status = folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if status.st_uid not in (os.geteuid(), 0):
        return "its folder belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
        return "other users can write to its folder"
    return ""


def check_free(path: Path) -> None:
    """Raises `OutputTaken` if a server has the socket, and `ModelUnusable` if this system has no Unix sockets."""
    if not has_unix_sockets():
        hint = "--server URL asks one that runs on another system; ask, chat and batch need none"
        raise ModelUnusable("llava serve", "needs Unix sockets, which this system has not", hint)
    if info := server_info(path):
        raise OutputTaken(str(path), f"{info['model']} is being served (pid {info['pid']})", "llava serve --stop")
    if pid := silent_server(path):
        raise OutputTaken(str(path), f"a server is beginning or ending there (pid {pid})", "llava serve --status")


def silent_server(path: Path) -> str | None:
    """The pid of a server that holds the socket's lock, and may still be loading or already be stopping; else None."""
    if not has_unix_sockets():
        return None
    import fcntl  # only here: most commands find no server and do not need it

    with suppress(OSError), open_regular(_companion(path, "lock"), follow=False) as file:
        if not _is_private(file.fileno()):
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = file.read(20).strip()
            return pid.decode() if pid.isdigit() else "?"
    return None


@contextmanager
def listen(path: Path) -> Iterator[socket.socket]:
    """A listening socket of mode 0600 at `path`, which is deleted at the end.

    A lock file beside it marks the socket as taken while nobody answers there, because the model is being loaded or
    the last answers are being finished: no other server may then delete it as a leftover. Raises as `check_free` does,
    and `OutputTaken` if the socket cannot be created.
    """
    check_free(path)
    import fcntl

    with open_companion(path, "lock") as lock, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            check_free(path)
            raise OutputTaken(str(path), "another server has just been there", "llava serve --status") from None
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        try:
            if is_trusted_socket(path):
                path.unlink()
            with _umask(0o177):  # a later chmod would leave a moment in which others can connect
                listener.bind(str(path))
            listener.listen(128)
        except OSError as error:
            raise _unusable(path, error) from None
        try:
            yield listener
        finally:
            with suppress(OSError):
                path.unlink()


def open_companion(path: Path, suffix: str) -> TextIO:
    """A file of mode 0600 beside a socket, such as its lock or its log. Raises `OutputTaken`."""
    companion = _companion(path, suffix)
    try:
        with _umask(0o077):
            if not os.path.lexists(path.parent):
                files.make_folder(path.parent, 0o700)
        if problem := _folder_problem(path.parent):
            raise OutputTaken(str(path), problem, _HINT)
        descriptor = files.open_for_writing(companion, os.O_RDWR | os.O_APPEND, files.SECRET)
    except OSError as error:
        raise _unusable(path if error.filename != str(companion) else companion, error) from None
    if not _is_private(descriptor):
        os.close(descriptor)
        raise OutputTaken(str(companion), "is another user's, or has a second name", _HINT)
    return open(descriptor, "a+", encoding="utf-8", errors="replace")


def _is_private(descriptor: int) -> bool:
    """Whether an open file is this user's and has no second name: in a shared folder anybody may hard-link to it."""
    status = os.fstat(descriptor)
    return status.st_uid == os.geteuid() and status.st_nlink == 1


def _companion(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _unusable(path: Path, error: OSError) -> OutputTaken:
    return OutputTaken(str(path), os_reason(error), _HINT)


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
