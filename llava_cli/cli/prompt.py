"""`llava prompt`: the exact prompt, no weights loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from llava_cli import render
from llava_cli.cli import app
from llava_cli.cli.arguments import conversation_from
from llava_cli.cli.options import (
    AdapterOpt,
    FitOpt,
    JsonOpt,
    ModelOpt,
    PicturesAndQuestion,
    QuietOpt,
    SystemOpt,
    TemplateOpt,
    TruncatedOpt,
    VisualOpt,
    settings_of,
)

DiffOpt = Annotated[bool, typer.Option("--diff", help="Compare the checkpoint's own format with that of its training.")]
ViewOpt = Annotated[
    Path | None, typer.Option("--save-view", metavar="FILE", help="Write the pictures there as the model sees them.")
]


@app.command()
def prompt(
    context: typer.Context,
    args: PicturesAndQuestion = None,
    model: ModelOpt = None,
    adapter: AdapterOpt = None,
    system: SystemOpt = None,
    template: TemplateOpt = None,
    fit: FitOpt = None,
    visual_tokens: VisualOpt = None,
    allow_truncated: TruncatedOpt = False,
    diff: DiffOpt = False,
    save_view: ViewOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Print the exact prompt that `ask` would give the model, and count its tokens.

    llava prompt img.jpg "what is this?"

    llava prompt img.jpg "what is this?" --save-view view.png

    llava prompt "what is this?" --diff -m llava-1.5-7b
    """
    settings = settings_of(context)
    conversation = conversation_from(args, settings, allow_truncated, quiet)
    with render.spinner("loading the tokenizer", quiet):
        from llava_cli.loader import load_prompter

        names = ("hub", "native") if diff else (settings.template,)
        prompters = {name: load_prompter(replace(settings, template=name)) for name in names}
    if diff:
        render.show_difference({str(name): one.render(conversation) for name, one in prompters.items()}, json)
        return
    prompter = prompters[settings.template]
    inputs = prompter.encode(conversation)
    text, (tokens, image_tokens) = prompter.render(conversation), prompter.count(inputs)
    if save_view:
        from llava_cli.prompts.preview import as_seen

        render.save_picture(as_seen(inputs, prompter.processor.image_processor), save_view)
    if json:
        render.show_json({"prompt": text, "tokens": tokens, "image_tokens": image_tokens})
        return
    render.say(text)
    if not quiet:
        render.say_pictures(prompter.family, conversation)
        render.note(f"{tokens} tokens, {image_tokens} of them for {len(conversation.pictures)} picture(s)")
