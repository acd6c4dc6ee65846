"""`llava prompt`: prints the exact prompt, without loading the weights."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from llava_cli import render
from llava_cli.cli import app
from llava_cli.cli.options import (
    PICTURES,
    ClipboardOpt,
    JsonOpt,
    PicturesAndQuestion,
    QuietOpt,
    ScreenOpt,
    TruncatedOpt,
    with_options,
)
from llava_cli.cli.saved_prompt import ParamOpt, PromptOpt, conversation_about
from llava_cli.errors import UsageError

DiffOpt = Annotated[bool, typer.Option("--diff", help="Compare the checkpoint's own format with that of its training.")]
IdsOpt = Annotated[bool, typer.Option("--ids", help="Print the tokens' ids instead of the text.")]
ViewOpt = Annotated[
    Path | None, typer.Option("--save-view", metavar="FILE", help="Write the pictures there as the model sees them.")
]


@app.command()
@with_options("model", "adapter", "template", "fit", "visual_tokens", *PICTURES, "system")
def prompt(
    context: typer.Context,
    args: PicturesAndQuestion = None,
    clipboard: ClipboardOpt = False,
    screen: ScreenOpt = False,
    name: PromptOpt = None,
    parameters: ParamOpt = None,
    allow_truncated: TruncatedOpt = False,
    diff: DiffOpt = False,
    ids: IdsOpt = False,
    save_view: ViewOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Print the exact prompt that `ask` would give the model, and count its tokens.

    llava prompt img.jpg "what is this?"

    llava prompt img.jpg "what is this?" --save-view view.png

    llava prompt "what is this?" --diff -m llava-1.5-7b

    llava prompt img.jpg "what is this?" --ids

    llava prompt img.jpg -t caption -P lang=German
    """
    if diff and ids:
        raise UsageError("--ids", "--diff compares texts", "llava prompt --ids --template native prints one format's")
    settings, conversation = conversation_about(
        context,
        args,
        name,
        parameters,
        allow_truncated=allow_truncated,
        quiet=quiet,
        clipboard=clipboard,
        screen=screen,
    )
    with render.spinner("loading the tokenizer", quiet):
        from llava_cli.loader import load_prompter

        options = replace(settings.load, template="hub") if diff else settings.load
        prompter = load_prompter(options)
    if diff:
        prompts = {name: prompter.with_template(name).render(conversation) for name in ("hub", "native")}
        show_difference(prompts, json)
        return
    inputs = prompter.encode(conversation)
    text, (tokens, image_tokens) = prompter.render(conversation), prompter.count(inputs)
    numbers = inputs["input_ids"][0].tolist()
    pieces = [str(piece) for piece in prompter.tokenizer.convert_ids_to_tokens(numbers)]
    if save_view:
        from llava_cli.prompts.preview import draw_model_view, save_picture

        save_picture(draw_model_view(inputs, prompter.processor.image_processor), save_view)
    if json:
        found = {"prompt": text, "tokens": tokens, "image_tokens": image_tokens}
        render.show_json(found | {"ids": numbers, "pieces": pieces})
        return
    if ids:
        show_ids(numbers, pieces, prompter.image_token_id)
    else:
        render.say(text)
    if not quiet:
        render.note_picture_count(prompter.family, conversation)
        render.note(f"{tokens} tokens, {image_tokens} of them for {len(conversation.pictures)} picture(s)")


def show_ids(ids: list[int], pieces: list[str], image_token_id: int) -> None:
    """Prints the ids of a prompt: in a pipe in one line; on a terminal with their pieces, a picture's in one row."""
    if not sys.stdout.isatty():
        render.say(" ".join(map(str, ids)))
        return
    rows, position = [], 0
    for (number, piece), run in groupby(zip(ids, pieces, strict=True)):
        length = len(list(run))
        if number == image_token_id and length > 1:
            rows.append((f"{position}-{position + length - 1}", str(number), f"{piece} x {length}"))
        else:
            rows += [(str(position + i), str(number), piece) for i in range(length)]
        position += length
    render.table(("position", "id", "piece"), rows)


def show_difference(prompts: dict[str, str], as_json: bool) -> None:
    """Prints two prompts as one text: `[-only in the first-]{+only in the second+}`."""
    (first, one), (second, two) = prompts.items()
    if as_json:
        render.show_json({**prompts, "same": one == two})
        return
    parts = []
    before, after = (re.findall(r"\w+|\W", text) for text in (one, two))
    for tag, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        old, new = "".join(before[a:b]), "".join(after[c:d])
        parts.append(old if tag == "equal" else (f"[-{old}-]" if old else "") + (f"{{+{new}+}}" if new else ""))
    render.say("".join(parts))
    render.note(f"{first} and {second} are the same" if one == two else f"[-only in {first}-] {{+only in {second}+}}")
