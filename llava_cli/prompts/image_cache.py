"""Keeps what an image processor made of the last prompt's pictures: every turn of a chat repeats them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image


class ProcessedImages(NamedTuple):
    """Pictures, the options that they were processed with, and the model inputs that resulted."""

    images: list[Image]
    options: dict[str, Any]
    inputs: dict[str, Any]


class ProcessedImageCache:
    """Takes the place of a checkpoint's image processor, and does not process the same pictures twice in a row."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self.last: ProcessedImages | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)

    def process(self, images: list[Image]) -> ProcessedImages | None:
        """Processes pictures with the options of the last call; None if there was none.

        Changes nothing here, so it needs no lock: assign the result to `last` before the next call with these pictures.
        """
        if self.last is None or same_images(self.last.images, images):
            return self.last
        return self._process(images, self.last.options)

    def __call__(self, images: list[Image], **options: Any) -> Any:
        from transformers import BatchFeature

        images = images[0] if isinstance(images[0], list) else images
        if self.last is None or not same_images(self.last.images, images) or self.last.options != options:
            self.last = self._process(images, options)
        return BatchFeature(dict(self.last.inputs))  # a copy, because some processors remove items from it

    def _process(self, images: list[Image], options: dict[str, Any]) -> ProcessedImages:
        # A nested list says that the pictures belong to one prompt: LLaVA-OneVision's does not cut several into tiles.
        return ProcessedImages(images, options, dict(self._image_processor([images], **options)))


def same_images(first: list[Image], second: list[Image]) -> bool:
    """Whether two lists hold the same picture objects in the same order."""
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
