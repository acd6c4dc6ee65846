"""The size that pictures are brought to: in the process that decodes them, where fewer pixels have to be sent on."""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llava_cli import limits

if TYPE_CHECKING:
    from PIL.Image import Image

Shape = Literal["within", "shortest_edge", "stretch", "pad", "crop"]
_SHAPES: tuple[Shape, ...] = ("within", "shortest_edge", "stretch", "pad", "crop")
_FORMAT = struct.Struct("<BIIB3B")
_BICUBIC = 3
"""Pillow's number."""


@dataclass(frozen=True)
class Resize:
    """One size for pictures of every size. What has been brought to it stays as it is the next time.

    A picture is made to fit `within` it, or its shorter side gets the length of that of a square (`shortest_edge`, as
    in transformers), or it gets exactly this size: `stretch` gives up its shape, `pad` and `crop` make it square first,
    and are for squares.
    """

    width: int
    height: int
    shape: Shape
    resample: int = _BICUBIC
    """Pillow's number of a filter."""
    fill: tuple[int, int, int] = (0, 0, 0)
    """The color that pads."""

    @classmethod
    def within(cls, side: int) -> Resize:
        """At most so many pixels per side."""
        return cls(side, side, "within")

    def __call__(self, image: Image) -> Image:
        size = self.width, self.height
        if self.shape == "within":
            image.thumbnail(size)
            return image
        image = make_square(image, self.shape, self.fill) if self.shape in ("pad", "crop") else limit_size(image)
        if self.shape == "shortest_edge":
            longer = int(self.width * max(image.size) / min(image.size))
            size = (self.width, longer) if image.width <= image.height else (longer, self.width)
            if longer**2 > limits.PICTURE_PIXELS:  # of a strip, which is left as it is
                return image
        return image if image.size == size else image.resize(size, self.resample)


PACKED_BYTES = _FORMAT.size


def pack(resize: Resize | None) -> bytes:
    """`PACKED_BYTES` for a request to a process; `unpack` is the inverse."""
    if resize is None:
        return bytes(PACKED_BYTES)
    return _FORMAT.pack(_SHAPES.index(resize.shape), resize.width, resize.height, resize.resample, *resize.fill)


def unpack(data: bytes) -> Resize | None:
    shape, width, height, resample, *fill = _FORMAT.unpack(data)
    return Resize(width, height, _SHAPES[shape], resample, (fill[0], fill[1], fill[2])) if width else None


def resized(image: Image, packed: bytes) -> Image:
    """What a request asks to be made of an image; the image as it is where memory runs out: who asks has more."""
    if resize := unpack(packed):
        with suppress(MemoryError):
            return resize(image)
    return image


def limit_size(image: Image) -> Image:
    """The image itself, or a smaller copy so that padding it to a square stays within `limits.PICTURE_PIXELS`."""
    if max(image.size) ** 2 <= limits.PICTURE_PIXELS:
        return image
    image = image.copy()
    side = int(limits.PICTURE_PIXELS**0.5)
    image.thumbnail((side, side))
    return image


def make_square(image: Image, shape: Literal["pad", "crop"], fill: tuple[int, int, int]) -> Image:
    """A square of the longer side, padded with the color `fill` on both sides, or the middle square."""
    from PIL import Image

    # Whole pixels, rounded down, as in LLaVA's own code; ImageOps.pad and .fit round and resample.
    image = limit_size(image)
    width, height = image.size
    if width == height:
        return image
    if shape == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))
    side = max(width, height)
    padded = Image.new("RGB", (side, side), fill)
    padded.paste(image, ((side - width) // 2, (side - height) // 2))
    return padded
