"""Where a user's server is: its socket, and what it says of itself. Light, for every command looks."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_cli.errors import OutputTaken

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


def listen(path: Path) -> socket.socket:
    """A socket of mode 0600 at `path`. Raises `OutputTaken` where a server has it, or it cannot be."""
    check_free(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # from the first moment on
    try:
        if not path.parent.exists():
            os.umask(0o077)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.umask(0o177)
        if is_ours(path):
            path.unlink()
        listening.bind(str(path))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise OutputTaken(str(path), error.strerror or str(error), "LLAVA_SOCKET=PATH names another one") from None
    finally:
        os.umask(before)
    return listening
