"""Starts `llava serve` in the background, and stops it."""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from llava_cli import limits, processes
from llava_cli.engine.remote.local_socket import (
    UnixHTTPConnection,
    check_free,
    is_trusted_socket,
    open_companion,
    read_server_info,
    server_info,
    silent_server,
)
from llava_cli.errors import LlavaError, OutputTaken
from llava_cli.paths import socket_path
from llava_cli.server.process_handle import ProcessHandle

_POLL_SECONDS = 0.2


class StartFailed(LlavaError):
    """A background server has ended before it could answer; the exit code and the message are its own."""

    def __init__(self, exit_code: int, log: str) -> None:
        line, _, hint = log.strip().rpartition("llava: ")[2].partition("\n")
        thing, _, reason = line.partition(": ")
        super().__init__(thing or "llava serve", reason or "ended at once", hint.strip())
        self.exit_code = exit_code


def start(arguments: list[str]) -> dict[str, Any]:
    """Runs `llava serve` with these arguments as a process of its own; returns its `server_info` once it answers.

    Raises `OutputTaken` if there is a server already, and `StartFailed`.
    """
    path = socket_path()
    check_free(path)
    with open_companion(path, "log") as log:
        log.truncate(0)
        process = subprocess.Popen(
            processes.command("serve", *arguments),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        while process.poll() is None:
            if (info := server_info(path)) and info["pid"] == process.pid:
                return info
            time.sleep(_POLL_SECONDS)
        log.seek(0)
        raise StartFailed(process.returncode, log.read())


def stop(timeout: float) -> dict[str, Any] | None:
    """Sends the server SIGTERM and waits until it has ended; returns its last `server_info`, None if there was none.

    Raises `OutputTaken` if it does not end in `timeout` seconds, or if it is not certain which process it is.
    """
    path = socket_path()
    if (server := _running_server(path)) is None:
        if pid := silent_server(path):
            raise OutputTaken(f"pid {pid}", "is beginning, or finishes its answers", f"kill {pid}")
        return None
    info, process = server
    with closing(process):
        process.signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout
        while process.is_alive() and path.exists():
            if time.monotonic() > deadline:
                reason = "has not stopped yet; its answers go on"
                raise OutputTaken(f"pid {process.pid}", reason, f"kill {process.pid}")
            time.sleep(_POLL_SECONDS)
    return info


def _running_server(path: Path) -> tuple[dict[str, Any], ProcessHandle] | None:
    """The `server_info` of the server at a socket, and its process as the system names it.

    Raises `OutputTaken` if the server gives another pid than the system.
    """
    if not is_trusted_socket(path):
        return None
    with suppress(OSError), closing(UnixHTTPConnection(path, limits.STATUS_SECONDS)) as connection:
        connection.connect()
        pid = connection.peer.pid or 0
        process = ProcessHandle(pid) if pid > 1 else None
        info = read_server_info(connection)  # after `process`: it answers, so no later process has taken over its pid
        if info and process and info["pid"] == pid:
            return info, process
        if process:
            process.close()
        if info:
            reason = f"its server says that it is process {info['pid']}, which the system does not say"
            raise OutputTaken(str(path), reason, "end it where it was started")
    return None
