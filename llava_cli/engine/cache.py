"""The KV cache that all answers are read into: what it holds, and room beside it for what comes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    import torch

ROOM = 32
"""Tokens that are made room for at a time."""


class RoomyLayer(DynamicLayer):
    """Keys and values [rows, heads, tokens, width], the beginning of tensors that have room, zeros, for more.

    A token is written where it belongs; transformers' own layer copies all there is for each one, which takes a
    fifth of a step at 64 rows of 80 tokens, and a twelfth at 7B.
    """

    _stores: tuple[Any, Any] = (None, None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_store, keys = _put(self._stores[0], self.keys, key_states)
        value_store, values = _put(self._stores[1], self.values, value_states)
        self._stores, self.keys, self.values = (key_store, value_store), keys, values
        return keys, values

    def join(self, other: RoomyLayer, width: int) -> None:
        """Puts another layer's rows below these, the last `width` tokens of each; behind zeros where one has fewer."""
        key_store = _below(self.keys, other.keys, width)
        value_store = _below(self.values, other.values, width)
        self._stores = key_store, value_store
        self.keys, self.values = key_store[:, :, :width], value_store[:, :, :width]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._stores = None, None  # of no use any more, and large

    def drop(self, rows: list[int]) -> None:
        """Lets go of rows, in descending order; the last row takes the place of each."""
        keys: Any = self.keys
        values: Any = self.values
        for row in rows:
            last = len(keys) - 1
            keys[row], values[row] = keys[last], values[last]
            keys, values = keys[:last], values[:last]
        self.keys, self.values = keys, values


def _put(store: Any, old: Any, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes new tokens behind the old ones: (the tensor with room, its part that is in use)."""
    begin = old.shape[-2] if old.numel() else 0
    rows, end = len(new), begin + new.shape[-2]
    fits = store is not None and store.data_ptr() == old.data_ptr() and len(store) >= rows and store.shape[-2] >= end
    if not fits:
        store = new.new_empty(rows, new.shape[1], end + ROOM, new.shape[3])
        store[:, :, end:] = 0  # what is multiplied by a share of 0 must be a number
        if begin:
            store[:, :, :begin] = old
    store[:rows, :, begin:end] = new
    return store, store[:rows, :, :end]


def _below(above: Any, below: Any, width: int) -> torch.Tensor:
    """One tensor with room for the last `width` tokens of both."""
    rows, heads, _, size = above.shape
    store: torch.Tensor = above.new_empty(rows + len(below), heads, width + ROOM, size)
    store[:, :, width:] = 0
    for part, place in ((above, store[:rows]), (below, store[rows:])):
        begin = max(0, width - part.shape[2])
        place[:, :, :begin] = 0
        place[:, :, begin:width] = part[:, :, -width:]
    return store


def plain_cache(model: Any) -> bool:
    """Whether a model's KV cache is keys and values for each token and nothing else."""
    layers = DynamicCache(config=model.config).layers
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return known and getattr(model.config, "image_token_id", None) is not None


class RoomyCache(Cache):
    """The layers of one model, made as they come."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RoomyLayer)
        self._last: int | None = None

    @contextmanager
    def filling(self, layers: int) -> Iterator[None]:
        """A forward pass within ends as soon as the last of its `layers` has its keys and values.

        More is not needed of tokens before a prompt's last one: with 4 layers a seventh of the reading is saved.
        """
        self._last = layers - 1
        try:
            yield
        except _Filled:
            pass
        finally:
            self._last = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **options)
        if layer_idx == self._last:
            raise _Filled
        return both


class _Filled(Exception):
    """All keys and values are there."""


def new_cache() -> RoomyCache:
    """An empty cache for a model with a `plain_cache`.

    A layer with a sliding window keeps what has slid out of it, for the mask to hide, and can be cut like any other.
    """
    return RoomyCache()
