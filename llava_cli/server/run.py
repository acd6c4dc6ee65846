"""A server from its first socket to its last answer: `serve` loads a model and answers until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli import signals
from llava_cli.engine.remote.local_socket import listen
from llava_cli.errors import ModelUnusable
from llava_cli.paths import socket_path
from llava_cli.server.address import Address
from llava_cli.settings import LoadOptions, Settings

if TYPE_CHECKING:
    from llava_cli.server.service import Service

EXTRA = "pip install 'llava-cli[serve]'"
BACKLOG = 1024
"""Connections that the system holds until they are accepted; a client that finds no place retries after a second."""
ACCEPT_BATCH = 64
"""Connections accepted at a time. Between batches it is noticed which of them have left."""
IDLE_CHECK_SECONDS = 0.2


@dataclass(frozen=True)
class ServePolicy:
    """How many requests a server takes, and when it stops."""

    max_requests: int = 64
    idle_seconds: float | None = None
    """Stop after this long without a request; None for never."""
    drain_seconds: float = 30.0
    """How long requests may take to finish after the server was told to stop."""
    allow_urls: bool = False
    """Whether images may be public URLs."""


def serve(
    settings: Settings,
    address: Address,
    policy: ServePolicy,
    on_ready: Callable[[dict[str, Any]], None],
    hint: Callable[[str], None],
) -> None:
    """Loads the model and serves it until a signal or idleness stops it; `on_ready` gets the `server_info`.

    `hint` gets a line where `auto` takes fewer bits than are best here.

    Raises `UsageError`, `OutputTaken`, what loading a model raises, and `DeviceLost` once its answers are sent.
    """
    _check_dependencies()
    address.check()
    with _sockets(socket_path(), address) as sockets:
        address = replace(address, port=sockets[1].getsockname()[1])  # it may have been 0
        from llava_cli.loader import engine_identity, load_engine
        from llava_cli.server.app import make_app
        from llava_cli.server.generation import GenerationService
        from llava_cli.server.guard import Guard
        from llava_cli.server.service import Service

        identity = engine_identity(settings.load)  # before loading: files that change later are not what is served
        generation = GenerationService(load_engine(settings.load, hint=hint))
        service = Service(generation, settings, policy.max_requests, policy.allow_urls)
        server_info = partial(_server_info, service, address, settings.load, identity)
        hosts = {"localhost", address.host.strip("[]"), socket.gethostname(), *address.hosts}
        app = Guard(make_app(service, server_info), address.key, hosts, address.origins)
        gc.freeze()  # all these objects stay; traversing them would stop everybody for 0.3 s
        try:
            asyncio.run(_run(app, sockets, service, policy, lambda: on_ready(server_info())))
        finally:
            service.close()
        if generation.device_lost:
            raise generation.device_lost


def _check_dependencies() -> None:
    """Raises `ModelUnusable` if the `serve` extra is not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ModelUnusable("llava serve", f"needs an extra ({error.name} is missing)", EXTRA) from None


@contextmanager
def _sockets(path: Path, address: Address) -> Iterator[list[socket.socket]]:
    """The Unix socket and the TCP socket, taken before the model is loaded."""
    with listen(path) as unix_socket, closing(address.listen()) as tcp_socket:
        yield [unix_socket, tcp_socket]


def _server_info(service: Service, address: Address, options: LoadOptions, identity: dict[str, Any]) -> dict[str, Any]:
    """The response to GET /llava, by which commands see whether the server's answers are those they would give."""
    from llava_cli.hardware.device import choose_plan

    engine = service.generation.engine
    auto = choose_plan("auto", "auto")
    return {
        **identity,
        "precisions": [options.precision, engine.precision, *(["auto"] * (engine.precision == auto.precision))],
        "devices": [options.device, engine.device, *(["auto"] * (engine.device == auto.device))],
        "precision": engine.precision,
        "device": engine.device,
        "family": engine.family.name if engine.family else None,
        "context": engine.context,
        "memory": engine.peak_memory(),
        "pid": os.getpid(),
        "url": address.url,
        "running": service.running,
        "seconds": round(time.monotonic() - service.started, 1),
    }


async def _run(
    app: Any, sockets: list[socket.socket], service: Service, policy: ServePolicy, on_ready: Callable[[], None]
) -> None:
    """Runs uvicorn until a signal or idleness stops it. A second signal does not wait for the last answers."""
    import uvicorn

    from llava_cli.server.connection import Connection

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for listener in sockets or ():
                listener.listen(BACKLOG)
            on_ready()

        @contextmanager
        def capture_signals(self) -> Iterator[None]:  # uvicorn's would raise the signal again after a clean stop
            yield

    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",  # an upgrade would bypass `Connection` and `Guard` if a WebSocket library is installed
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(policy.drain_seconds)),
        timeout_keep_alive=75,
        backlog=ACCEPT_BATCH,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # clients' mistakes would fill a log
    logging.getLogger("uvicorn.error").addFilter(_is_worth_logging)
    server = Server(config)

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = service.is_stopping = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        if not signals.is_ignored(number):
            loop.add_signal_handler(number, stop)
    service.generation.on_device_lost = partial(loop.call_soon_threadsafe, stop)

    async def stop_when_idle(seconds: float) -> None:
        while service.running or time.monotonic() - service.last_request <= seconds:
            await asyncio.sleep(IDLE_CHECK_SECONDS)
        stop()

    idle_check = asyncio.ensure_future(stop_when_idle(policy.idle_seconds)) if policy.idle_seconds else None
    try:
        await server.serve(sockets)
    finally:
        if idle_check:
            idle_check.cancel()


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """False for answers that the shutdown has canceled."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
