"""Errors as clients see them: an HTTP status and a body in OpenAI's form.

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from typing import Any

from llava_cli.errors import BadImage, LlavaError, OutOfMemory, PromptTooLong, SandboxUnavailable, UsageError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request is refused or has failed.

    `param` and `code` are OpenAI's. With `retry_after` the client may ask again after so many seconds; with `close`
    the connection ends with this response, because the rest of the request is not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.close = retry_after, close

    @classmethod
    def from_engine(cls, error: LlavaError) -> ApiError:
        """An engine's error for a client, without anything about this machine."""
        if isinstance(error, PromptTooLong):
            return cls(400, str(error), "messages", "context_length_exceeded")
        if isinstance(error, OutOfMemory):
            return cls(503, "not enough memory for this request", code="out_of_memory", retry_after=5)
        if isinstance(error, SandboxUnavailable):
            return cls(503, "no process can be started for this request now", code="overloaded", retry_after=5)
        if isinstance(error, UsageError) and error.thing.startswith("--"):  # an answer that its form cannot have
            option = error.thing[2:]
            return cls(400, f"{option}: {error.reason}", option)
        if isinstance(error, (BadImage, UsageError)):
            return cls(400, str(error), "messages")
        return cls(500, "the model failed while answering", code="model_failed")

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**headers, "Connection": "close"} if self.close else headers
