"""Attention of one token of each row over all columns of a static cache.

Which columns are seen is a tensor, so a captured step serves every length. It is transformers' attention function for
that step alone: the models' own code would look at the mask to find out whether it needs one, which waits for the
device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "llava_static"
REPLACED = ("sdpa", "flash_attention_2", "llava")
"""Attention functions that compute the same."""
_ATTENTION = "_attn_implementation"
"""transformers' name for what a config has of its attention function."""
_UNSUPPORTED = ("position_bias", "s_aux")
"""Options of transformers' attention functions that change what is computed; others are ignored, as by its `sdpa`."""


class Unsupported(Exception):
    """A model's attention has an option that is not known here."""


class SeenColumns:
    """Which columns [rows, 1, 1, capacity] the token at `column` [1] sees, by the layers' sliding windows."""

    def __init__(self, mask: torch.Tensor, column: torch.Tensor) -> None:
        self._mask, self._column = mask, column
        self._biases: dict[tuple[int | None, torch.dtype, torch.device], torch.Tensor] = {}

    def bias(self, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What is added to scores: 0 where one of the last `window` columns (None: of all) is seen, else -inf.

        It is computed once a step for all layers, which attention would otherwise do of a mask in each.
        """
        import torch

        key = window, dtype, device
        if key not in self._biases:
            mask = self._mask
            if window is not None:
                columns = torch.arange(mask.shape[-1], device=mask.device)
                mask = mask & (columns > self._column - window)
            bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
            self._biases[key] = bias.to(device)  # a layer may be on another card
        return self._biases[key]


_seen: ContextVar[SeenColumns] = ContextVar("seen")
"""By the step that is being computed."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query [rows, heads, 1, head_dim]; key, value [rows, kv_heads, capacity, head_dim] -> [rows, 1, heads, head_dim].

    Query heads that share a key head stand below each other, as if they were several tokens of one head.
    """
    from torch.nn.functional import scaled_dot_product_attention

    if found := [name for name in _UNSUPPORTED if options.get(name) is not None]:
        raise Unsupported(f"attention with {found[0]}")
    rows, heads, _, _ = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[3])
    bias = _seen.get().bias(sliding_window, query.dtype, query.device)
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[3]), None


@contextmanager
def static_attention(config: Any, seen: SeenColumns) -> Iterator[None]:
    """Within, `attend` is the attention of the decoder with this config."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)  # and no mask function: then transformers makes no masks
    before = getattr(config, _ATTENTION)
    setattr(config, _ATTENTION, NAME)
    outer = _seen.set(seen)
    try:
        yield
    finally:
        _seen.reset(outer)
        setattr(config, _ATTENTION, before)
