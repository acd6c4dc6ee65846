"""What a model reads of a prompt's pictures: the inputs of some of them, and those of several prompts as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Inputs = dict[str, "torch.Tensor"]

_GRIDS = "image_grid_thw"
"""[pictures, 3]: of how many patches in time, height and width each picture is; their pixels stand patch by patch."""
PER_IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "image_sizes", _GRIDS)
"""Model inputs whose first dimension counts the pictures; with grids, that of pixels counts all pictures' patches."""
SHARED_INPUTS = ("batch_num_images",)
"""Model inputs about all pictures of a prompt together."""
_TILED_DIMENSIONS = {"pixel_values": 5, "pixel_attention_mask": 4}
"""How many dimensions these inputs have where a picture is several tiles."""


def count_pictures(inputs: Inputs) -> int:
    """How many pictures the inputs tell apart."""
    return len(inputs.get(_GRIDS, inputs.get("pixel_values", ())))


def pictures_from(inputs: Inputs, begin: int) -> Inputs:
    """The inputs of all pictures but the first `begin`."""
    found = {name: inputs[name][begin:] for name in PER_IMAGE_INPUTS if name in inputs}
    if _GRIDS in inputs:
        patches = int(inputs[_GRIDS][:begin].prod(-1).sum())
        found["pixel_values"] = inputs["pixel_values"][patches:]
    return found | {name: inputs[name] for name in SHARED_INPUTS if name in inputs}


def stack_pictures(inputs: Sequence[Inputs]) -> Inputs:
    """The picture inputs of several prompts as those of one, which the model reads one after another.

    Tiles are padded to the most there are, and pictures with explicit sizes (Pixtral's) to the largest.
    """
    import torch

    stacked, have_sizes = {}, any("image_sizes" in one for one in inputs)
    for name in (*PER_IMAGE_INPUTS, *SHARED_INPUTS):
        parts = [one[name] for one in inputs if name in one]
        if parts and (parts[0].dim() == _TILED_DIMENSIONS.get(name) or (have_sizes and name == "pixel_values")):
            parts = _pad_to_largest(parts)
        if parts:
            stacked[name] = torch.cat(parts)
    return stacked


def _pad_to_largest(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Pads tensors with zeros at the end of each dimension but the first."""
    from torch.nn.functional import pad

    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]

    def padding(part: torch.Tensor) -> list[int]:
        """In `pad`'s order: before and after, the last dimension first."""
        pairs = zip(reversed(largest), reversed(part.shape[1:]), strict=True)
        return [count for most, size in pairs for count in (0, most - size)]

    return [pad(part, padding(part)) for part in parts]
