"""`llava ask`: one question, one answer."""

from __future__ import annotations

import typer

from llava_cli import render
from llava_cli.cli import app
from llava_cli.cli.options import (
    ANSWERING,
    FORM,
    PICTURES,
    ClipboardOpt,
    JsonOpt,
    PicturesAndQuestion,
    QuietOpt,
    ScreenOpt,
    StatsOpt,
    TruncatedOpt,
    with_options,
)
from llava_cli.cli.saved_prompt import ParamOpt, PromptOpt, conversation_about
from llava_cli.conversation import naming_fewer_parts
from llava_cli.errors import UsageError


@app.command()
@with_options(*ANSWERING, *FORM, *PICTURES)
def ask(
    context: typer.Context,
    args: PicturesAndQuestion = None,
    clipboard: ClipboardOpt = False,
    screen: ScreenOpt = False,
    prompt: PromptOpt = None,
    parameters: ParamOpt = None,
    allow_truncated: TruncatedOpt = False,
    json: JsonOpt = False,
    stats: StatsOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Answer one question about one or more pictures.

    llava ask img.jpg "what is this?"

    llava ask before.png after.png "what changed?"

    llava ask - "how many people are there?" < img.jpg

    llava ask --clipboard "what does this error mean?"

    llava ask invoice.pdf --pages 1-3 "what is the total?"

    llava ask img.jpg "how is the weather?" --choices sunny,cloudy,rain

    llava ask img.jpg -t caption -P lang=German

    llava ask bill.jpg "read this bill" --schema "shop, date, total float, items [name, price float]"
    """
    settings, conversation = conversation_about(
        context,
        args,
        prompt,
        parameters,
        allow_truncated=allow_truncated,
        quiet=quiet,
        clipboard=clipboard,
        screen=screen,
    )
    if settings.sampling.sight and not conversation.pictures:
        raise UsageError("--sight", "there is no picture", 'llava ask img.jpg "what is this?" --sight')
    with render.spinner("loading the model", quiet):
        from llava_cli.loader import open_engine

        engine = open_engine(settings, render.note, render.notes(quiet), conversation.pictures)
    if not quiet:
        render.note_demo_model(settings.load, engine.model)
        render.note_picture_count(engine.family, conversation)
    with naming_fewer_parts(conversation):
        if json:
            answer = engine.answer(conversation, settings.sampling)
            render.show_json(render.answer_object(answer, conversation, engine))
        else:
            answer = render.show(engine.stream(conversation, settings.sampling))
            render.note_details(answer, quiet)
    if answer.finish_reason == "length" and settings.sampling.grammar_option and not quiet:
        render.note(f"cut off after {answer.answer_tokens} tokens, so it is not complete; --max-tokens N allows more")
    if stats:
        render.note(render.stats(answer, engine))
