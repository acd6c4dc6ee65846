"""Kernels that LLVM compiles for the CPU at hand, where no library has fast ones.

Here are the shapes that they take, for callers that ask whether a layer suits them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TILE_ROWS, BLOCK = 16, 64
"""Quantized weights: rows of a tile, and columns of a block, which share a scale."""
CODEBOOK_SIZE = 16
"""Values that 4 bits can stand for."""
GEMV_ROWS, VECTOR_COLUMNS = 4, 64
"""Rows of dense weights that are multiplied at once; in_features of dense layers and of norms are multiples of 64."""
HEAD_DIM_STEP = 16
"""head_dim is a multiple of it."""
SCORE_PADDING = 16
"""Attention scores that a row of them has room for behind the last token's."""
MAX_DECODE_ROWS = 16
"""Rows, each with one new token, up to which a decode step uses kernels that are made for few tokens."""
MAX_QUERY_BLOCK, MASK_STEP = 8, 64
"""Prefill attention: queries at once, at most; its mask is padded to a multiple of so many tokens."""

Layout = dict[str, tuple["torch.dtype", tuple[int, ...]]]
"""Name -> (dtype, shape) of each tensor that a kernel gets, or that a file holds."""
Launch = Callable[[], object]
"""Work that is bound to its tensors: a kernel with its arguments, or an operation of torch's."""
