"""The KV cache that all answers are read into: what it holds, and room beside it for what comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    import torch

ROOM = 32
"""Tokens that are made room for at a time."""


class RoomyLayer(DynamicLayer):
    """Keys and values [rows, heads, tokens, width], the beginning of tensors that have room for more.

    A token is written where it belongs; transformers' own layer copies all there is for each one, which takes a
    fifth of a step at 64 rows of 80 tokens, and a twelfth at 7B. In the room are numbers, it does not matter which:
    they are multiplied by shares of 0.
    """

    _stores: Sequence[Any] = (None, None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, begin, end = len(key_states), self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        stores = []
        for store, old, new in zip(self._stores, self._both, (key_states, value_states), strict=True):
            if not _fits(store, old, rows, end):
                store = _roomy(old if begin else new[:, :, :0], rows, begin, end)
            store[:rows, :, begin:end] = new
            stores.append(store)
        return self._hold(stores, rows, end)

    def make_room(self, rows: int, width: int) -> None:
        """Moves the last `width` tokens to where there is room for `rows` in all; zeros stand before fewer."""
        stores = []
        for store, old in zip(self._stores, self._both, strict=True):
            if not _fits(store, old, rows, width + ROOM // 2):
                store = _roomy(old, rows, width, width)
            elif old.shape[2] != width:
                _to_the_right(store[: len(old), :, :width], old.clone())
            stores.append(store)
        self._hold(stores, len(old), width)

    def join(self, other: RoomyLayer) -> None:
        """Puts another layer's rows, of no more tokens, below these, where there is room for them."""
        rows, tokens = len(self._both[0]), self.get_seq_length()
        for store, new in zip(self._stores, other._both, strict=True):
            _to_the_right(store[rows : rows + len(new), :, :tokens], new)
        self._hold(self._stores, rows + len(new), tokens)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._stores = None, None  # of no use any more, and large

    def drop(self, rows: list[int]) -> None:
        """Lets go of rows, in descending order; the last row takes the place of each."""
        keys, values = self._both
        for row in rows:
            last = len(keys) - 1
            keys[row], values[row] = keys[last], values[last]
            keys, values = keys[:last], values[:last]
        self.keys, self.values = keys, values

    @property
    def _both(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values  # type: ignore[return-value]

    def _hold(self, stores: Sequence[torch.Tensor], rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._stores = stores
        self.keys, self.values = (store[:rows, :, :tokens] for store in stores)
        return self._both


def _fits(store: torch.Tensor | None, old: torch.Tensor, rows: int, tokens: int) -> bool:
    """Whether what holds the old tokens has room for so many rows and tokens."""
    if store is None or store.data_ptr() != old.data_ptr():
        return False
    return len(store) >= rows and store.shape[2] >= tokens


def _roomy(old: torch.Tensor, rows: int, width: int, end: int) -> torch.Tensor:
    """A tensor for `rows` of `end` tokens and some more, the last `width` of the old ones at its beginning."""
    store = old.new_empty(rows, old.shape[1], end + ROOM, old.shape[3])
    store[:, :, end:] = 0
    store[len(old) :] = 0
    _to_the_right(store[: len(old), :, :width], old)
    return store


def _to_the_right(place: torch.Tensor, tokens: torch.Tensor) -> None:
    """Fills `place` from its right end; with zeros where there are not enough."""
    begin = max(0, place.shape[2] - tokens.shape[2])
    place[:, :, :begin] = 0
    place[:, :, begin:] = tokens[:, :, max(0, tokens.shape[2] - place.shape[2]) :]


def plain_cache(model: Any) -> bool:
    """Whether a model's KV cache is keys and values for each token and nothing else."""
    layers = DynamicCache(config=model.config).layers
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return known and getattr(model.config, "image_token_id", None) is not None


class RoomyCache(Cache):
    """The layers of a model with a `plain_cache`, made as they come.

    One with a sliding window keeps what has slid out of it, for the mask to hide, and can be cut like any other.
    """

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
