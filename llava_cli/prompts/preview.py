"""Draws pictures as the model sees them, from the pixels that the processor makes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli import files
from llava_cli.errors import ModelUnusable, OutputError, OutputTaken, os_reason, printable

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

GAP = 4
"""White pixels between tiles."""


def draw_model_view(inputs: dict[str, torch.Tensor], image_processor: Any) -> Image:
    """Draws the result of `Prompter.encode` as one image: a row for each picture, its tiles side by side.

    Raises `ModelUnusable` if the processor does not make tiles of [3, height, width].
    """
    from PIL import Image

    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.dim() not in (4, 5) or pixels.shape[-3] != 3:
        raise ModelUnusable("--save-view", "this model's processor gives no picture that can be drawn")
    pictures = [picture[None] if picture.dim() == 3 else picture for picture in pixels.float()]
    # Tiles of zeros are padding.
    rows = [[_tile(tile, image_processor) for tile in picture if tile.any()] for picture in pictures]
    height, width = pixels.shape[-2] + GAP, pixels.shape[-1] + GAP
    sheet = Image.new("RGB", (width * max(map(len, rows)) - GAP, height * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            sheet.paste(tile, (x * width, y * height))
    return sheet


def _tile(pixels: torch.Tensor, image_processor: Any) -> Image:
    """Undoes normalization and rescaling: pixels [3, height, width] as the vision tower takes them -> an image."""
    import torch
    from PIL import Image

    if getattr(image_processor, "do_normalize", False):
        mean, std = (
            torch.tensor(getattr(image_processor, name)).view(-1, 1, 1) for name in ("image_mean", "image_std")
        )
        pixels = pixels * std + mean
    if getattr(image_processor, "do_rescale", False):
        pixels = pixels / image_processor.rescale_factor
    return Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def save_picture(image: Image, path: Path) -> None:
    """Writes a picture where the user wants it. Raises `OutputTaken` for a link, `OutputError` for another failure."""
    from PIL.Image import registered_extensions

    kind = registered_extensions().get(path.suffix.lower())
    try:
        if kind is None:
            raise ValueError(f"unknown file extension: {path.suffix}")
        image.save(data := io.BytesIO(), kind)
        files.atomic_write(path, [data.getvalue()])
    except files.IsLink as error:
        hint = f"--save-view {files.quoted(error.target)} writes there"
        raise OutputTaken(printable(str(path)), os_reason(error), hint) from None
    except (OSError, ValueError, KeyError) as error:  # KeyError: Pillow cannot write the format
        raise OutputError(printable(str(path)), os_reason(error)) from None
