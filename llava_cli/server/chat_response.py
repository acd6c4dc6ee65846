"""The responses of `POST /v1/chat/completions`: a completion, or the chunks of a stream.

https://platform.openai.com/docs/api-reference/chat/object and …/chat/streaming
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from llava_cli.engine import Answer
from llava_cli.engine.generate.sequence import Likelihood

_MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


class ChatResponse:
    """Builds the objects that answer one request; `decode_token` gives the text of a token id."""

    def __init__(self, request_id: str, model: str, decode_token: Callable[[int], str]) -> None:
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        self._decode_token = decode_token

    def completion(self, answer: Answer, likelihoods: Sequence[Likelihood] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None, **details(answer)}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
        choice["logprobs"] = self._logprobs(likelihoods)
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)}

    def chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, likelihoods: Sequence[Likelihood] | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": self._logprobs(likelihoods)}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """The last chunk of a stream with `include_usage`."""
        seconds = {"first_token": answer.first_token_seconds, "total": answer.total_seconds}
        usage = {"usage": _usage(answer), "seconds": seconds}
        return {**self._head, "object": "chat.completion.chunk", "choices": [], **usage}

    def _logprobs(self, likelihoods: Sequence[Likelihood] | None) -> dict[str, Any] | None:
        if likelihoods is None:
            return None
        content = [
            {
                **self._logprob(likelihood.token, likelihood.logprob),
                "top_logprobs": [self._logprob(*pair) for pair in likelihood.top],
            }
            for likelihood in likelihoods
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._decode_token(token)
        return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": list(text.encode())}


def details(answer: Answer) -> dict[str, Any]:
    """The member of a message, or of a stream's last delta, with what was asked for besides the text."""
    return {"llava": answer.details()} if answer.details() else {}


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.answer_tokens,
        "total_tokens": answer.prompt_tokens + answer.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }
