"""What a server's error response means: which of our exceptions it is, and whether to ask again.

https://platform.openai.com/docs/guides/error-codes, and what vLLM, llama.cpp and others send in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from llava_cli.engine.remote.openai_response import RetryableError, error_message
from llava_cli.errors import BadData, BadImage, LlavaError, ModelUnusable, PromptTooLong
from llava_cli.settings import Sampling

_ERRORS: dict[str, type[LlavaError]] = {
    "context_length_exceeded": PromptTooLong,
    "exceed_context_size_error": PromptTooLong,  # llama.cpp
    "invalid_image": BadImage,
}
_STATUSES = {
    "insufficient_quota": 402,  # sent with 429, but asking again is no use
    "invalid_api_key": 401,
    "authentication_error": 401,
    "permission_error": 403,
    "model_not_found": 404,
    "not_found_error": 404,
    "NotFoundError": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "invalid_request_error": 400,
    "BadRequestError": 400,
}
"""The HTTP status that an error's code or type stands for, where the real status says nothing, as inside a stream."""
_TRY_AGAIN = (408, 413, 425, 429)

Hint = Callable[[int], str]
"""The next command to type when a server answers with this status."""


def error_from(
    server: str, hint: Hint, status: int, payload: dict[str, Any], retry_after: str | None = None
) -> Exception:
    """Translates an error payload: OpenAI's `{"error": {…}}`, or what other servers make of it.

    Returns a `RetryableError` if the server may answer later, otherwise a `LlavaError`.
    """
    error = payload.get("error", payload)
    error = error if isinstance(error, dict) else payload
    message = error_message(payload) or f"status {status}"
    code, kind = str(error.get("code")), str(error.get("type"))
    if known := _ERRORS.get(code) or _ERRORS.get(kind):
        thing, _, reason = message.partition(": ")
        return known(thing, reason) if reason and len(thing) < 20 else known("prompt", message)
    status = _actual_status(status, code, kind)
    if status in (401, 402, 403, 404):
        return ModelUnusable(server, message, hint(status))
    if status >= 500 or status in _TRY_AGAIN:
        words = "fails" if status >= 500 else "takes no more"
        return RetryableError(f"{words} ({message})", status, _seconds(retry_after))
    if "context length" in message:  # vLLM and others have no code for it
        return PromptTooLong("prompt", message)
    option = str(error.get("param")).replace("_", "-")
    is_option = error.get("param") in Sampling.names()
    return BadData(server, message, f"without --{option} it may answer" if is_option else "")


def _actual_status(status: int, code: str, kind: str) -> int:
    """The status that the error's code or type implies, if that is more precise than the one it was sent with."""
    if code.isdecimal() and 400 <= int(code[:9]) < 600:
        return int(code)
    if code == "insufficient_quota" or status >= 500:
        return _STATUSES.get(code) or _STATUSES.get(kind) or status
    return status


def _seconds(retry_after: str | None) -> float:
    """Seconds to wait according to a `Retry-After` header (RFC 9110, 10.2.3): a number, or a date."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        pass
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(retry_after or "").timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
