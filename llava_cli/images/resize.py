"""Makes pictures smaller or square before a checkpoint's image processor sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llava_cli import limits

if TYPE_CHECKING:
    from PIL.Image import Image


def limit_size(image: Image) -> Image:
    """The image itself, or a smaller copy so that padding it to a square stays within `limits.PICTURE_PIXELS`."""
    if max(image.size) ** 2 <= limits.PICTURE_PIXELS:
        return image
    image = image.copy()
    side = int(limits.PICTURE_PIXELS**0.5)
    image.thumbnail((side, side))
    return image


def make_square(image: Image, mode: Literal["pad", "crop"], fill: tuple[int, int, int]) -> Image:
    """A square of the longer side, padded with the color `fill` on both sides, or the middle square."""
    from PIL import Image

    # Whole pixels, rounded down, as in LLaVA's own code; ImageOps.pad and .fit round and resample.
    image = limit_size(image)
    width, height = image.size
    if mode == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))
    side = max(width, height)
    padded = Image.new("RGB", (side, side), fill)
    padded.paste(image, ((side - width) // 2, (side - height) // 2))
    return padded
