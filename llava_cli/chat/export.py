"""A conversation as a file: plain text, JSON, or Markdown with its pictures beside it."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llava_cli import files
from llava_cli.conversation import Conversation, Picture
from llava_cli.errors import OutputError, UsageError, os_reason
from llava_cli.untrusted_text import one_line, printable


def save(conversation: Conversation, model: str, path: Path) -> None:
    """Writes JSON if the file's name ends in `.json`, otherwise text. Raises as `write_new` does."""
    write_new(path, as_json(conversation, model) if path.suffix == ".json" else as_text(conversation))


def export(conversation: Conversation, model: str, path: Path) -> None:
    """Writes Markdown, and the pictures to a new folder beside it. Raises as `write_new` does."""
    folder = path.parent / f"{path.stem}_pictures"
    pictures = {picture.identity: picture for picture in conversation.pictures}
    names = {identity: _file_name(n, picture) for n, (identity, picture) in enumerate(pictures.items(), 1)}
    links = {identity: f"{quote(folder.name)}/{name}" for identity, name in names.items()}
    if names and os.path.lexists(folder):
        raise UsageError(printable(str(folder)), "is there already", "choose another name, or move it")
    write_new(path, as_markdown(conversation, model, links))
    with _writing(folder):
        if names:
            files.make_new_folder(folder)
        for identity, picture in pictures.items():
            picture.image.save(data := io.BytesIO(), "PNG")
            files.write_new(folder / names[identity], data.getvalue())


def as_text(conversation: Conversation) -> str:
    return "\n".join(
        turn_as_text([printable(picture.label) for picture in turn.pictures], turn.question, turn.answer or "")
        for turn in conversation.turns
    )


def turn_as_text(pictures: Iterable[str], question: str, answer: str) -> str:
    """The names of the pictures, the quoted question, and the answer."""
    return "\n".join([*(f"[{name}]" for name in pictures), _quoted(question), answer, ""])


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines())


def as_json(conversation: Conversation, model: str) -> str:
    turns = [
        {
            "question": turn.question,
            "images": [_as_object(picture) for picture in turn.pictures],
            "answer": turn.answer,
        }
        for turn in conversation.turns
    ]
    return json.dumps({"model": model, "system": conversation.system, "turns": turns}, indent=2) + "\n"


def _as_object(picture: Picture) -> dict[str, Any]:
    """What identifies a picture; `page`, `time` and `region` only where it is not all of its file."""
    part = {"page": picture.part.page, "time": picture.part.time, "region": picture.region}
    return {"name": picture.name, "sha256": picture.sha256} | {k: v for k, v in part.items() if v is not None}


def as_markdown(conversation: Conversation, model: str, links: dict[str, str]) -> str:
    """`links` are the relative URLs of the pictures by their `identity`."""
    parts = [f"# A chat with {_escaped(one_line(model))}"]
    for turn in conversation.turns:
        parts += [f"![{_escaped(picture.label)}]({links[picture.identity]})" for picture in turn.pictures]
        parts.append(_quoted(turn.question))
        parts.append(turn.answer or "")
    return "\n\n".join(parts) + "\n"


def write_new(path: Path, text: str) -> None:
    """Raises `UsageError` if the file exists, and `OutputError` if it cannot be written."""
    with _writing(path):
        files.write_new(path, text.encode("utf-8", "backslashreplace"))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise UsageError(printable(str(path)), "is there already", "choose another name, or move it") from None
    except (OSError, ValueError) as error:  # `ValueError`: a NUL in the name
        raise OutputError(printable(str(path)), os_reason(error)) from None


def _file_name(number: int, picture: Picture) -> str:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{Path(picture.name).stem[:40]}{picture.part}")
    return f"{number}-{stem or 'picture'}.png"


def _escaped(name: str) -> str:
    return re.sub(r"([\[\]()!\\])", r"\\\1", printable(name))
