"""The messages of a chat completions request -> a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from llava_cli import limits
from llava_cli.conversation import Conversation, Picture, Turn
from llava_cli.server.api_error import ApiError
from llava_cli.server.content_parts import ImageUrl, Part, check_unknown

OpenUrl = Callable[[str, str], Picture]
"""Opens the image behind a URL; the second argument is what errors call it. Raises `ApiError`."""
_SYSTEM_ROLES = ("system", "developer")
_ROLES = (*_SYSTEM_ROLES, "user", "assistant")
_IGNORED = {
    *("name", "id", "type", "status", "metadata", "cache_control", "annotations", "timestamp", "weight"),
    *("reasoning", "reasoning_content", "reasoning_details"),  # of earlier answers, which no model reads again
}
_OF_ANSWERS = {"llava", "parsed"}
"""What our answers have beside their text, and what OpenAI's client makes of that; clients send them back."""


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | Annotated[list[Part | str], Field(fail_fast=True)] | None = None

    def parts(self, place: str) -> list[str | ImageUrl]:
        """The texts and images, in order, without empty texts. Raises `ApiError`."""
        ignored = _IGNORED | _OF_ANSWERS if self.role == "assistant" else _IGNORED
        check_unknown(self.model_extra or {}, ignored, f"{place}.")
        if self.role not in _ROLES:
            reason = f"{place}.role: {self.role[: limits.NAME_CHARACTERS]!r} is not one of {', '.join(_ROLES)}"
            raise ApiError(400, reason, f"{place}.role")
        content = self.content if isinstance(self.content, list) else [self.content or ""]
        parts = [
            part if isinstance(part, str) else part.parse(f"{place}.content.{index}")
            for index, part in enumerate(content)
        ]
        if self.role != "user" and any(isinstance(part, ImageUrl) for part in parts):
            raise ApiError(400, f"{place}: pictures are for messages of role user", place)
        return [part for part in parts if part != ""]


def build_conversation(
    messages: Sequence[tuple[str, list[str | ImageUrl]]], default_system: str | None, open_url: OpenUrl
) -> Conversation:
    """The conversation that (role, parts) pairs make.

    The first system messages are the conversation's system text, `default_system` if there are none; later ones are
    the system text of the turn that follows. An empty assistant message at the end is ignored.
    """
    messages = list(messages)
    if messages and messages[-1] == ("assistant", []):
        messages.pop()
    first = next((index for index, (role, _) in enumerate(messages) if role not in _SYSTEM_ROLES), len(messages))
    system = "\n".join(str(part) for _, parts in messages[:first] for part in parts) or default_system
    turns: list[Turn] = []
    questions: list[list[str | Picture]] = []
    instructions: list[str] = []
    picture_count = 0
    for role, parts in messages[first:]:
        if role == "assistant":
            turns += _turns(questions, "\n".join(map(str, parts)), instructions)
            questions, instructions = [], []
        elif role in _SYSTEM_ROLES:
            if questions:
                turns += _turns(questions, None, instructions)
                questions, instructions = [], []
            instructions += map(str, parts)
        else:
            questions.append([])
            for part in parts:
                picture_count += isinstance(part, ImageUrl)
                questions[-1].append(part if isinstance(part, str) else open_url(part.url, f"picture {picture_count}"))
    turns += _turns(questions, None, instructions) if questions or instructions else []
    return Conversation(tuple(turns), system)


def _turns(questions: list[list[str | Picture]], answer: str | None, instructions: list[str]) -> list[Turn]:
    """Consecutive user messages as one turn, or as several where merging them would move their images.

    Without user messages the turn is `is_unasked`.
    """
    merged = Turn.of([part for question in questions for part in question], answer)
    if len(questions) < 2 or sum(isinstance(part, str) for part in merged.parts) < 2:
        turns = [replace(merged, is_unasked=not questions)]
    else:
        turns = [*(Turn.of(question) for question in questions[:-1]), Turn.of(questions[-1], answer)]
    system = "\n".join(instructions) or None
    return [replace(turns[0], system=system), *turns[1:]]
