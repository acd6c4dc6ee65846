"""What a row says: the answer, or what prevented it, and what is suspicious about it."""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass
from typing import Any

from llava_cli.batch.tasks import Task
from llava_cli.conversation import Picture
from llava_cli.engine import Answer
from llava_cli.errors import LlavaError

_KEYS = ("image", "question", "answer", "status", "error", "model", "finish_reason", "answer_tokens", "sha256")

# Left as they are, a terminal would obey some of these, and some readers of lines take others for an end.
_NOT_PLAIN = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_REPEATED = re.compile(r"(?<!\S)(\S.{0,150}?\s)\1{3,}|(\S)\2{30,}", re.DOTALL)


@dataclass(frozen=True)
class Seen:
    """What there is to say of a picture once it is no longer needed."""

    sha256: str
    frames: int
    truncated: bool

    @classmethod
    def of(cls, picture: Picture) -> Seen:
        return cls(picture.sha256, picture.frames, picture.truncated)


def make_row(task: Task, seen: Seen | None, outcome: Answer | LlavaError, model: str) -> dict[str, Any]:
    """One row. Every row has the nine of `_KEYS`; the others are there where they say something."""
    answer = outcome if isinstance(outcome, Answer) else None
    error = {"type": type(outcome).__name__, "message": outcome.reason} if isinstance(outcome, LlavaError) else None
    row: dict[str, Any] = {
        "image": task.image,
        "question": task.question,
        "answer": answer.text if answer else None,
        "status": "ok" if answer else "error",
        "error": error,
        "model": model,
        "finish_reason": answer.finish_reason if answer else None,
        "answer_tokens": answer.answer_tokens if answer else None,
        "sha256": seen.sha256 if seen else None,
    }
    if task.id is not None:
        row = {"id": task.id, **row}
    if answer and (flags := suspicious(answer, task.question)):
        row["flags"] = flags
    if task.answer is not None:
        row["expected"] = task.answer
        row["right"] = bool(answer) and is_right(answer.text if answer else "", task.answer)
    if seen and seen.frames > 1:
        row["frames"] = seen.frames
    if seen and seen.truncated:
        row["truncated"] = True
    try:
        task.image.encode()
    except UnicodeEncodeError:
        row["path_b64"] = base64.b64encode(os.fsencode(task.image)).decode()
    return row


def is_whole(row: dict[str, Any]) -> bool:
    """Whether a row that was read has all that is told of rows."""
    if not row.keys() >= set(_KEYS):
        return False
    answered = isinstance(row["answer"], str) and type(row["answer_tokens"]) is int
    failed = isinstance(row["error"], dict) and isinstance(row["error"].get("type"), str)
    flags = row.get("flags", [])
    return (
        (answered if row["status"] == "ok" else failed and row["status"] == "error")
        and isinstance(flags, list)
        and all(isinstance(flag, str) for flag in flags)
        and isinstance(row.get("right", False), bool)
    )


def to_line(row: dict[str, Any], ascii_only: bool = False) -> bytes:
    """A row as its line: UTF-8, with what is not plain text escaped."""
    text = json.dumps(row, ensure_ascii=ascii_only)
    return (_NOT_PLAIN.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n").encode()


def suspicious(answer: Answer, question: str) -> list[str]:
    """Signs that an answer went wrong: empty, repeated, cut_off, echoes_prompt."""
    text = answer.text
    found = {
        "empty": not text.strip(),
        "repeated": bool(_REPEATED.search(text[-4000:] + " ")),
        "cut_off": answer.finish_reason == "length",
        "echoes_prompt": (len(question) > 7 and _plain(question) in _plain(text)) or "ASSISTANT:" in text,
    }
    return [name for name, there in found.items() if there]


def is_right(text: str, expected: str | tuple[str, ...]) -> bool:
    """Whether an answer is one of those expected, apart from case, spaces and a period at its end."""
    options = (expected,) if isinstance(expected, str) else expected
    return _plain(text) in map(_plain, options)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!")
