"""A prompt's pictures -> model inputs: fitted as in training, and made once although every turn repeats them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_cli import limits
from llava_cli.images.resize import Resize, Shape, limit_size, make_square
from llava_cli.settings import Fit

if TYPE_CHECKING:
    from PIL.Image import Image


_RESIZING = frozenset({"size", "resample", "do_resize", "do_pad", "image_mean"})
"""Options on which a `Resize` depends."""
_FILTERS = range(6)
"""Pillow's numbers."""


class ProcessedImages(NamedTuple):
    """Pictures, the options that they were processed with, and the model inputs that resulted."""

    images: list[Image]
    options: dict[str, Any]
    inputs: dict[str, Any]


class ImageProcessor:
    """Takes the place of a checkpoint's image processor: fits pictures first, and keeps what was made of the last ones.

    With `mode` "pad" or "crop" every picture is made square; with "auto" the checkpoint's processor gets it as it is.
    """

    def __init__(self, image_processor: Any, mode: Fit, options: Collection[str] = ()) -> None:
        """`options` are the names of those that the tokenizer's files set in each call, too."""
        self._image_processor, self._mode = image_processor, mode
        self.last: ProcessedImages | None = None
        self.options: dict[str, Any] | None = None
        """Those of the last call."""
        self.picture_resize = None if _RESIZING.intersection(options) else _resize_of(image_processor, mode)
        """What it does to the size of every picture first; None where that depends on the picture, or is not known."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)

    def process(self, images: list[Image]) -> ProcessedImages | None:
        """Processes pictures with the options of the last call; None if there was none.

        Changes nothing here, so it needs no lock: assign the result to `last` before the next call with these pictures.
        """
        if (last := self.last) and _same_images(last.images, images):
            return last
        return None if self.options is None else self._process(images, self.options)

    def __call__(self, images: list[Image], **options: Any) -> Any:
        from transformers import BatchFeature

        images = images[0] if isinstance(images[0], list) else images
        self.options = options
        if self.last is None or not _same_images(self.last.images, images) or self.last.options != options:
            self.last = self._process(images, options)
        return BatchFeature(dict(self.last.inputs))  # a copy, because some processors remove items from it

    def fit(self, image: Image) -> Image:
        """A picture as the checkpoint's processor gets it."""
        if self._mode == "auto":
            return limit_size(image)
        return make_square(image, self._mode, _fill(self._image_processor))

    def _process(self, images: list[Image], options: dict[str, Any]) -> ProcessedImages:
        # A nested list says that the pictures belong to one prompt: LLaVA-OneVision's does not cut several into tiles.
        fitted = [[(self.picture_resize or self.fit)(image) for image in images]]
        return ProcessedImages(images, options, dict(self._image_processor(fitted, **options)))


def _same_images(first: list[Image], second: list[Image]) -> bool:
    """Whether two lists hold the same picture objects in the same order."""
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _fill(image_processor: Any) -> tuple[int, int, int]:
    """The mean color of a processor's training, as it pads."""
    red, green, blue = (int(255 * m) for m in getattr(image_processor, "image_mean", None) or (0.5, 0.5, 0.5))
    return red, green, blue


def _resize_of(image_processor: Any, mode: Fit) -> Resize | None:
    """What a processor does to the size of every picture that it gets with this `mode`, if it is one size for all.

    Pillow does the same to a picture before the processor, which makes several copies of it until it comes to that,
    and then finds nothing left to do. None where a processor does anything else first, as far as is known.
    """
    from transformers.image_processing_backends import PilBackend
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    kind, own = type(image_processor), ("preprocess", "process_image", "resize")
    if not issubclass(kind, PilBackend) or any(getattr(kind, name) is not getattr(PilBackend, name) for name in own):
        return None
    pads = False  # before it resizes
    if kind._preprocess is LlavaImageProcessorPil._preprocess:
        pads = bool(image_processor.do_pad) and mode == "auto"
    elif kind._preprocess is not PilBackend._preprocess:  # which resizes first
        return None
    size, resample = image_processor.size, image_processor.resample
    if not image_processor.do_resize or not size or size.longest_edge or size.max_height or resample not in _FILTERS:
        return None
    side = size.shortest_edge
    width, height = (side, side) if side else (size.width, size.height)
    shape: Shape = mode if mode != "auto" else "pad" if pads else "shortest_edge" if side else "stretch"
    if not width or not height or width * height > limits.PICTURE_PIXELS or (shape != "stretch" and width != height):
        return None
    if shape != "pad" or (pads and not image_processor.image_mean):  # which pads with black
        return Resize(width, height, shape, int(resample))
    try:
        fill = _fill(image_processor)
    except (TypeError, ValueError):  # which the processor says when it is used
        return None
    return Resize(width, height, shape, int(resample), fill) if all(0 <= one <= 255 for one in fill) else None
