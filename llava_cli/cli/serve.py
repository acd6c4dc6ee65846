"""`llava serve`: keeps a model loaded, for our own commands and for OpenAI's clients."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llava_cli import render
from llava_cli.cli import app
from llava_cli.cli.options import LOADING, JsonOpt, QuietOpt, settings_of, with_options
from llava_cli.errors import UsageError
from llava_cli.paths import socket_path

HostOpt = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on for clients.")]
PortOpt = Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port to listen on.")]
AllowHostOpt = Annotated[
    list[str] | None, typer.Option("--allow-host", metavar="NAME", help="One more host name to serve; repeatable.")
]
AllowOriginOpt = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", metavar="URL", help="A web page that may send requests; repeatable."),
]
AllowUrlsOpt = Annotated[
    bool, typer.Option("--allow-urls", help="Fetch pictures that requests name, from public addresses.")
]
QueueOpt = Annotated[int, typer.Option("--queue", metavar="N", min=1, help="Requests at a time; more are refused.")]
IdleOpt = Annotated[
    str | None, typer.Option("--idle", metavar="TIME", help="Stop after so long without a request: 90s, 10m, 2h.")
]
DrainOpt = Annotated[str, typer.Option("--drain", metavar="TIME", help="How long to finish answers when it stops.")]
DetachOpt = Annotated[bool, typer.Option("--detach", help="Run in the background once the model is loaded.")]
StatusOpt = Annotated[bool, typer.Option("--status", help="Say which model is being served.")]
StopOpt = Annotated[bool, typer.Option("--stop", help="Stop the server, once its answers are complete.")]


@app.command()
@with_options(*LOADING, "max_tokens", "temperature", "top_p", "system")
def serve(
    context: typer.Context,
    host: HostOpt = "127.0.0.1",
    port: PortOpt = 8000,
    allow_host: AllowHostOpt = None,
    allow_origin: AllowOriginOpt = None,
    allow_urls: AllowUrlsOpt = False,
    queue: QueueOpt = 64,
    idle: IdleOpt = None,
    drain: DrainOpt = "30s",
    detach: DetachOpt = False,
    status: StatusOpt = False,
    end: StopOpt = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Keep one model loaded, and answer OpenAI's clients.

    llava serve --detach

    llava serve -m llava-1.5-7b -p 4bit --idle 10m

    curl http://127.0.0.1:8000/v1/models
    """
    from llava_cli.engine.remote import local_socket
    from llava_cli.hardware.allocator import limit_caches
    from llava_cli.server import background
    from llava_cli.server.address import Address
    from llava_cli.server.run import ServePolicy
    from llava_cli.server.run import serve as run_server

    if status or end:
        info = background.stop(_seconds("--drain", drain) + 5) if end else local_socket.server_info()
        if json:
            render.show_json(info)
        elif info:
            render.say(f"stopped: {_line(info)}" if end else _line(info))
        elif pid := local_socket.silent_server(socket_path()):
            render.say(f"a server begins or ends (pid {pid})")
        else:
            render.say("no server is running")
        if info is None and status:
            raise typer.Exit(1)
        return
    settings = settings_of(context)
    idle_seconds = None if idle is None else _seconds("--idle", idle)
    policy = ServePolicy(queue, idle_seconds, _seconds("--drain", drain), allow_urls)
    address = Address(host, port, settings.remote.api_key, tuple(allow_host or ()), tuple(allow_origin or ()))
    address.check()
    if detach:
        arguments = [word for word in sys.argv[2:] if word != "--detach"]
        with render.spinner("loading the model", quiet):
            info = background.start(arguments)
        render.say(_line(info))
        return
    limit_caches(primitives=128)
    note = render.notes(quiet)
    run_server(settings, address, policy, lambda info: note(_line(info)), note)


def _line(info: dict[str, object]) -> str:
    return f"{info['model']} {info['precision']} {info['device']} on {info['url']} (pid {info['pid']})"


def _seconds(option: str, text: str) -> float:
    """The seconds in "90s", "10m", "2h" or a number. Raises `UsageError`."""
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1
    if not 0 < seconds < 1e9:
        raise UsageError(option, f"{text!r} is no time", f"llava serve {option} 10m")
    return seconds
