"""The parts of a message's content: text and images, in OpenAI's form or in one that other clients send.

https://platform.openai.com/docs/api-reference/chat/create. Whatever could change an answer and is not supported is
refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from llava_cli import limits
from llava_cli.server.api_error import ApiError

_TEXT_TYPES = ("text", "input_text", "output_text")
"""The types of a text part, including those of the Responses API."""
_IGNORED = {"id", "index", "name", "metadata", "cache_control", "annotations", "detail", "mime_type"}
_STRUCTURED = {"metadata", "cache_control", "annotations", "reasoning_details", "llava", "parsed"}
"""The ignored members that may be lists or objects; in any other there could be an image."""


@dataclass(frozen=True)
class ImageUrl:
    """An image of a message: a `data:` URL, or one to fetch."""

    url: str


class Part(BaseModel):
    """One part of a message's content."""

    model_config = ConfigDict(extra="allow")

    type: str

    def parse(self, place: str) -> str | ImageUrl:
        """The part's text or image; `place` names it in errors. Raises `ApiError`."""
        members = dict(self.model_extra or {})
        if self.type in _TEXT_TYPES:
            part: str | ImageUrl = _text(members.pop("text", ""), f"{place}.text")
        elif self.type in _IMAGE_URLS:
            part = ImageUrl(_IMAGE_URLS[self.type](members, place).strip())
        else:
            reason = f"{place}.type: {self.type[: limits.NAME_CHARACTERS]!r} is not supported; text and image_url are"
            raise ApiError(400, reason, f"{place}.type")
        check_unknown(members, _IGNORED, f"{place}.")
        return part


def check_unknown(members: Mapping[str, Any], ignored: Collection[str], prefix: str) -> None:
    """Raises `ApiError` if one of these members has a value and is not among those that are safe to ignore."""
    for name, value in members.items():
        is_plain = name in _STRUCTURED or not isinstance(value, (list, dict))
        if value and not (name in ignored and is_plain):
            name = f"{prefix}{name[: limits.NAME_CHARACTERS]}"
            raise ApiError(400, f"{name} is not supported", name, "unsupported_parameter")


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ApiError(400, f"{place}: has to be text", place)
    return value


def _required_text(value: Any, place: str) -> str:
    if value is None:
        raise ApiError(400, f"{place}: is missing", place)
    return _text(value, place)


def _openai_image_url(members: dict[str, Any], place: str) -> str:
    """`{"image_url": {"url": …}}`, or `{"image_url": …}` as in the Responses API."""
    value, place = members.pop("image_url", None), f"{place}.image_url"
    if not isinstance(value, Mapping):
        return _required_text(value, place)
    inner = dict(value)
    url = inner.pop("url", None)
    check_unknown(inner, {"detail", "format"}, f"{place}.")
    return _required_text(url, f"{place}.url")


def _other_image_url(members: dict[str, Any], place: str) -> str:
    """Anthropic's `{"source": {…}}`, LangChain's `{"base64": …}` and others, as a URL."""
    source = members.pop("source", None)
    image = dict(source) if isinstance(source, Mapping) else members
    for name in ("type", "source_type"):
        if image.get(name) in ("base64", "url"):
            del image[name]
    type_names = [name for name in ("media_type", "mime_type", "mimeType") if isinstance(image.get(name), str)]
    media_type = image.pop(type_names[0]) if type_names else ""
    names = [name for name in ("url", "data", "base64", "image") if name in image]
    if len(names) != 1:
        reason = "two pictures in one part" if names else "a picture by its url, or its data in base64, is missing"
        raise ApiError(400, f"{place}: {reason}", place)
    value = _text(image.pop(names[0]), f"{place}.{names[0]}")
    if image is not members:
        check_unknown(image, _IGNORED, f"{place}.source.")
    is_url = names[0] == "url" or ":" in value[:10]
    return value if is_url else f"data:{media_type[: limits.NAME_CHARACTERS]};base64,{value}"


_IMAGE_URLS: dict[str, Callable[[dict[str, Any], str], str]] = {
    "image_url": _openai_image_url,
    "input_image": _openai_image_url,
    "image": _other_image_url,
}
"""Part type -> the function that takes the image's URL out of the part's members."""
