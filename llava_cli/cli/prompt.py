"""`llava prompt`: the exact prompt, no weights loaded."""

from __future__ import annotations

import typer

from llava_cli import render
from llava_cli.cli import app
from llava_cli.cli.arguments import conversation_from
from llava_cli.cli.options import (
    FitOpt,
    JsonOpt,
    ModelOpt,
    PicturesAndQuestion,
    QuietOpt,
    SystemOpt,
    TemplateOpt,
    TruncatedOpt,
    settings_of,
)


@app.command()
def prompt(
    context: typer.Context,
    args: PicturesAndQuestion = None,
    model: ModelOpt = None,
    system: SystemOpt = None,
    template: TemplateOpt = None,
    fit: FitOpt = None,
    allow_truncated: TruncatedOpt = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Print the exact prompt that `ask` would give the model, and count its tokens.

    llava prompt img.jpg "what is this?"
    """
    settings = settings_of(context)
    conversation = conversation_from(args, settings, allow_truncated, quiet)
    with render.spinner("loading the tokenizer", quiet):
        from llava_cli.loader import load_prompter

        prompter = load_prompter(settings)
    text, (tokens, image_tokens) = prompter.render(conversation), prompter.count(prompter.encode(conversation))
    if json:
        render.show_json({"prompt": text, "tokens": tokens, "image_tokens": image_tokens})
        return
    print(text)
    if not quiet:
        render.note(f"{tokens} tokens, {image_tokens} of them for {len(conversation.pictures)} picture(s)")
