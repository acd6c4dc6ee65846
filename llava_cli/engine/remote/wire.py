"""What another server says, read within bounds and checked for its form before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from llava_cli import bounded_json, limits
from llava_cli.bounded_http import Deadline, NotHttp, Response
from llava_cli.bounded_json import TooMuch
from llava_cli.errors import plainly
from llava_cli.untrusted_text import one_line

DONE = b"[DONE]"
BROKEN_OFF = "ended in the midst of an answer"
_OTHER_FIELDS = (b":", b"event:", b"id:", b"retry:")
"""Lines of server-sent events that have no data."""
_TEXTS = ("text", "output_text", None)
"""What a part of a content is called that has text of the answer."""
_THOUGHTS = ("thinking", "reasoning")
_REASONS = {
    "length": "length",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "model_length": "length",
    "content_filter": "content_filter",
    "safety": "content_filter",
    "recitation": "content_filter",
    "blocklist": "content_filter",
    "prohibited_content": "content_filter",
    "spii": "content_filter",
    "refusal": "refusal",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "error": "error",
}
"""Why an answer ended, in the words of OpenAI and of others; any other word is an ordinary end."""


class Unanswered(Exception):
    """A server gave no answer, or none to the end, and may give one later: in words that go on after its name."""

    def __init__(self, reason: str, status: int | None = 0, after: float = 0.0) -> None:
        super().__init__(reason)
        self.status, self.after = status, after
        """HTTP's status, 0 where it broke off, None where nobody was there; seconds that it asks to be left alone."""


class Malformed(Exception):
    """An answer has another form than OpenAI's: in words that go on after the server's name."""

    def __init__(self, reason: str = "does not speak OpenAI's chat completions") -> None:
        super().__init__(reason)


class WebPage(Malformed):
    """An answer is a page for people."""

    def __init__(self) -> None:
        super().__init__("sends a web page there, and does not speak OpenAI's chat completions")


class Message(NamedTuple):
    """A message, or a piece of one as it comes: its text, and what may stand in its place."""

    text: str = ""
    refusal: str = ""
    thoughts: str = ""
    has_calls: bool = False


@contextmanager
def unanswered(what: str, deadline: Deadline) -> Iterator[None]:
    """Translates what a connection raises: `Unanswered`, for `what` happened, or `Malformed`."""
    try:
        yield
    except NotHttp as error:
        raise Malformed(str(error)) from None
    except TimeoutError:
        raise Unanswered(f"no answer within {deadline.seconds:.0f} s") from None
    except OSError as error:
        raise Unanswered(f"{what} ({plainly(error)})") from None


def body(response: Response) -> dict[str, Any]:
    """The JSON object that is the body. Raises `Unanswered`, `Malformed`, `TooLarge` or `TooMuch`."""
    _check_encoding(response)
    with unanswered(BROKEN_OFF, response.deadline):
        data = response.read(limits.REPLY_BYTES)
    return parsed(data)


def events(response: Response) -> Iterator[bytes]:
    """The data of server-sent events, or a JSON object in their place as the only one, and then `DONE`.

    Raises `Unanswered`, `Malformed` or `TooLarge`.
    """
    _check_encoding(response)
    with unanswered(BROKEN_OFF, response.deadline):
        lines = map(bytes.strip, response.lines(limits.REPLY_BYTES, limits.REPLY_LINE_BYTES))
        for line in lines:
            name, _, value = line.partition(b":")
            if line.startswith(b"{"):
                yield b"\n".join([line, *lines])
                yield DONE
            elif name in (b"data", b"error"):  # the latter is an older llama.cpp's
                if value := value.strip():
                    yield value
            elif line.startswith(b"<"):
                raise WebPage
            elif line and not line.startswith(_OTHER_FIELDS):
                raise Malformed


def _check_encoding(response: Response) -> None:
    if (response.header("Content-Encoding") or "identity").strip().lower() != "identity":
        raise Malformed("sends compressed answers, which were not asked for")


def parsed(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises `Malformed` or `TooMuch`."""
    bounds = bounded_json.Bounds(limits.REPLY_BYTES, limits.REPLY_DEPTH, limits.REPLY_ITEMS)
    try:
        return mapping(bounded_json.loads(data, bounds))
    except TooMuch:
        raise
    except ValueError:
        raise (WebPage() if data.lstrip().startswith(b"<") else Malformed()) from None


def first_choice(said: dict[str, Any]) -> dict[str, Any]:
    """The only choice, for no more than one is asked for. Raises `Malformed`."""
    choices = said.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Malformed
    return mapping(choices[0])


def is_error(said: dict[str, Any]) -> bool:
    """Whether an object tells of a failure, whatever status it came with."""
    return bool(said.get("error") or (said.get("choices") is None and any(map(said.get, _ERROR_WORDS))))


_ERROR_WORDS = ("message", "detail", "msg")
"""Where an error that is no object of OpenAI's has its words."""


def error_words(error: Any) -> str:
    """What an error says, in one line: text, OpenAI's object, FastAPI's list of places and mistakes, or a list."""
    if isinstance(error, dict):
        words = next(filter(None, (error_words(error.get(name)) for name in (*_ERROR_WORDS, "error"))), "")
        place = ".".join(map(str, where)) if isinstance(where := error.get("loc"), list) else ""
        return one_line(f"{place}: {words}" if place and words else words)
    if isinstance(error, list):
        return one_line("; ".join(filter(None, map(error_words, error[:5]))))
    return one_line(error) if isinstance(error, str) else ""


def message(choice: dict[str, Any]) -> Message:
    """What a choice has of a message: whole, a piece, or the bare text of older servers. Raises `Malformed`."""
    found = mapping(choice.get("delta") or choice.get("message") or {})
    content = found.get("content", choice.get("text"))
    text, refusal, thoughts = "", _optional(found.get("refusal")), ""
    for part in content if isinstance(content, list) else [content]:
        part = {"text": part} if isinstance(part, str) else mapping(part or {})
        kind = part.get("type")
        if kind in _THOUGHTS:
            thoughts += "…"  # whose form differs from server to server
        elif kind == "refusal":
            refusal += _optional(part.get("refusal"))
        elif kind in _TEXTS and part.get("text") is not None:
            text += string(part["text"])
    thoughts += _optional(found.get("reasoning_content")) or _optional(found.get("reasoning"))
    return Message(text, refusal, thoughts, bool(found.get("tool_calls") or found.get("function_call")))


def finish_reason(choice: dict[str, Any]) -> str | None:
    """Why an answer ended, as OpenAI calls it; None where it has not. Raises `Malformed`."""
    found = choice.get("finish_reason")
    return None if found is None else _REASONS.get(string(found).lower(), "stop")


def mapping(value: Any) -> dict[str, Any]:
    """An object. Raises `Malformed`."""
    if not isinstance(value, dict):
        raise Malformed
    return value


def string(value: Any) -> str:
    """Text that can be written as UTF-8: JSON may have halves of surrogate pairs. Raises `Malformed`."""
    if not isinstance(value, str):
        raise Malformed
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _optional(value: Any) -> str:
    """Text that is not needed for an answer; empty for what is none."""
    return string(value) if isinstance(value, str) else ""


def tokens(value: Any) -> int:
    """A number of tokens; 0 for what is none, as where it was left out."""
    return value if type(value) is int and 0 <= value <= limits.REPLY_TOKENS else 0
