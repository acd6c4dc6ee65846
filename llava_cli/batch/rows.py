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
from llava_cli.untrusted_text import for_json_line

_KEYS = ("image", "question", "answer", "status", "error", "model", "finish_reason", "answer_tokens", "sha256")
_LONGEST = 152
"""Characters of words that are looked for four times in a row."""
_SAME = re.compile(r"(\S)\1{30}")


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
    return (for_json_line(json.dumps(row, ensure_ascii=ascii_only)) + "\n").encode()


def suspicious(answer: Answer, question: str) -> list[str]:
    """Signs that an answer went wrong: empty, repeated, cut_off, echoes_prompt."""
    text = answer.text
    found = {
        "empty": not text.strip(),
        "repeated": _is_repeated(text[-4000:] + " "),
        "cut_off": answer.finish_reason == "length",
        "echoes_prompt": (len(question) > 7 and _plain(question) in _plain(text)) or "ASSISTANT:" in text,
    }
    return [name for name, there in found.items() if there]


def _is_repeated(text: str) -> bool:
    """Whether some words stand there four times in a row, or a sign 31 times.

    Four equal blocks in a row cover two of them that begin at a multiple of twice their length, wherever the first one
    begins: only there a run is looked for. A regular expression would try every length at every word.
    """
    if _SAME.search(text):
        return True
    words = re.findall(r"\S+\s+", text)
    codes: dict[str, int] = {}
    signs = "".join(chr(codes.setdefault(word, len(codes))) for word in words)
    for length in range(1, _LONGEST // 2 + 1):
        at = 0
        while (end := at + 2 * length) <= len(signs):
            if signs[at : at + length] == signs[at + length : end]:
                begin, end = _run(signs, at, length)
                # The last word of all may have more space behind it.
                follows = end < len(words) and words[end].startswith(words[end - length])
                if end - begin + follows >= 4 * length and sum(map(len, words[begin : begin + length])) <= _LONGEST:
                    return True
                at = end - length + 1
            else:
                at = end
    return False


def _run(signs: str, at: int, length: int) -> tuple[int, int]:
    """From where to where blocks of a length repeat, around two equal ones that begin at `at`."""
    begin, end = at, at + 2 * length
    while begin and signs[begin - 1] == signs[begin - 1 + length]:
        begin -= 1
    while end < len(signs) and signs[end] == signs[end - length]:
        end += 1
    return begin, end


def is_right(text: str, expected: str | tuple[str, ...]) -> bool:
    """Whether an answer is one of those expected, apart from case, spaces and a period at its end."""
    options = (expected,) if isinstance(expected, str) else expected
    return _plain(text) in map(_plain, options)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!")
