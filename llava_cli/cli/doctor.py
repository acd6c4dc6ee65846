"""`llava doctor`: what this machine can run, and whether a checkpoint is right on it."""

from __future__ import annotations

from typing import Annotated

import typer

from llava_cli import render
from llava_cli.cli import app
from llava_cli.cli.options import JsonOpt, settings_of, with_options
from llava_cli.errors import ModelUnusable

NameArg = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="A name, Hub repo or folder to load and check.", show_default=False),
]


@app.command()
@with_options("adapter", "precision", "double_quant", "device", "attention")
def doctor(
    context: typer.Context,
    model: NameArg = None,
    json: JsonOpt = False,
) -> None:
    """Show device and memory, and the precision that would be chosen and why; with MODEL, load and check that.

    llava doctor

    llava doctor llava-1.5-7b -p 4bit

    A model's template is rendered, its image tokens are counted against its features, its precision is looked at,
    its logits are compared with transformers' own, and it gives one answer. Exit code 69 where one of these fails.
    """
    settings = settings_of(context)
    if model is not None:
        from llava_cli.diagnostics import checkup

        if not render.show_checks(checkup(settings.load), json):
            raise typer.Exit(ModelUnusable.exit_code)
        return
    from llava_cli.diagnostics import machine_facts

    with render.spinner("looking at this machine"):
        facts = machine_facts(settings.load)
    if json:
        render.show_json(facts)
    else:
        render.table(["", ""], [[name, value] for name, value in facts.items()])
