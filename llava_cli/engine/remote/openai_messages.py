"""A conversation as the `messages` of a chat completions request.

https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llava_cli.conversation import Conversation, Picture, Turn

ImageUrl = Callable[[Picture], str]
"""Turns a picture into a URL that the server accepts."""


def messages(conversation: Conversation, image_url: ImageUrl) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = []
    if conversation.system is not None:
        result.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        if turn.system is not None:
            result.append({"role": "system", "content": turn.system})
        if not turn.is_unasked:
            result.append({"role": "user", "content": _content(turn, image_url)})
        if turn.answer is not None:
            result.append({"role": "assistant", "content": turn.answer})
    return result


def _content(turn: Turn, image_url: ImageUrl) -> str | list[dict[str, Any]]:
    """The question; text alone is a plain string, because some servers' templates accept nothing else."""
    if not turn.pictures:
        return turn.question
    texts = [turn.question] if turn.question else []
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": image_url(part)}}
        for part in turn.parts or (*turn.pictures, *texts)
    ]
