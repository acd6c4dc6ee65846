"""`llava serve`: a model that stays warm, for our own commands and for OpenAI's clients."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llava_cli import render
from llava_cli.cli import app
from llava_cli.cli.options import (
    AdapterOpt,
    DeviceOpt,
    DoubleOpt,
    FitOpt,
    JsonOpt,
    MaxTokensOpt,
    ModelOpt,
    PrecisionOpt,
    QuietOpt,
    SystemOpt,
    TemperatureOpt,
    TemplateOpt,
    TopPOpt,
    VisualOpt,
    settings_of,
)
from llava_cli.errors import UsageError

HostOpt = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where OpenAI's clients find it.")]
PortOpt = Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="And at which port.")]
AllowHostOpt = Annotated[
    list[str] | None, typer.Option("--allow-host", metavar="NAME", help="A name that it is reached by; repeatable.")
]
AllowOriginOpt = Annotated[
    list[str] | None, typer.Option("--allow-origin", metavar="URL", help="A web page that may ask; repeatable.")
]
AllowUrlsOpt = Annotated[
    bool, typer.Option("--allow-urls", help="Fetch pictures that requests name, from public addresses.")
]
QueueOpt = Annotated[int, typer.Option("--queue", metavar="N", min=1, help="Requests in hand; more are sent away.")]
IdleOpt = Annotated[
    str | None, typer.Option("--idle", metavar="TIME", help="Stop after so long without a request: 90s, 10m, 2h.")
]
DrainOpt = Annotated[str, typer.Option("--drain", metavar="TIME", help="How long answers in hand have at the end.")]
DetachOpt = Annotated[bool, typer.Option("--detach", help="Go on in the background, once the model is loaded.")]
StatusOpt = Annotated[bool, typer.Option("--status", help="Say which model is being served.")]
StopOpt = Annotated[bool, typer.Option("--stop", help="Stop the server, once its answers are complete.")]


@app.command()
def serve(
    context: typer.Context,
    model: ModelOpt = None,
    adapter: AdapterOpt = None,
    precision: PrecisionOpt = None,
    double_quant: DoubleOpt = None,
    device: DeviceOpt = None,
    template: TemplateOpt = None,
    fit: FitOpt = None,
    visual_tokens: VisualOpt = None,
    max_tokens: MaxTokensOpt = None,
    temperature: TemperatureOpt = None,
    top_p: TopPOpt = None,
    system: SystemOpt = None,
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
    from llava_cli.hardware.memory import prepare_for_many
    from llava_cli.server import run

    if status or end:
        said = run.stop(_seconds("--drain", drain) + 5) if end else local_socket.status()
        if json:
            render.show_json(said)
        elif said:
            render.say(f"stopped: {_line(said)}" if end else _line(said))
        elif pid := local_socket.in_between(local_socket.socket_path()):
            render.say(f"a server begins or ends (pid {pid})")
        else:
            render.say("no server is running")
        if said is None and status:
            raise typer.Exit(1)
        return
    settings = settings_of(context)
    terms = run.Terms(queue, None if idle is None else _seconds("--idle", idle), _seconds("--drain", drain), allow_urls)
    address = run.Address(host, port, settings.api_key, tuple(allow_host or ()), tuple(allow_origin or ()))
    address.check()
    if detach:
        words = [word for word in sys.argv[2:] if word != "--detach"]
        with render.spinner("loading the model", quiet):
            said = run.detach(words)
        render.say(_line(said))
        return
    prepare_for_many(kernels=128)
    run.serve(settings, address, terms, lambda said: None if quiet else render.note(_line(said)))


def _line(said: dict[str, object]) -> str:
    return f"{said['model']} {said['precision']} {said['device']} on {said['url']} (pid {said['pid']})"


def _seconds(option: str, text: str) -> float:
    """ "90s", "10m", "2h", or seconds."""
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1
    if not 0 < seconds < 1e9:
        raise UsageError(option, f"{text!r} is no time", f"llava serve {option} 10m")
    return seconds
