"""Collects the chunks of a chat completion into an answer."""

from __future__ import annotations

import time
from typing import Any

from llava_cli.engine.base import Answer, FinishReason
from llava_cli.engine.remote.openai_response import Message, finish_reason, first_choice, parse_message, token_count
from llava_cli.untrusted_text import one_line


class AnswerBuilder:
    """An answer in the making: `add` each event, then ask for `failure` and `answer`.

    White space before it is left out, unless `keeps_space`: it may belong to the form that was asked for.
    """

    def __init__(self, keeps_space: bool = False) -> None:
        self._keeps_space = keeps_space
        self._begin = time.perf_counter()
        self._first_token: float | None = None
        self._text: list[str] = []
        self._other: list[Message] = []
        """Messages with something besides text: a refusal, reasoning or tool calls."""
        self._usage: Any = None
        self.openai_choices: list[dict[str, Any]] = []
        """The members of `choices` that the answer is made of, as they came."""
        self._pieces = 0
        self.has_choices = False
        self.finish_reason: str | None = None

    def add(self, event: dict[str, Any]) -> tuple[str, bool]:
        """Adds one event; returns its new text, and whether it shows progress, reasoning included.

        Raises `MalformedResponse`.
        """
        self._usage = event.get("usage") or self._usage
        if event.get("choices") in (None, []):  # only the usage, or nothing
            return "", False
        choice, self.has_choices = first_choice(event), True
        self.finish_reason = finish_reason(choice) or self.finish_reason
        message = parse_message(choice)
        self.openai_choices.append(choice)
        if message.refusal or message.reasoning or message.has_tool_calls:
            self._other.append(message)
        if text := message.text if self._text or self._keeps_space else message.text.lstrip():
            self._first_token = self._first_token or time.perf_counter()
            self._text.append(text)
            self._pieces += "delta" in choice
        return text, bool(message.text or message.reasoning or message.refusal)

    def failure(self) -> str | None:
        """Why the events are not a complete answer, in words that follow the server's name; None if they are one."""
        refusal, reasoning = ("".join(getattr(m, name) for m in self._other) for name in ("refusal", "reasoning"))
        if refusal:
            return f"refuses to answer: {one_line(refusal)}"
        if self.finish_reason == "content_filter":
            return f"its content filter {'cuts the answer off' if self._text else 'holds the answer back'}"
        if self.finish_reason == "error":
            return "fails in the middle of its answer"
        if self._text:
            return None
        if self.finish_reason == "refusal":
            return "refuses to answer"
        if any(message.has_tool_calls for message in self._other) or self.finish_reason == "tool_calls":
            return "calls a tool, and does not answer"
        return f"thinks, and does not answer: {one_line(reasoning)}" if reasoning else None

    def answer(self) -> Answer:
        """The whole answer. If the server reports no usage, the number of chunks stands in for the answer's tokens."""
        now = time.perf_counter()
        usage = self._usage if isinstance(self._usage, dict) else {}
        details = usage.get("prompt_tokens_details")
        reason: FinishReason = "length" if self.finish_reason == "length" else "stop"
        return Answer(
            text="".join(self._text),
            finish_reason=reason,
            prompt_tokens=token_count(usage.get("prompt_tokens")),
            cached_tokens=token_count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
            answer_tokens=token_count(usage.get("completion_tokens")) or self._pieces,
            first_token_seconds=(self._first_token or now) - self._begin,
            total_seconds=now - self._begin,
        )
