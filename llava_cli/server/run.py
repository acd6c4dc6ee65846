"""A server from its first socket to its last answer."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import shlex
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

from llava_cli import signals
from llava_cli.errors import LlavaError, ModelUnusable, OutputTaken, UsageError
from llava_cli.place import check_free, in_between, listening, open_beside, socket_path, status
from llava_cli.settings import Settings

EXTRA = "pip install 'llava-cli[serve]'"
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
        """Raises `UsageError` where strangers could ask without a key."""
        if not self.key and not _is_loopback(self.host):
            raise UsageError(
                f"--host {self.host}", "others can reach it, so a key is needed", "LLAVA_API_KEY=… sets one"
            )

    def listen(self) -> socket.socket:
        """A TCP socket. Raises `OutputTaken` where it cannot be had."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
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
        from llava_cli.engine.live import Live
        from llava_cli.loader import load_engine, wanted
        from llava_cli.server.app import Service, make_app
        from llava_cli.server.guard import Guard

        held = wanted(settings)  # before it is loaded: files that change afterwards are not what is served
        live = Live(load_engine(settings))
        service = Service(live, settings, terms.queue, terms.remote)
        app = make_app(service, said := partial(_said, service, address, settings, held))
        hosts = {"localhost", address.host.strip("[]"), socket.gethostname(), *address.hosts}
        guarded = Guard(app, address.key, hosts, address.origins)
        try:
            asyncio.run(_until_told(guarded, sockets, service, terms, lambda: ready(said())))
        finally:
            service.sandboxes.close()
    if live.running:  # though nobody hears it any more, and ending torch in the midst of it would abort
        os._exit(0)


@contextmanager
def _sockets(path: Path, address: Address) -> Iterator[list[socket.socket]]:
    """Both sockets, taken before the model is loaded."""
    with listening(path) as own, closing(address.listen()) as outside:
        yield [own, outside]


def _said(service: Any, address: Address, settings: Settings, held: dict[str, Any]) -> dict[str, Any]:
    """What our own commands ask to know: who it is, and whether its answers are those that they would give."""
    from llava_cli.machine import plan

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
            ready()

        @contextmanager
        def capture_signals(self) -> Iterator[None]:  # ours below: to stop when told is no failure
            yield

    config = uvicorn.Config(
        app,
        http=Connection,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(terms.drain)),
        timeout_keep_alive=75,
    )
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
            [sys.executable, "-m", "llava_cli", "serve", *words],
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
    """Tells the server to stop and waits until it has; what it said of itself, None where there was none."""
    path = socket_path()
    if (said := status(path)) is None:
        if pid := in_between(path):
            raise OutputTaken(f"pid {pid}", "is beginning, or finishes its answers", f"kill {shlex.quote(pid)}")
        return None
    with suppress(ProcessLookupError):
        os.kill(said["pid"], signal.SIGTERM)
    until = time.monotonic() + patience
    while _is_alive(said["pid"]) and path.exists():
        if time.monotonic() > until:
            hint = f"kill {shlex.quote(str(said['pid']))}"
            raise OutputTaken(f"pid {said['pid']}", "has not stopped yet; its answers go on", hint)
        time.sleep(BEAT)
    return said


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
