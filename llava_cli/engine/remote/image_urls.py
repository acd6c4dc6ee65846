"""A picture as a `data:` URL (RFC 2397), which is how chat completions requests carry images."""

from __future__ import annotations

import base64
import io
from typing import Any

from llava_cli.conversation import Picture

_MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png"}
"""The formats that every server accepts."""


def original_file_url(picture: Picture) -> str:
    """The picture's original bytes, for servers that decode them as we do; a truncated file is encoded anew as PNG."""
    if picture.data and not picture.truncated:
        return _data_url("", picture.data)
    return _encoded_url(picture, "PNG")


def portable_url(picture: Picture) -> str:
    """The original bytes if every decoder reads them as ours does, otherwise our decoded pixels, encoded anew."""
    if picture.data and picture.plain and picture.format in _MEDIA_TYPES:
        return _data_url(_MEDIA_TYPES[picture.format], picture.data)
    # A JPEG has lost detail already and may lose a little more; everything else stays lossless.
    return _encoded_url(picture, "JPEG" if picture.format == "JPEG" else "PNG")


def _encoded_url(picture: Picture, image_format: str) -> str:
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if image_format == "JPEG" else {"compress_level": 1}
    picture.image.save(file := io.BytesIO(), image_format, **options)
    return _data_url(_MEDIA_TYPES[image_format], file.getvalue())


def _data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
