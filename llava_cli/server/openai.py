"""OpenAI's chat completions: their requests as conversations, answers and errors in their shapes.

https://platform.openai.com/docs/api-reference/chat. What would change an answer and is not done here is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from llava_cli import limits
from llava_cli.conversation import Conversation, Picture, Turn
from llava_cli.engine import Answer
from llava_cli.engine.generate.batch import Likelihood
from llava_cli.errors import BadImage, LlavaError, OutOfMemory, PromptTooLong, UsageError
from llava_cli.settings import Sampling

_UNDONE: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "thinking": ({"type": "disabled"},),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "length_penalty": (1,),
    "typical_p": (1,),
    "best_of": (1,),
    "top_k": (-1,),
    "add_generation_prompt": (True,),
    "skip_special_tokens": (True,),
}
"""What is not done here, and what it may be set to all the same, beside nothing. What is not in it may not be set."""
_HARMLESS = {
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "cache_prompt", "keep_alive", "request_id", "session_id", "chat_id", "id"),
}
"""What a request may say besides, for no answer depends on it."""
_HARMLESS_IN_MESSAGES = {
    *("name", "id", "type", "status", "metadata", "cache_control", "annotations", "timestamp", "weight"),
    *("reasoning", "reasoning_content", "reasoning_details"),  # of earlier answers, which no model reads again
}
_HARMLESS_IN_PARTS = {"id", "index", "name", "metadata", "cache_control", "annotations", "detail", "mime_type"}
_STRUCTURED = {"metadata", "cache_control", "annotations", "reasoning_details"}
"""What of all these is more than a word or a number: anywhere else there could be a picture in it."""
_SYSTEM = ("system", "developer")
_ROLES = (*_SYSTEM, "user", "assistant")
_TEXTS = ("text", "input_text", "output_text")
"""What a part with text is called, in the words of the Responses API too."""


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


@dataclass(frozen=True)
class Shown:
    """A picture of a message, by its URL."""

    url: str


class Part(BaseModel):
    """A part of a message's content, in OpenAI's form or in one that other clients send."""

    model_config = ConfigDict(extra="allow")

    type: str

    def read(self, place: str) -> str | Shown:
        """Its text or its picture. Raises `Refusal` for what is neither, or more."""
        extra = dict(self.model_extra or {})
        if self.type in _TEXTS:
            read: str | Shown = _text_of(extra.pop("text", ""), f"{place}.text")
        elif self.type in _PICTURES:
            read = Shown(_PICTURES[self.type](extra, place).strip())
        else:
            reason = f"{place}.type: {self.type[: limits.NAME_CHARACTERS]!r} is not supported; text and image_url are"
            raise Refusal(400, reason, f"{place}.type")
        _check_rest(extra, _HARMLESS_IN_PARTS, f"{place}.")
        return read


def _text_of(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise Refusal(400, f"{place}: has to be text", place)
    return value


def _image_url(extra: dict[str, Any], place: str) -> str:
    """OpenAI's `{"image_url": {"url": …}}`, or the URL itself, as its Responses API has it."""
    value = extra.pop("image_url", None)
    if isinstance(value, Mapping):
        rest, place = dict(value), f"{place}.image_url"
        value = rest.pop("url", None)
        _check_rest(rest, {"detail", "format"}, f"{place}.")
        return _text_of(_there(value, f"{place}.url"), f"{place}.url")
    return _text_of(_there(value, f"{place}.image_url"), f"{place}.image_url")


def _image(extra: dict[str, Any], place: str) -> str:
    """Anthropic's `{"source": {…}}`, LangChain's `{"base64": …}` and others: a URL, or data in base64."""
    source = extra.pop("source", None)
    found = dict(source) if isinstance(source, Mapping) else extra
    for name in ("type", "source_type"):
        if found.get(name) in ("base64", "url"):
            del found[name]
    kinds = [name for name in ("media_type", "mime_type", "mimeType") if isinstance(found.get(name), str)]
    kind = found.pop(kinds[0]) if kinds else ""
    names = [name for name in ("url", "data", "base64", "image") if name in found]
    if len(names) != 1:
        what = "two pictures in one part" if names else "a picture by its url, or its data in base64, is missing"
        raise Refusal(400, f"{place}: {what}", place)
    value = _text_of(found.pop(names[0]), f"{place}.{names[0]}")
    if found is not extra:
        _check_rest(found, _HARMLESS_IN_PARTS, f"{place}.source.")
    is_url = names[0] == "url" or ":" in value[:10]
    return value if is_url else f"data:{kind[: limits.NAME_CHARACTERS]};base64,{value}"


def _there(value: Any, place: str) -> Any:
    if value is None:
        raise Refusal(400, f"{place}: is missing", place)
    return value


_PICTURES: dict[str, Callable[[dict[str, Any], str], str]] = {
    "image_url": _image_url,
    "input_image": _image_url,
    "image": _image,
}
"""How the URL of a part's picture is found, which is taken out of its members."""


def _check_rest(rest: Mapping[str, Any], harmless: Collection[str], place: str) -> None:
    """Raises `Refusal` for what says something, and would be passed over."""
    for name, value in rest.items():
        is_plain = name in _STRUCTURED or not isinstance(value, (list, dict))
        if value and not (name in harmless and is_plain):
            name = f"{place}{name[: limits.NAME_CHARACTERS]}"
            raise Refusal(400, f"{name} is not supported", name, "unsupported_parameter")


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | Annotated[list[Part | str], Field(fail_fast=True)] | None = None

    def parts(self, place: str) -> list[str | Shown]:
        """Its texts and pictures, in order. Raises `Refusal` for what it has besides."""
        _check_rest(self.model_extra or {}, _HARMLESS_IN_MESSAGES, f"{place}.")
        if self.role not in _ROLES:
            reason = f"{place}.role: {self.role[: limits.NAME_CHARACTERS]!r} is not one of {', '.join(_ROLES)}"
            raise Refusal(400, reason, f"{place}.role")
        content = self.content if isinstance(self.content, list) else [self.content or ""]
        parts = [
            part if isinstance(part, str) else part.read(f"{place}.content.{number}")
            for number, part in enumerate(content)
        ]
        if self.role != "user" and any(isinstance(part, Shown) for part in parts):
            raise Refusal(400, f"{place}: pictures are for messages of role user", place)
        return [part for part in parts if part != ""]


class StreamOptions(BaseModel):
    include_usage: bool = False


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("has to be a number")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]


class ChatRequest(BaseModel):
    """The body of `POST /v1/chat/completions`. What is None is as the server was started with."""

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[Message], Field(fail_fast=True)]
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    seed: Int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    n: Int | None = 1

    def check(self) -> None:
        """Raises `Refusal` for what is not done here, or is too much."""
        extra = self.model_extra or {}
        _check_rest({n: v for n, v in extra.items() if v not in _UNDONE.get(n, ())}, _HARMLESS, "")
        if self.n not in (None, 1):
            raise Refusal(400, "n: one answer at a time", "n", "unsupported_parameter")
        if isinstance(self.stop, list) and len(self.stop) > limits.REQUEST_STOPS:
            raise Refusal(400, f"stop: at most {limits.REQUEST_STOPS} texts", "stop")
        parts = [part for message in self._parts() for part in message]
        if sum(isinstance(part, Shown) for part in parts) > limits.REQUEST_PICTURES:
            raise Refusal(400, f"at most {limits.REQUEST_PICTURES} pictures", "messages")
        if (length := sum(len(part) for part in parts if isinstance(part, str))) > limits.TEXT_CHARACTERS:
            reason = f"prompt: {length:,} characters of text; a request has at most {limits.TEXT_CHARACTERS:,}"
            raise Refusal(400, reason, "messages", "context_length_exceeded")

    def _parts(self) -> list[list[str | Shown]]:
        """What each message says."""
        return [message.parts(f"messages.{number}") for number, message in enumerate(self.messages)]

    def pictures(self) -> list[str]:
        """The URLs of its pictures, in order."""
        return [part.url for message in self._parts() for part in message if isinstance(part, Shown)]

    def sampling(self, usual: Sampling) -> Sampling:
        """How to answer; `usual` where the request does not say."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        given = {"max_tokens": most, "temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        stop = tuple(filter(None, (self.stop,) if isinstance(self.stop, str) else self.stop or ())) or None
        said: dict[str, Any] = {name: value for name, value in {**given, "stop": stop}.items() if value is not None}
        try:
            values = {name: getattr(usual, name) for name in Sampling.names()} | said
            return Sampling(**values, unset=usual.unset - said.keys())
        except UsageError as error:
            raise Refusal(400, str(error), error.thing) from None

    def question(self, usual: str | None, open_url: Callable[[str, str], Picture]) -> Conversation:
        """Its messages as a conversation that is to be answered; `usual` is the system text of one that has none."""
        conversation = self.conversation(usual, open_url)
        last = conversation.turns[-1] if conversation.turns else None
        if last is None or last.answer is not None:
            reason = "the last message has to be a user's; what an assistant's begins with is not gone on with"
            raise Refusal(400, reason, "messages")
        if not last.question.strip() and not last.pictures and not last.is_unasked:
            raise Refusal(400, "there is no question", "messages")
        return conversation

    def conversation(self, usual: str | None, open_url: Callable[[str, str], Picture]) -> Conversation:
        """Its messages, answered or not; a last one of an assistant's that is empty is as if it were left out."""
        said = list(zip((message.role for message in self.messages), self._parts(), strict=True))
        if said and said[-1] == ("assistant", []):
            said.pop()
        head = next((number for number, (role, _) in enumerate(said) if role not in _SYSTEM), len(said))
        system = "\n".join(str(part) for _, parts in said[:head] for part in parts) or usual
        turns: list[Turn] = []
        asked: list[list[str | Picture]] = []
        later: list[str] = []  # instructions before what is asked or answered next
        count = 0
        for role, parts in said[head:]:
            if role == "assistant":
                turns += _turns(asked, "\n".join(map(str, parts)), later)
                asked, later = [], []
            elif role in _SYSTEM:
                if asked:
                    turns += _turns(asked, None, later)
                    asked, later = [], []
                later += map(str, parts)
            else:
                asked.append([])
                for part in parts:
                    count += isinstance(part, Shown)
                    asked[-1].append(part if isinstance(part, str) else open_url(part.url, f"picture {count}"))
        turns += _turns(asked, None, later) if asked or later else []
        return Conversation(tuple(turns), system)


def _turns(asked: list[list[str | Picture]], answer: str | None, instructions: list[str]) -> list[Turn]:
    """Messages of a user's in a row: one question, or several where its pictures would change their places in one.

    Where there are none the model's side speaks unasked.
    """
    one = Turn.of([part for message in asked for part in message], answer)
    if len(asked) < 2 or sum(isinstance(part, str) for part in one.parts) < 2:
        turns = [replace(one, is_unasked=not asked)]
    else:
        turns = [*(Turn.of(message) for message in asked[:-1]), Turn.of(asked[-1], answer)]
    system = "\n".join(instructions) or None
    return [replace(turns[0], system=system), *turns[1:]]


def mistake(errors: Sequence[Any]) -> Refusal:
    """What is wrong with a body, of all that pydantic says: where it got farthest, for a content may be two things."""
    worst = max(errors, key=lambda error: len(error["loc"]))
    if not worst["loc"]:
        return Refusal(400, "the body has to be a JSON object")
    place = ".".join(str(part) for part in worst["loc"] if str(part) not in _KINDS and "[" not in str(part))
    words = {
        "missing": "is missing",
        "model_type": "has to be an object",
        "model_attributes_type": "has to be an object",
    }
    said = worst["msg"].removeprefix("Value error, ")
    message = words.get(worst["type"]) or said[:1].lower() + said[1:]
    return Refusal(400, f"{place}: {message}", place)


_KINDS = ("str", "int", "float", "bool", "Part")
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
