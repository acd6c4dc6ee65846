"""Pictures as the model sees them: a processor's pixels, made visible again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_cli.errors import ModelUnusable

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

GAP = 4
"""Pixels between tiles, white."""


def as_seen(inputs: dict[str, torch.Tensor], image_processor: Any) -> Image:
    """What `Prompter.encode` gives a model, as one picture: a row for each picture, its tiles side by side.

    Raises `ModelUnusable` where a processor gives no upright tiles.
    """
    from PIL import Image

    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.dim() not in (4, 5) or pixels.shape[-3] != 3:
        raise ModelUnusable("--save-view", "this model's processor gives no picture that can be drawn")
    rows = [row[None] if row.dim() == 3 else row for row in pixels.float()]
    tiles = [[_tile(tile, image_processor) for tile in row if tile.any()] for row in rows]  # no padding to many tiles
    height, width = pixels.shape[-2] + GAP, pixels.shape[-1] + GAP
    sheet = Image.new("RGB", (width * max(map(len, tiles)) - GAP, height * len(tiles) - GAP), "white")
    for y, row in enumerate(tiles):
        for x, tile in enumerate(row):
            sheet.paste(tile, (x * width, y * height))
    return sheet


def _tile(pixels: torch.Tensor, image_processor: Any) -> Image:
    """pixels [3, height, width] as the vision tower takes them -> a picture."""
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
