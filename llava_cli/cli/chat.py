"""`llava chat`: a conversation about pictures."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from typing import Annotated

import typer

from llava_cli import render, signals
from llava_cli.cli import app
from llava_cli.cli.arguments import open_named
from llava_cli.cli.options import ANSWERING, FORM, PICTURES, QuietOpt, StatsOpt, TruncatedOpt, settings_of, with_options
from llava_cli.cli.saved_prompt import ParamOpt, PromptOpt, named_question
from llava_cli.conversation import Conversation
from llava_cli.errors import UsageError
from llava_cli.untrusted_text import one_line

Images = Annotated[
    list[str] | None,
    typer.Argument(metavar="[IMAGE]...", help="Pictures for the first question: paths or URLs.", show_default=False),
]
ContinueOpt = Annotated[bool, typer.Option("--continue", help="Go on with the last chat.")]
ResumeOpt = Annotated[
    int | None, typer.Option("--resume", metavar="N", help="Go on with chat N; `llava chats` lists them.")
]
NoSaveOpt = Annotated[bool, typer.Option("--no-save", help="Keep nothing of this chat, nor of what is typed.")]
PlainOpt = Annotated[bool, typer.Option("--plain", help="Draw nothing, redraw nothing: for screen readers.")]
NoPreviewOpt = Annotated[bool, typer.Option("--no-preview", help="No thumbnails of attached pictures.")]


@app.command()
@with_options(*ANSWERING, *FORM, *PICTURES)
def chat(
    images: Images = None,
    continue_: ContinueOpt = False,
    resume: ResumeOpt = None,
    no_save: NoSaveOpt = False,
    plain: PlainOpt = False,
    no_preview: NoPreviewOpt = False,
    *,
    context: typer.Context,
    prompt: PromptOpt = None,
    parameters: ParamOpt = None,
    allow_truncated: TruncatedOpt = False,
    stats: StatsOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Talk about pictures; /help lists what can be done besides asking.

    llava chat img.jpg

    llava chat --continue

    llava chat img.jpg -t caption -P lang=German

    printf 'what is this?\\nwhat color is it?\\n' | llava chat img.jpg
    """
    named = named_question(context, prompt, parameters, None)
    settings = settings_of(context)
    from llava_cli.chat.repl import answer_lines, ask_first, converse, piped_lines
    from llava_cli.chat.session import Chat
    from llava_cli.chat.store import DataFolderUnusable, Store
    from llava_cli.chat.thumbnail import draw as draw_thumbnail

    store = None
    try:
        store = None if no_save else Store()
    except DataFolderUnusable as error:
        if continue_ or resume is not None:
            raise
        if not quiet:
            render.note(f"this chat is not kept: {error}; LLAVA_DATA=FOLDER names a place")
    number, conversation = None, None
    if continue_ or resume is not None:
        if store is None:
            raise UsageError("--no-save", "does not go with --continue or --resume", "llava chat --continue")
        number = resume if resume is not None else store.last()
        if number is None:
            raise UsageError("--continue", "there is no chat yet", "llava chat img.jpg")
        conversation = store.load(number)
        model = context.params["model"] or store.model(number)
        settings = replace(settings, load=replace(settings.load, model=model))
    if "-" in (images or []):
        raise UsageError("-", "stdin is where the questions come from", "llava chat img.jpg")
    pictures = open_named(images or [], settings.pictures, allow_truncated, quiet)
    first = named.asked(Conversation().ask("", pictures)).turns[-1].question if named else ""

    is_interactive = sys.stdin is not None and sys.stdin.isatty()
    has_thumbnails = is_interactive and sys.stdout.isatty() and not plain and not no_preview
    with render.spinner("loading the model", quiet or plain):
        from llava_cli.loader import open_engine

        engine = open_engine(settings, render.note, render.notes(quiet), pictures if number is None else ())
    if not quiet:
        render.note_demo_model(settings.load, engine.model)
    preview = draw_thumbnail if has_thumbnails else lambda picture: None
    session = Chat(engine, settings, render.notes(quiet), preview, store)
    if number is not None and conversation is not None:
        session.resume(number, conversation)
        if context.params["system"] is not None:
            session.set_system(context.params["system"])
    for picture in pictures:
        session.attach(picture)
    if not is_interactive:
        ask_first(session, first, quiet, stats)
        answer_lines(session, piped_lines(), quiet, stats)
        return
    from llava_cli.chat.commands import paste
    from llava_cli.chat.keyboard import keyboard, plain_keyboard

    if number is not None:
        turns = len(session.conversation.turns)
        session.note(f"chat {number} goes on after {turns} turn(s); llava chats show {number}")
    session.note(f"{one_line(engine.model)}: /help lists commands, Ctrl-D leaves")
    history = store.folder / "history" if store else None
    signals.spare_imports()
    ask_first(session, first, quiet, stats)
    converse(session, plain_keyboard() if plain else keyboard(history, lambda: paste(session)), quiet, stats)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C must not interrupt the exit
