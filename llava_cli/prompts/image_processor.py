"""A prompt's pictures -> model inputs: fitted as in training, and made once although every turn repeats them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llava_cli import limits
from llava_cli.settings import Fit

if TYPE_CHECKING:
    from PIL.Image import Image


class ProcessedImages(NamedTuple):
    """Pictures, the options that they were processed with, and the model inputs that resulted."""

    images: list[Image]
    options: dict[str, Any]
    inputs: dict[str, Any]


class ImageProcessor:
    """Takes the place of a checkpoint's image processor: fits pictures first, and keeps what was made of the last ones.

    With `mode` "pad" or "crop" every picture is made square; with "auto" the checkpoint's processor gets it as it is.
    """

    def __init__(self, image_processor: Any, mode: Fit) -> None:
        self._image_processor, self._mode = image_processor, mode
        self.last: ProcessedImages | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)

    def process(self, images: list[Image]) -> ProcessedImages | None:
        """Processes pictures with the options of the last call; None if there was none.

        Changes nothing here, so it needs no lock: assign the result to `last` before the next call with these pictures.
        """
        if self.last is None or _same_images(self.last.images, images):
            return self.last
        return self._process(images, self.last.options)

    def __call__(self, images: list[Image], **options: Any) -> Any:
        from transformers import BatchFeature

        images = images[0] if isinstance(images[0], list) else images
        if self.last is None or not _same_images(self.last.images, images) or self.last.options != options:
            self.last = self._process(images, options)
        return BatchFeature(dict(self.last.inputs))  # a copy, because some processors remove items from it

    def fit(self, image: Image) -> Image:
        """A picture as the checkpoint's processor gets it."""
        if self._mode == "auto":
            return limit_size(image)
        mean = getattr(self._image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        red, green, blue = (int(255 * m) for m in mean)
        return make_square(image, self._mode, (red, green, blue))

    def _process(self, images: list[Image], options: dict[str, Any]) -> ProcessedImages:
        # A nested list says that the pictures belong to one prompt: LLaVA-OneVision's does not cut several into tiles.
        fitted = [[self.fit(image) for image in images]]
        return ProcessedImages(images, options, dict(self._image_processor(fitted, **options)))


def _same_images(first: list[Image], second: list[Image]) -> bool:
    """Whether two lists hold the same picture objects in the same order."""
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


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
