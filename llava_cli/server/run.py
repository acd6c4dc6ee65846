"""A server from its first socket to its last answer."""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from llava_cli import limits, processes, signals
from llava_cli.engine.remote.local_socket import (
    SocketConnection,
    check_free,
    in_between,
    is_ours,
    listening,
    open_beside,
    socket_path,
    status,
    status_over,
)
from llava_cli.errors import LlavaError, ModelUnusable, OutputTaken, UsageError
from llava_cli.settings import Settings

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", re.ASCII)
EXTRA = "pip install 'llava-cli[serve]'"
BACKLOG = 1024
"""Connections that wait to be taken: who finds no place among them tries again only after a second."""
BEAT = 0.2
"""Seconds between two looks at whether there is still something to do."""


@dataclass(frozen=True)
class Address:
    """Where a server listens, and for whom."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `UsageError` where strangers could ask without a key, or for an origin that no page has of its own."""
        if not self.key and not _is_loopback(self.host):
            raise UsageError(
                f"--host {self.host}", "others can reach it, so a key is needed", "LLAVA_API_KEY=… sets one"
            )
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                hint = "llava serve --allow-origin https://example.com"
                raise UsageError(f"--allow-origin {origin}", "no page has this origin, or any page may", hint)

    def listen(self) -> socket.socket:
        """A TCP socket. Raises `OutputTaken` where it cannot be had."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        # With the protocol, by which asyncio sees that it may send small pieces at once: others wait 40 ms.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self.host, self.port))
            listening.listen(128)
        except OSError as error:
            listening.close()
            which = "--port N" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host 127.0.0.1"
            raise OutputTaken(self.url, error.strerror or str(error), f"llava serve {which}") from None
        return listening

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"


@dataclass(frozen=True)
class Terms:
    """How a server goes about it: who may wait, when it stops."""

    queue: int = 64
    """Requests in hand at a time."""
    idle: float | None = None
    """Seconds without a request after which it stops."""
    drain: float = 30.0
    """Seconds that the answers in hand have once it is to stop."""
    remote: bool = False
    """Whether requests may name pictures by public URLs."""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(settings: Settings, address: Address, terms: Terms, ready: Callable[[dict[str, Any]], None]) -> None:
    """Loads the model and serves it until it is told to stop; `ready` gets what it says of itself once it answers."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ModelUnusable("llava serve", f"needs an extra ({error.name} is missing)", EXTRA) from None
    address.check()
    path = socket_path()
    with _sockets(path, address) as sockets:
        address = replace(address, port=sockets[1].getsockname()[1])  # 0 was any that is free
        from llava_cli.engine.generate.live import Live
        from llava_cli.loader import load_engine, wanted
        from llava_cli.server.app import Service, make_app
        from llava_cli.server.guard import Guard

        held = wanted(settings)  # before it is loaded: files that change afterwards are not what is served
        live = Live(load_engine(settings))
        service = Service(live, settings, terms.queue, terms.remote)
        app = make_app(service, said := partial(_said, service, address, settings, held))
        hosts = {"localhost", address.host.strip("[]"), socket.gethostname(), *address.hosts}
        guarded = Guard(app, address.key, hosts, address.origins)
        gc.freeze()  # looking for garbage among all these objects, which stay, would keep everybody waiting for 0.3 s
        try:
            asyncio.run(_until_told(guarded, sockets, service, terms, lambda: ready(said())))
        finally:
            service.pictures.close()


@contextmanager
def _sockets(path: Path, address: Address) -> Iterator[list[socket.socket]]:
    """Both sockets, taken before the model is loaded."""
    with listening(path) as own, closing(address.listen()) as outside:
        yield [own, outside]


def _said(service: Any, address: Address, settings: Settings, held: dict[str, Any]) -> dict[str, Any]:
    """What our own commands ask to know: who it is, and whether its answers are those that they would give."""
    from llava_cli.hardware.device import plan

    engine = service.live.engine
    auto = plan("auto", "auto")
    return {
        **held,
        "precisions": [settings.precision, engine.precision, *(["auto"] * (engine.precision == auto.precision))],
        "devices": [settings.device, engine.device, *(["auto"] * (engine.device == auto.device))],
        "precision": engine.precision,
        "device": engine.device,
        "family": engine.family.name if engine.family else None,
        "context": engine.context,
        "memory": engine.peak_memory(),
        "pid": os.getpid(),
        "url": address.url,
        "running": service.busy,
        "seconds": round(time.monotonic() - service.began, 1),
    }


async def _until_told(
    app: Any, sockets: list[socket.socket], service: Any, terms: Terms, ready: Callable[[], None]
) -> None:
    import uvicorn

    from llava_cli.server.connection import Connection

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for one in sockets or ():
                one.listen(BACKLOG)
            ready()

        @contextmanager
        def capture_signals(self) -> Iterator[None]:  # ours below: to stop when told is no failure
            yield

    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",  # or an upgrade would lead past `Connection` and `Guard`, where a library for it is installed
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(terms.drain)),
        timeout_keep_alive=75,
        backlog=64,  # taken at a time: before the next ones, it is seen which of them have left
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what clients do wrong would fill a log
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    server = Server(config)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.force_exit = server.should_exit  # told twice: at once
        server.should_exit = service.draining = True

    for number in (signal.SIGINT, signal.SIGTERM):
        if not signals.is_ignored(number):
            loop.add_signal_handler(number, stop)

    async def idle() -> None:
        while not (terms.idle and not service.busy and time.monotonic() - service.last > terms.idle):
            await asyncio.sleep(BEAT)
        stop()

    watching = asyncio.ensure_future(idle())
    try:
        await server.serve(sockets)
    finally:
        watching.cancel()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a failure is more than an answer that was broken off in the end."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def detach(words: list[str]) -> dict[str, Any]:
    """Starts `llava serve` with these words as a process of its own; what it says of itself once it answers."""
    path = socket_path()
    check_free(path)
    with open_beside(path, "log") as log:
        log.truncate(0)
        process = subprocess.Popen(
            processes.command("serve", *words),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        while process.poll() is None:
            if (said := status(path)) and said["pid"] == process.pid:
                return said
            time.sleep(BEAT)
        log.seek(0)
        raise Failed(process.returncode, log.read())


class Failed(LlavaError):
    """A detached server that ended before it answered: with its code, and its words."""

    def __init__(self, code: int, words: str) -> None:
        line, _, rest = words.strip().rpartition("llava: ")[2].partition("\n")
        thing, _, reason = line.partition(": ")
        super().__init__(thing or "llava serve", reason or "ended at once", rest.strip())
        self.exit_code = code


def stop(patience: float) -> dict[str, Any] | None:
    """Tells the server to stop and waits until it has; what it said of itself, None where there was none.

    Raises `OutputTaken` where it goes on, or where which process it is cannot be made sure of.
    """
    path = socket_path()
    if (found := _server(path)) is None:
        if pid := in_between(path):
            raise OutputTaken(f"pid {pid}", "is beginning, or finishes its answers", f"kill {pid}")
        return None
    said, process = found
    with closing(process):
        process.signal(signal.SIGTERM)
        until = time.monotonic() + patience
        while process.is_alive() and path.exists():
            if time.monotonic() > until:
                reason = "has not stopped yet; its answers go on"
                raise OutputTaken(f"pid {process.pid}", reason, f"kill {process.pid}")
            time.sleep(BEAT)
    return said


def _server(path: Path) -> tuple[dict[str, Any], Process] | None:
    """What the server at a socket says of itself, and its process, which the system names and not the server.

    Raises `OutputTaken` where the two do not agree.
    """
    if not is_ours(path):
        return None
    with suppress(OSError), closing(SocketConnection(path, limits.STATUS_SECONDS)) as connection:
        connection.connect()
        pid = connection.peer.process or 0
        process = Process(pid) if pid > 1 else None
        said = status_over(connection)  # asked now: it lives, so `process` is not a later one of its number
        if said and process and said["pid"] == pid:
            return said, process
        if process:
            process.close()
        if said:
            reason = f"its server says that it is process {said['pid']}, which the system does not say"
            raise OutputTaken(str(path), reason, "end it where it was started")
    return None


class Process:
    """A process of this user's, held by a handle where the system has those, so that no later one of its number is."""

    def __init__(self, pid: int) -> None:
        """Raises `ProcessLookupError` where there is none."""
        self.pid = pid
        self._handle: int | None = None
        if sys.platform == "linux":
            try:
                self._handle = os.pidfd_open(pid)
            except ProcessLookupError:
                raise
            except OSError:  # a kernel before 5.3, or a container that forbids it
                pass

    def signal(self, number: int) -> bool:
        """Whether it was still there to get the signal."""
        try:
            if sys.platform == "linux" and self._handle is not None:
                signal.pidfd_send_signal(self._handle, number)
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def is_alive(self) -> bool:
        return self.signal(0)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
