"""`llava check`: is a statement about a picture true? The exit code says it."""

from __future__ import annotations

from typing import Annotated

import typer

from llava_cli import render
from llava_cli.checking import check_threshold
from llava_cli.cli import app
from llava_cli.cli.options import (
    LOADING,
    PICTURES,
    ClipboardOpt,
    JsonOpt,
    QuietOpt,
    ScreenOpt,
    TruncatedOpt,
    with_options,
)
from llava_cli.cli.saved_prompt import ParamOpt, PromptOpt, conversation_about, refuse_form
from llava_cli.conversation import naming_fewer_parts

USAGE = 'llava check page.png "the Save button is visible"'
EXIT_CODES = {"yes": 0, "no": 1, "unsure": 3}

PicturesAndStatement = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[IMAGE]... STATEMENT",
        help="Paths, http(s) URLs or - for stdin, then what is to be true (or a question with yes or no).",
        show_default=False,
    ),
]
AtLeastOpt = Annotated[
    float, typer.Option("--at-least", metavar="P", help="Be sure by this much: else the exit code is 3.")
]


@app.command()
@with_options(*LOADING, *PICTURES, "system", "server")
def check(
    context: typer.Context,
    args: PicturesAndStatement = None,
    threshold: AtLeastOpt = 0.5,
    clipboard: ClipboardOpt = False,
    screen: ScreenOpt = False,
    prompt: PromptOpt = None,
    parameters: ParamOpt = None,
    allow_truncated: TruncatedOpt = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Check whether a statement about pictures is true: exit code 0 yes, 1 no, 3 not sure enough.

    llava check page.png "the Save button is visible"

    llava check photo.jpg "nobody looks away" --at-least 0.9

    llava check page.png -t has-button -P name=Save

    llava check -q before.png after.png "both show the same room" && echo same

    The line on stdout has the probability that the statement is true; with --quiet there is none.
    """
    check_threshold(threshold)
    if prompt is not None:
        refuse_form(prompt, args or [])
    settings, conversation = conversation_about(
        context,
        args,
        prompt,
        parameters,
        allow_truncated=allow_truncated,
        quiet=quiet,
        words="STATEMENT",
        usage=USAGE,
        clipboard=clipboard,
        screen=screen,
    )
    with render.spinner("loading the model", quiet):
        from llava_cli.loader import open_engine

        engine = open_engine(settings, render.note, render.notes(quiet), conversation.pictures)
    if not quiet:
        render.note_demo_model(settings.load, engine.model)
        render.note_picture_count(engine.family, conversation)
    with naming_fewer_parts(conversation):
        checked = engine.check(conversation.pictures, conversation.turns[-1].question, threshold, settings.system)
    if json:
        render.show_json(checked.to_json())
    elif not quiet:
        render.say(f"{checked.verdict} ({checked.probability:.4f})")
    if not quiet and checked.answer_probability is not None:
        render.note_answer_probability(checked.answer_probability)
    if code := EXIT_CODES[checked.verdict]:
        raise typer.Exit(code)
