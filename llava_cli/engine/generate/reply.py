"""One answer in the making: tokens in, certain text out, at last the `Answer`."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from typing import Any

from llava_cli.engine.base import Answer, FinishReason
from llava_cli.engine.generate.detokenizer import TextStream


class Reply:
    """Takes an answer's tokens until it is `done`: by an end token, a stop text, or as many as it may have.

    `stop` are the texts and `ends` the token ids that end it, `most` is how many tokens it may have; `begin` is
    when its conversation was taken up (`time.perf_counter`).
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], ends: Container[int], most: int, begin: float) -> None:
        self._text, self._ends, self._most = TextStream(tokenizer, stop), ends, most
        self._begin = self._first = begin
        self._parts: list[str] = []
        self._tokens, self._ended = 0, False

    def put(self, token: int, show: bool = True) -> str:
        """One more token -> the text that has become certain; none where nobody is to be shown it yet."""
        self._tokens += 1
        if self._tokens == 1:
            self._first = time.perf_counter()
        self._ended = token in self._ends
        return "" if self._ended else self._keep(self._text.put(token, show))

    @property
    def done(self) -> bool:
        return self._ended or self._text.stopped or self._tokens >= self._most

    def end(self) -> str:
        """The text that was still held back."""
        return self._keep(self._text.end())

    def answer(self, prompt_tokens: int, cached_tokens: int = 0) -> Answer:
        """The whole of it."""
        reason: FinishReason = "stop" if self._ended or self._text.stopped else "length"
        return Answer(
            text="".join(self._parts),
            finish_reason=reason,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            answer_tokens=self._tokens,
            first_token_seconds=self._first - self._begin,
            total_seconds=time.perf_counter() - self._begin,
        )

    def _keep(self, piece: str) -> str:
        self._parts.append(piece)
        return piece
