"""The body of `POST /v1/chat/completions`, checked, as a conversation and sampling options.

https://platform.openai.com/docs/api-reference/chat/create. Whatever could change an answer and is not supported is
refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from llava_cli import limits
from llava_cli.conversation import Conversation
from llava_cli.errors import UsageError
from llava_cli.server.answer_form import FIELDS, OVERRIDDEN, AnswerForm, is_text
from llava_cli.server.api_error import ApiError
from llava_cli.server.chat_messages import Message, OpenUrl, build_conversation
from llava_cli.server.content_parts import ImageUrl, check_unknown
from llava_cli.settings import OPTIONS, Sampling

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
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
"""Parameters that are not supported, with the values that mean the same as leaving them out."""
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "cache_prompt", "keep_alive", "request_id", "session_id", "chat_id", "id"),
}
"""Parameters that no answer depends on."""
_UNION_BRANCHES = ("str", "int", "float", "bool", "Part")
"""What pydantic puts into an error's location for the branch of a union."""


def _reject_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("has to be a number")
    return value


Int = Annotated[int, BeforeValidator(_reject_bool)]
Float = Annotated[float, BeforeValidator(_reject_bool)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """What is None is as the server was started with."""

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
    response_format: Any = None
    structured_outputs: Any = None
    guided_choice: Any = None
    guided_regex: Any = None
    guided_json: Any = None
    guided_grammar: Any = None
    json_schema: Any = None
    regex: Any = None
    llava: Any = None

    def check(self) -> None:
        """Raises `ApiError` for anything that is not supported or exceeds a limit."""
        extra = self.model_extra or {}
        check_unknown({n: v for n, v in extra.items() if v not in _UNSUPPORTED.get(n, ())}, _IGNORED, "")
        if self.n not in (None, 1):
            raise ApiError(400, "n: one answer at a time", "n", "unsupported_parameter")
        if isinstance(self.stop, list) and len(self.stop) > limits.REQUEST_STOPS:
            raise ApiError(400, f"stop: at most {limits.REQUEST_STOPS} texts", "stop")
        parts = [part for _, message_parts in self._messages() for part in message_parts]
        if sum(isinstance(part, ImageUrl) for part in parts) > limits.REQUEST_PICTURES:
            raise ApiError(400, f"at most {limits.REQUEST_PICTURES} pictures", "messages")
        if (length := sum(len(part) for part in parts if isinstance(part, str))) > limits.TEXT_CHARACTERS:
            reason = f"prompt: {length:,} characters of text; a request has at most {limits.TEXT_CHARACTERS:,}"
            raise ApiError(400, reason, "messages", "context_length_exceeded")

    def image_urls(self) -> list[str]:
        """The URLs of all images, in order. Raises `ApiError`."""
        return [part.url for _, parts in self._messages() for part in parts if isinstance(part, ImageUrl)]

    @property
    def has_form(self) -> bool:
        """Whether a form of the answer is asked for, which takes a while to read."""
        fields = {name: getattr(self, name) for name in FIELDS}
        return any(
            value is not None for name, value in fields.items() if name != "response_format" or not is_text(value)
        )

    def form(self) -> AnswerForm:
        """The form that the answer has to have. Raises `ApiError`."""
        fields = {name: getattr(self, name) for name in FIELDS}
        return AnswerForm({name: value for name, value in fields.items() if value is not None})

    def sampling(self, defaults: Sampling, form: AnswerForm) -> Sampling:
        """The sampling options, `defaults` where the request has none. Raises `ApiError`."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        stop = tuple(filter(None, (self.stop,) if isinstance(self.stop, str) else self.stop or ())) or None
        options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": stop,
        }
        options = {name: value for name, value in options.items() if value is not None} | form.options
        values = {name: getattr(defaults, name) for name in Sampling.names()}
        if form.is_said:
            values.update((name, OPTIONS[name].default) for name in OVERRIDDEN)
        if form.form:
            values["stop"] = OPTIONS["stop"].default
            if stop and form.form != "choices":
                raise ApiError(400, f"stop: {form.places[form.form]} says already where an answer ends", "stop")
        try:
            sampling = Sampling(**(values | options), unset=defaults.unset - options.keys())
        except UsageError as error:
            raise form.error(error) from None
        if self.logprobs and sampling.choices:
            reason = "logprobs: the answer is chosen, not generated; its message's `llava` has the probabilities"
            raise ApiError(400, reason, "logprobs", "unsupported_parameter")
        return sampling

    def question(self, default_system: str | None, open_url: OpenUrl) -> Conversation:
        """The conversation, whose last message must be a question. Raises `ApiError`."""
        conversation = self.conversation(default_system, open_url)
        last = conversation.turns[-1] if conversation.turns else None
        if last is None or last.answer is not None:
            reason = "the last message has to be a user's; an assistant's is not continued"
            raise ApiError(400, reason, "messages")
        if not last.question.strip() and not last.pictures and not last.is_unasked:
            raise ApiError(400, "there is no question", "messages")
        return conversation

    def conversation(self, default_system: str | None, open_url: OpenUrl) -> Conversation:
        """The conversation, answered or not; see `build_conversation`. Raises `ApiError`."""
        return build_conversation(self._messages(), default_system, open_url)

    def _messages(self) -> list[tuple[str, list[str | ImageUrl]]]:
        """Each message's role and parts."""
        return [(message.role, message.parts(f"messages.{index}")) for index, message in enumerate(self.messages)]


def validation_error(errors: Sequence[Any]) -> ApiError:
    """One of pydantic's errors as ours: the deepest, since for a union there is one error for each branch."""
    error = max(errors, key=lambda error: len(error["loc"]))
    if not error["loc"]:
        return ApiError(400, "the body has to be a JSON object")
    place = ".".join(str(part) for part in error["loc"] if str(part) not in _UNION_BRANCHES and "[" not in str(part))
    reasons = {
        "missing": "is missing",
        "model_type": "has to be an object",
        "model_attributes_type": "has to be an object",
    }
    message = error["msg"].removeprefix("Value error, ")
    reason = reasons.get(error["type"]) or message[:1].lower() + message[1:]
    return ApiError(400, f"{place}: {reason}", place)
