"""What another server says, read within bounds and checked for its form before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llava_cli import bounded_json, limits
from llava_cli.bounded_http import Deadline, NotHttp, Response
from llava_cli.bounded_json import TooMuch
from llava_cli.errors import plainly

_EVENT = (b"data:", b":", b"event:", b"id:", b"retry:")
BROKEN_OFF = "ended in the midst of an answer"


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
    """The data of server-sent events. Raises `Unanswered`, `Malformed` or `TooLarge`."""
    _check_encoding(response)
    with unanswered(BROKEN_OFF, response.deadline):
        for line in response.lines(limits.REPLY_BYTES, limits.REPLY_LINE_BYTES):
            line = line.strip()
            if line and not line.startswith(_EVENT):
                raise Malformed
            if line.startswith(b"data:"):
                yield line[len(b"data:") :].strip()


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
        raise Malformed from None


def first_choice(said: dict[str, Any]) -> dict[str, Any]:
    """The only choice, for no more than one is asked for. Raises `Malformed`."""
    choices = said.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Malformed
    return mapping(choices[0])


def content(message: dict[str, Any]) -> str:
    """The text of a message or of a piece of one, which may come in parts. Raises `Malformed`."""
    found = message.get("content")
    if found is None:
        return ""
    if isinstance(found, list):
        parts = [mapping(part) for part in found]
        return "".join(string(part.get("text")) for part in parts if part.get("type") == "text")
    return string(found)


def finish_reason(choice: dict[str, Any]) -> str | None:
    """Raises `Malformed`."""
    found = choice.get("finish_reason")
    return None if found is None else string(found)


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


def tokens(value: Any) -> int:
    """A number of tokens; 0 for what is none, as where it was left out."""
    return value if type(value) is int and 0 <= value <= limits.REPLY_TOKENS else 0
