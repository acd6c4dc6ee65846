"""Whether an answer depends on the pictures that it is about: the same question about gray ones."""

from __future__ import annotations

from collections.abc import Mapping

from llava_cli.conversation import Conversation, Picture

GRAY = (127, 127, 127)


def unseen(conversation: Conversation) -> Conversation:
    """The conversation about uniformly gray pictures of the same sizes, whose prompt has as many tokens."""
    return conversation.with_pictures(_gray)


def _gray(picture: Picture) -> Picture:
    from PIL import Image

    return picture.with_image(Image.new("RGB", picture.size, GRAY), sha256="", frames=1)


def total_variation(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The distance of two distributions over the same choices, from 0 to 1: how much probability moves."""
    return sum(abs(probability - other[choice]) for choice, probability in one.items()) / 2
