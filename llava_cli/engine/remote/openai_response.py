"""Reads the responses of OpenAI-compatible servers, within limits, and checks each value's type before it is used.

https://platform.openai.com/docs/api-reference/chat, and the variants that other servers send.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from llava_cli import bounded_json, limits
from llava_cli.bounded_http import Deadline, NotHttp, Response
from llava_cli.bounded_json import TooMuch
from llava_cli.engine.base import Confidence
from llava_cli.engine.remote.choice_logprobs import TOP_LOGPROBS, TokenLogprobs
from llava_cli.errors import plain_message
from llava_cli.untrusted_text import one_line

DONE = b"[DONE]"
BROKEN_OFF = "ended in the middle of an answer"
_FIELDS_WITHOUT_DATA = (b":", b"event:", b"id:", b"retry:")
"""Lines of server-sent events that are not `data:` (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
_TEXT_PARTS = ("text", "output_text", None)
_REASONING_PARTS = ("thinking", "reasoning")
_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity."""
_ERROR_KEYS = ("message", "detail", "msg")
"""Where an error that does not have OpenAI's form keeps its message."""
_FINISH_REASONS = {
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
"""Reasons of OpenAI and other APIs in OpenAI's terms; any other reason is an ordinary "stop"."""


class RetryableError(Exception):
    """The server gave no answer or only part of one, but may give one later. The message follows the server's name."""

    def __init__(self, reason: str, status: int | None = 0, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after
        """The HTTP status, 0 if the connection broke off, None if nobody was there; the seconds to wait, if given."""


class MalformedResponse(Exception):
    """The response does not have OpenAI's form. The message follows the server's name."""

    def __init__(self, reason: str = "does not speak OpenAI's chat completions") -> None:
        super().__init__(reason)


class HtmlResponse(MalformedResponse):
    """The response is a web page."""

    def __init__(self) -> None:
        super().__init__("sends a web page there, and does not speak OpenAI's chat completions")


class Message(NamedTuple):
    """A message, or the delta of one: its text and what may come instead of text."""

    text: str = ""
    refusal: str = ""
    reasoning: str = ""
    has_tool_calls: bool = False


@contextmanager
def connection_errors(reason: str, deadline: Deadline) -> Iterator[None]:
    """Translates a connection's `OSError` into `RetryableError` with this reason, or into `MalformedResponse`."""
    try:
        yield
    except NotHttp as error:
        raise MalformedResponse(str(error)) from None
    except TimeoutError:
        raise RetryableError(f"no answer within {deadline.seconds:.0f} s") from None
    except OSError as error:
        raise RetryableError(f"{reason} ({plain_message(error)})") from None


def read_object(response: Response) -> dict[str, Any]:
    """The JSON object in the body. Raises `RetryableError`, `MalformedResponse`, `ResponseTooLarge` or `TooMuch`."""
    _check_encoding(response)
    with connection_errors(BROKEN_OFF, response.deadline):
        data = response.read(limits.REPLY_BYTES)
    return parse_object(data)


def read_events(response: Response) -> Iterator[bytes]:
    """The data of each server-sent event. A plain JSON object instead of a stream is yielded, followed by `DONE`.

    Raises `RetryableError`, `MalformedResponse` or `ResponseTooLarge`.
    """
    _check_encoding(response)
    with connection_errors(BROKEN_OFF, response.deadline):
        lines = map(bytes.strip, response.lines(limits.REPLY_BYTES, limits.REPLY_LINE_BYTES))
        for line in lines:
            field, _, value = line.partition(b":")
            if line.startswith(b"{"):
                yield b"\n".join([line, *lines])
                yield DONE
            elif field in (b"data", b"error"):  # older versions of llama.cpp send `error:`
                if value := value.strip():
                    yield value
            elif line.startswith(b"<"):
                raise HtmlResponse
            elif line and not line.startswith(_FIELDS_WITHOUT_DATA):
                raise MalformedResponse


def _check_encoding(response: Response) -> None:
    if (response.header("Content-Encoding") or "identity").strip().lower() != "identity":
        raise MalformedResponse("sends compressed answers, which were not asked for")


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises `MalformedResponse` or `TooMuch`."""
    bounds = bounded_json.Bounds(limits.REPLY_BYTES, limits.REPLY_DEPTH, limits.REPLY_ITEMS)
    try:
        return as_object(bounded_json.loads(data, bounds))
    except TooMuch:
        raise
    except ValueError:
        raise (HtmlResponse() if data.lstrip().startswith(b"<") else MalformedResponse()) from None


def first_choice(event: dict[str, Any]) -> dict[str, Any]:
    """The only choice, since we never ask for more than one. Raises `MalformedResponse`."""
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices:
        raise MalformedResponse
    return as_object(choices[0])


def parse_message(choice: dict[str, Any]) -> Message:
    """The message of a choice: whole, a delta, or the bare text of legacy completions. Raises `MalformedResponse`."""
    fields = as_object(choice.get("delta") or choice.get("message") or {})
    content = fields.get("content", choice.get("text"))
    text, refusal, reasoning = "", _text_or_empty(fields.get("refusal")), ""
    for part in content if isinstance(content, list) else [content]:
        part = {"text": part} if isinstance(part, str) else as_object(part or {})
        kind = part.get("type")
        if kind in _REASONING_PARTS:
            reasoning += "…"  # its form differs from server to server
        elif kind == "refusal":
            refusal += _text_or_empty(part.get("refusal"))
        elif kind in _TEXT_PARTS and part.get("text") is not None:
            text += as_text(part["text"])
    reasoning += _text_or_empty(fields.get("reasoning_content")) or _text_or_empty(fields.get("reasoning"))
    return Message(text, refusal, reasoning, bool(fields.get("tool_calls") or fields.get("function_call")))


def finish_reason(choice: dict[str, Any]) -> str | None:
    """Why the answer ended, in OpenAI's terms; None if it has not ended. Raises `MalformedResponse`."""
    reason = choice.get("finish_reason")
    return None if reason is None else _FINISH_REASONS.get(as_text(reason).lower(), "stop")


def token_logprobs(choice: dict[str, Any]) -> list[TokenLogprobs]:
    """The log-probabilities of a choice's tokens; none where they are not told. Raises `MalformedResponse`."""
    content = choice["logprobs"].get("content") if isinstance(choice.get("logprobs"), dict) else None
    return [
        TokenLogprobs(
            *_logprob(token),
            dict(_logprob(other) for other in _list_or_empty(token.get("top_logprobs"))[:TOP_LOGPROBS]),
        )
        for token in map(as_object, _list_or_empty(content))
    ]


def _logprob(token: Any) -> tuple[str, float]:
    """A token's text and log-probability, which some servers leave out where it is minus infinity."""
    fields = as_object(token)
    logprob = _LEAST_LOGPROB if fields.get("logprob") is None else fields["logprob"]
    return as_text(fields.get("token")), max(_LEAST_LOGPROB, min(_number(logprob), 0.0))


def _list_or_empty(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def answer_details(choice: dict[str, Any]) -> dict[str, Any]:
    """What `llava serve` says of an answer besides its text, as fields of `Answer`. Raises `MalformedResponse`."""
    told = as_object(as_object(choice.get("delta") or choice.get("message") or {}).get("llava") or {})
    details: dict[str, Any] = {name: _number(told[name]) for name in ("answer_probability", "sight") if name in told}
    if "data" in told:
        details["data"] = _finite(told["data"])
    if "probabilities" in told:
        details["probabilities"] = {as_text(k): _number(p) for k, p in as_object(told["probabilities"]).items()}
    if "confidence" in told:
        fields = as_object(told["confidence"])
        mean, lowest = _number(fields.get("mean")), _number(fields.get("lowest"))
        details["confidence"] = Confidence(mean, lowest, as_text(fields.get("lowest_token")))
    return details


def _finite(data: Any) -> Any:
    """JSON without NaN and Infinity, of which no row can be made. Raises `MalformedResponse`."""
    try:
        json.dumps(data, allow_nan=False)
    except ValueError:
        raise MalformedResponse from None
    return data


def _number(value: Any) -> float:
    """A finite number. Raises `MalformedResponse`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < sys.float_info.max:
        raise MalformedResponse
    return float(value)


def is_error(event: dict[str, Any]) -> bool:
    """Whether an object reports an error, whatever its HTTP status."""
    return bool(event.get("error") or (event.get("choices") is None and any(map(event.get, _ERROR_KEYS))))


def error_message(error: Any) -> str:
    """An error's message in one line: from text, OpenAI's object, FastAPI's list of mistakes, or a list of these."""
    if isinstance(error, dict):
        message = next(filter(None, (error_message(error.get(name)) for name in (*_ERROR_KEYS, "error"))), "")
        place = ".".join(map(str, location)) if isinstance(location := error.get("loc"), list) else ""
        return one_line(f"{place}: {message}" if place and message else message)
    if isinstance(error, list):
        return one_line("; ".join(filter(None, map(error_message, error[:5]))))
    return one_line(error) if isinstance(error, str) else ""


def as_object(value: Any) -> dict[str, Any]:
    """A JSON object. Raises `MalformedResponse`."""
    if not isinstance(value, dict):
        raise MalformedResponse
    return value


def as_text(value: Any) -> str:
    """Text that can be encoded as UTF-8; lone surrogates are replaced. Raises `MalformedResponse`."""
    if not isinstance(value, str):
        raise MalformedResponse
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text_or_empty(value: Any) -> str:
    """Optional text: empty if it is missing or is not text."""
    return as_text(value) if isinstance(value, str) else ""


def token_count(value: Any) -> int:
    """A number of tokens; 0 if it is missing or is not a plausible number."""
    return value if type(value) is int and 0 <= value <= limits.REPLY_TOKENS else 0
