"""A region of a picture in its place, in full resolution: what is cut away takes no tokens."""

from __future__ import annotations

from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, printable
from llava_cli.parts import region_box


def cut(picture: Picture, region: str) -> Picture | BadImage:
    """The region of a picture, or the error that the picture has no such place."""
    box = region_box(region, picture.image.width, picture.image.height)
    if box is None:
        size = f"{picture.image.width}x{picture.image.height}"
        return BadImage(printable(picture.reference), f"{size}, without a region {region}", "--region 0,0,50%,50%")
    return picture.with_image(picture.image.crop(box), region=region)
