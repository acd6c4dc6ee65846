"""A row of a batch's output: the answer or the error, and signs that an answer went wrong."""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass
from typing import Any

from llava_cli.batch.lines import parse_line
from llava_cli.batch.tasks import Task
from llava_cli.conversation import Picture
from llava_cli.engine import Answer
from llava_cli.errors import LlavaError
from llava_cli.parts import WHOLE
from llava_cli.untrusted_text import for_json_line

KEYS = ("image", "question", "answer", "status", "error", "model", "finish_reason", "answer_tokens", "sha256")
"""The keys that every row has."""
_MAX_PERIOD = 152
"""Characters of a phrase that `is_repetitive` looks for."""
_CHARACTER_RUN = re.compile(r"(\S)\1{30}")


@dataclass(frozen=True)
class PictureFacts:
    """What a row says about its picture, which itself is no longer in memory when the row is made."""

    sha256: str
    frames: int
    truncated: bool

    @classmethod
    def of(cls, picture: Picture) -> PictureFacts:
        return cls(picture.sha256, picture.frames, picture.truncated)


def make_row(task: Task, picture: PictureFacts | None, outcome: Answer | LlavaError, model: str) -> dict[str, Any]:
    """A row with the nine `KEYS`, and with optional ones where they say something.

    `asked` is the question with its fields filled in, where that is another text.
    """
    answer = outcome if isinstance(outcome, Answer) else None
    error = error_object(outcome) if isinstance(outcome, LlavaError) else None
    row: dict[str, Any] = {
        "image": task.image,
        "question": task.question,
        "answer": answer.text if answer else None,
        "status": "ok" if answer else "error",
        "error": error,
        "model": model,
        "finish_reason": answer.finish_reason if answer else None,
        "answer_tokens": answer.answer_tokens if answer else None,
        "sha256": picture.sha256 if picture else None,
    }
    place = {"page": task.page, "time": task.time, "region": task.region}
    row |= {name: value for name, value in place.items() if value is not None}
    if task.id is not None:
        row = {"id": task.id, **row}
    if task.wording != task.question:
        row["asked"] = task.wording
    if answer and (flags := warning_flags(answer, task.wording)):
        row["flags"] = flags
    if answer:
        row |= answer.details()
    is_open = answer is not None and is_unsure(answer)
    if is_open:
        row["guess"] = next(iter(row["probabilities"]))
    if task.answer is not None:
        row["expected"] = task.answer
        if not is_open:  # which is neither right nor wrong
            row["right"] = bool(answer) and is_right(answer.text if answer else "", task.answer)
    if picture and picture.frames > 1 and task.part == WHOLE:
        row["frames"] = picture.frames
    if picture and picture.truncated:
        row["truncated"] = True
    try:
        task.image.encode()
    except UnicodeEncodeError:
        row["path_b64"] = base64.b64encode(os.fsencode(task.image)).decode()
    return row


def error_object(error: LlavaError) -> dict[str, str]:
    return {"type": type(error).__name__, "message": error.reason}


def is_unsure(answer: Answer) -> bool:
    """Whether an answer from choices is none of them, since none was probable enough."""
    return bool(answer.probabilities) and answer.text not in (answer.probabilities or ())


def escalation_error(row: dict[str, Any]) -> dict[str, Any] | None:
    """The error that a larger model ended with, which was asked about an unsure row."""
    escalated = row.get("escalated")
    error = escalated.get("error") if isinstance(escalated, dict) else None
    return error if isinstance(error, dict) else None


def to_ask_again(row: dict[str, Any]) -> bool:
    """Whether a row has an error, of its model or of the larger one."""
    return row["status"] == "error" or escalation_error(row) is not None


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A line's row, with a picture, a question and a status, and an answer if that is "ok"; None for other lines."""
    try:
        row = parse_line(line)
        answer = str if row["status"] == "ok" else object
        types = {"image": str, "question": str, "answer": answer}
        is_row = row["status"] in ("ok", "error") and all(isinstance(row[key], kind) for key, kind in types.items())
    except (ValueError, KeyError, TypeError):
        return None
    return row if is_row else None


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a parsed row is about, as `Task.key`."""
    return row["image"], row["question"], *(row.get(name) for name in ("id", "page", "time", "region"))


def is_complete(row: dict[str, Any]) -> bool:
    """Whether a parsed row has everything that `make_row` writes and a `Tally` counts."""
    if not row.keys() >= set(KEYS):
        return False
    is_answered = isinstance(row["answer"], str) and type(row["answer_tokens"]) is int
    is_failed = _is_error(row["error"])
    flags = row.get("flags", [])
    return (
        (is_answered if row["status"] == "ok" else is_failed and row["status"] == "error")
        and isinstance(flags, list)
        and all(isinstance(flag, str) for flag in flags)
        and isinstance(row.get("right", False), bool)
        and isinstance(row.get("asked", ""), str)
        and (escalation_error(row) is None or _is_error(escalation_error(row)))
    )


def _is_error(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("type"), str)


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether a value from outside is a number in a range; NaN is in none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def to_line(row: dict[str, Any], ascii_only: bool = False) -> bytes:
    """A row as a line of UTF-8, in which control characters are escaped."""
    return (for_json_line(json.dumps(row, ensure_ascii=ascii_only)) + "\n").encode()


def warning_flags(answer: Answer, question: str) -> list[str]:
    """Signs that an answer went wrong, or is none: empty, repeated, cut_off, echoes_prompt, unsure, blind."""
    text = answer.text
    flags = {
        "empty": not text.strip(),
        "repeated": is_repetitive(text[-4000:] + " "),
        "cut_off": answer.finish_reason == "length",
        "echoes_prompt": (len(question) > 7 and _normalized(question) in _normalized(text)) or "ASSISTANT:" in text,
        "unsure": is_unsure(answer),
        "blind": answer.is_blind,
    }
    return [name for name, is_set in flags.items() if is_set]


def is_repetitive(text: str) -> bool:
    r"""Whether a phrase occurs four times in a row, or a character 31 times: `(?<!\S)(\S.{0,150}?\s)\1{3}|(\S)\2{30}`.

    Words become characters of a string. A run of four equal blocks of n words covers two blocks that begin at a
    multiple of 2n, wherever the run begins, so only these places are compared, in O(words * n) where the regular
    expression would try every length at every word.
    """
    if _CHARACTER_RUN.search(text):
        return True
    words = re.findall(r"\S+\s+", text)
    codes: dict[str, int] = {}
    string = "".join(chr(codes.setdefault(word, len(codes))) for word in words)
    for length in range(1, _MAX_PERIOD // 2 + 1):
        start = 0
        while (end := start + 2 * length) <= len(string):
            if string[start : start + length] == string[start + length : end]:
                begin, end = _periodic_run(string, start, length)
                # The text's last word may have more space behind it than its equals.
                is_continued = end < len(words) and words[end].startswith(words[end - length])
                is_long = end - begin + is_continued >= 4 * length
                if is_long and sum(map(len, words[begin : begin + length])) <= _MAX_PERIOD:
                    return True
                start = end - length + 1
            else:
                start = end
    return False


def _periodic_run(string: str, start: int, period: int) -> tuple[int, int]:
    """Begin and end of the longest run of this period around the two equal blocks at `start`."""
    begin, end = start, start + 2 * period
    while begin and string[begin - 1] == string[begin - 1 + period]:
        begin -= 1
    while end < len(string) and string[end] == string[end - period]:
        end += 1
    return begin, end


def is_right(text: str, expected: str | tuple[str, ...]) -> bool:
    """Whether an answer is one of those expected, apart from case, spaces and a period at its end."""
    options = (expected,) if isinstance(expected, str) else expected
    return _normalized(text) in map(_normalized, options)


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!")
