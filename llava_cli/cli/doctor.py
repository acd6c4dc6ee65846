"""`llava doctor`: what this machine can run."""

from __future__ import annotations

from llava_cli import render
from llava_cli.cli import app
from llava_cli.cli.options import DeviceOpt, JsonOpt, PrecisionOpt
from llava_cli.settings import Settings


@app.command()
def doctor(device: DeviceOpt = None, precision: PrecisionOpt = None, json: JsonOpt = False) -> None:
    """Show device and memory, and the precision that would be chosen and why."""
    from llava_cli.machine import report

    settings = Settings.resolve(device=device, precision=precision)
    with render.spinner("looking at this machine"):
        found = report(settings)
    if json:
        render.show_json(found)
    else:
        render.table(["", ""], [[name, str(value)] for name, value in found.items()])
