"""Code for LLVM, which makes machine code of it for the CPU at hand: what there is no fast library for.

Here are the shapes that it takes, for who asks whether it suits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TILE_ROWS, BLOCK = 16, 64
"""Of weights in 4 and 8 bits a tile has so many rows, and a block of it so many columns."""
CODES = 16
"""What 4 bits may mean."""
ROWS, COLUMNS = 4, 64
"""Of weights as a checkpoint has them, as many are multiplied at a time."""
WIDTH = 16
"""A head's width is a multiple of it."""
SPARE = 16
"""Scores that there is room for behind each row of them."""
FEW = 16
"""Rows of a step, each with its token, that are computed by what is compiled for few of them."""
QUERIES, PADDED = 8, 64
"""Of a prompt so many attend at a time, at most; its mask has room for a multiple of so many tokens."""

Layout = dict[str, tuple["torch.dtype", tuple[int, ...]]]
"""The type and shape of each tensor that a kernel is given, or that a file holds, by its name."""
