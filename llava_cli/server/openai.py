"""OpenAI's chat completions: their requests as conversations, answers and errors in their shapes.

https://platform.openai.com/docs/api-reference/chat. What would change an answer and is not done here is refused.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llava_cli import limits
from llava_cli.conversation import Conversation, Picture, Turn
from llava_cli.engine import Answer
from llava_cli.engine.many import Likelihood
from llava_cli.errors import BadImage, LlavaError, OutOfMemory, PromptTooLong, UsageError
from llava_cli.settings import Sampling

_UNDONE: dict[str, tuple[Any, ...]] = {
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "logit_bias": (),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (),
    "presence_penalty": (),
    "repetition_penalty": (1,),
    "top_k": (-1,),
    "min_p": (),
}
"""What is not done here, and what it may be set to all the same, beside nothing."""
_SYSTEM = ("system", "developer")


class Refusal(Exception):
    """What a client is told: an HTTP status and an error of OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry: int | None = None,
        close: bool = False,
    ) -> None:
        """`retry` is after how many seconds to ask again; with `close` there may be more to come of the request."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry, self.close = retry, close

    @classmethod
    def of(cls, error: LlavaError) -> Refusal:
        """What an engine's error is to a client; what lies within this machine stays there."""
        if isinstance(error, PromptTooLong):
            return cls(400, str(error), "messages", "context_length_exceeded")
        if isinstance(error, OutOfMemory):
            return cls(503, "not enough memory for this request", code="out_of_memory", retry=5)
        if isinstance(error, (BadImage, UsageError)):
            return cls(400, str(error), "messages")
        return cls(500, "the model failed while answering", code="model_failed")

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        after = {} if self.retry is None else {"Retry-After": str(self.retry)}
        return {**after, "Connection": "close"} if self.close else after


class ImageUrl(BaseModel):
    url: str


class Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageUrl | None = None


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if part.type == "text")
        return self.content or ""

    def urls(self) -> list[str]:
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url if part.image_url else "" for part in parts if part.type == "image_url"]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of `POST /v1/chat/completions`. What is None is as the server was started with."""

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[Message], Field(fail_fast=True)]
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    n: int | None = 1

    def check(self) -> None:
        """Raises `Refusal` for what is not done here, or is too much."""
        for name, value in (self.model_extra or {}).items():
            if value and value not in _UNDONE.get(name, (value,)):
                raise Refusal(400, f"{name} is not supported", name, "unsupported_parameter")
        if self.n not in (None, 1):
            raise Refusal(400, "n: one answer at a time", "n", "unsupported_parameter")
        if isinstance(self.stop, list) and len(self.stop) > limits.REQUEST_STOPS:
            raise Refusal(400, f"stop: at most {limits.REQUEST_STOPS} texts", "stop")
        if len(self.pictures()) > limits.REQUEST_PICTURES:
            raise Refusal(400, f"at most {limits.REQUEST_PICTURES} pictures", "messages")
        if (length := sum(len(message.text()) for message in self.messages)) > limits.TEXT_CHARACTERS:
            reason = f"prompt: {length:,} characters of text; a request has at most {limits.TEXT_CHARACTERS:,}"
            raise Refusal(400, reason, "messages", "context_length_exceeded")

    def pictures(self) -> list[str]:
        """The URLs of its pictures, in order."""
        return [url for message in self.messages for url in message.urls()]

    def sampling(self, usual: Sampling) -> Sampling:
        """How to answer; `usual` where the request does not say."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        given = {"max_tokens": most, "temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()) or None
        said: dict[str, Any] = {name: value for name, value in {**given, "stop": stop}.items() if value is not None}
        try:
            return Sampling(**{**{field.name: getattr(usual, field.name) for field in fields(Sampling)}, **said})
        except UsageError as error:
            raise Refusal(400, str(error), error.thing) from None

    def question(self, usual: str | None, open_url: Callable[[str, str], Picture]) -> Conversation:
        """Its messages as a conversation that is to be answered; `usual` is the system text of one that has none."""
        conversation = self.conversation(usual, open_url)
        last = conversation.turns[-1] if conversation.turns else None
        if last is None or last.answer is not None:
            raise Refusal(400, "the last message has to be a user's", "messages")
        if not last.question.strip():
            raise Refusal(400, "there is no question", "messages")
        return conversation

    def conversation(self, usual: str | None, open_url: Callable[[str, str], Picture]) -> Conversation:
        """Its messages, answered or not; those of a user's in a row are one question."""
        system = "\n".join(m.text() for m in self.messages if m.role in _SYSTEM) or usual
        turns: list[Turn] = []
        number = itertools.count(1)
        for role, several in itertools.groupby((m for m in self.messages if m.role not in _SYSTEM), lambda m: m.role):
            messages = list(several)
            if role == "assistant":
                if not turns or len(messages) > 1 or messages[0].urls():
                    raise Refusal(400, "an assistant's message answers a user's, with text", "messages")
                turns[-1] = replace(turns[-1], answer=messages[0].text())
            else:
                text = "\n".join(filter(None, [message.text() for message in messages]))
                urls = [url for message in messages for url in message.urls()]
                turns.append(Turn(text, tuple(open_url(url, f"picture {next(number)}") for url in urls)))
        return Conversation(tuple(turns), system)


def mistake(errors: Sequence[Any]) -> Refusal:
    """What is wrong with a body, of all that pydantic says: where it got farthest, for a content may be two things."""
    worst = max(errors, key=lambda error: len(error["loc"]))
    if not worst["loc"]:
        return not_json()
    place = ".".join(str(part) for part in worst["loc"] if str(part) not in _KINDS and "[" not in str(part))
    words = {
        "missing": "is missing",
        "model_type": "has to be an object",
        "model_attributes_type": "has to be an object",
    }
    message = words.get(worst["type"]) or worst["msg"][:1].lower() + worst["msg"][1:]
    return Refusal(400, f"{place}: {message}", place)


def not_json() -> Refusal:
    return Refusal(400, "the body has to be a JSON object, sent as Content-Type: application/json")


_KINDS = ("str", "int", "float", "bool")
"""What pydantic calls a branch where a value may be several things."""


def usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.answer_tokens,
        "total_tokens": answer.prompt_tokens + answer.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


class Shapes:
    """The objects that one request is answered with."""

    def __init__(self, number: str, model: str, word: Callable[[int], str]) -> None:
        self._head = {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": model}
        self._word = word

    def whole(self, answer: Answer, likelihoods: Sequence[Likelihood] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
        choice["logprobs"] = self._logprobs(likelihoods)
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(answer)}

    def chunk(
        self, delta: dict[str, Any], reason: str | None = None, likelihoods: Sequence[Likelihood] | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": self._logprobs(likelihoods)}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def last(self, answer: Answer) -> dict[str, Any]:
        """A stream's last chunk, for those that asked what it took."""
        seconds = {"first_token": answer.first_token_seconds, "total": answer.total_seconds}
        return {
            **self._head,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": usage(answer),
            "seconds": seconds,
        }

    def _logprobs(self, likelihoods: Sequence[Likelihood] | None) -> dict[str, Any] | None:
        if likelihoods is None:
            return None
        return {
            "content": [
                {**self._one(one.token, one.logarithm), "top_logprobs": [self._one(*pair) for pair in one.likeliest]}
                for one in likelihoods
            ],
            "refusal": None,
        }

    def _one(self, token: int, logarithm: float) -> dict[str, Any]:
        text = self._word(token)
        return {"token": text, "logprob": max(logarithm, -9999.0), "bytes": list(text.encode())}
