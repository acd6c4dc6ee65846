"""`llava chats`: lists, searches, shows and deletes saved chats."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from llava_cli import render
from llava_cli.chat.export import turn_as_text
from llava_cli.chat.store import DataFolderUnusable, Store, Summary
from llava_cli.cli import Group, app
from llava_cli.untrusted_text import one_line, printable

chats = typer.Typer(cls=Group, help="List, search, show and delete kept chats.", rich_markup_mode=None)
app.add_typer(chats, name="chats")

NumberArg = Annotated[int, typer.Argument(metavar="N", max=2**31, help="The chat's number.")]


@chats.callback(invoke_without_command=True)
def _chats(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_chats()


@chats.command("list")
def list_chats() -> None:
    """List all chats, the last one first."""
    _print_table(_chats_with())


@chats.command()
def search(text: Annotated[str, typer.Argument(metavar="TEXT", help="What was said, by either side.")]) -> None:
    """List the chats in which something was said.

    llava chats search "red circle"
    """
    _print_table(_chats_with(text))


@chats.command()
def show(number: NumberArg) -> None:
    """Print what was said.

    llava chats show 3
    """
    for turn in Store().turns(number):
        render.say(turn_as_text(map(printable, turn.pictures), turn.question, turn.answer))


@chats.command()
def delete(numbers: Annotated[list[int], typer.Argument(metavar="N...", help="The chats' numbers.")]) -> None:
    """Delete chats.

    llava chats delete 3 4
    """
    store = Store()
    for number in numbers:
        store.delete(number)
        render.note(f"deleted: chat {number}; what was typed is in {store.folder / 'history'} still")


def _chats_with(text: str = "") -> list[Summary]:
    try:
        return Store().search(text)
    except DataFolderUnusable:  # then no chat can have been saved
        return []


def _print_table(chats: list[Summary]) -> None:
    rows = [
        [
            str(chat.number),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(chat.changed)),
            one_line(chat.model),
            str(chat.turns),
            str(chat.pictures),
            printable(" ".join(chat.title.split()))[:60],
        ]
        for chat in chats
    ]
    render.table(["N", "last", "model", "turns", "pictures", "first question"], rows)
