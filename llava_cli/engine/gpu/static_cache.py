"""Keys and values at addresses that stay the same: what a captured step reads and writes.

One set of buffers serves every shape, [rows, heads, capacity, head_dim] with few rows and much capacity as well as the
other way round: only one batch is being answered at a time. The `RoomyCache` of that batch is moved in; it goes on
working as it is, for a prompt's next turn is written behind the tokens, and rows leave and join in place.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, CacheLayerMixin

from llava_cli.engine.kv_cache import RoomyCache

if TYPE_CHECKING:
    import torch


class StaticLayer(CacheLayerMixin):
    """One layer's keys and values [rows, heads, capacity, head_dim]; a step's token is written at `column` [1]."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, column: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self._column, self.is_initialized = keys, values, column, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing left to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one token of each row -> all columns, of which the mask tells what is used."""
        column = self._column.to(key_states.device)  # the layer may be on another card
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer.index_copy_(2, column, new)  # type: ignore[union-attr]
        return self.keys, self.values  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        return self.get_max_length() - 1  # it is never empty; positions are always given

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])  # type: ignore[union-attr]


class KvArena:
    """The memory of all shapes, which grows to the largest of them and belongs to one cache at a time."""

    def __init__(self) -> None:
        self._flat: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._owner: weakref.ref[RoomyCache] | None = None

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for layer in self._flat for buffer in layer)

    def fits(self, cache: RoomyCache, rows: int, capacity: int) -> bool:
        """Whether the buffers are large enough for a shape."""
        return bool(self._flat) and cache.nbytes_of_token * rows * capacity <= self.nbytes

    def bytes_to_grow(self, cache: RoomyCache, rows: int, capacity: int) -> int:
        """What `grow` takes beyond what there is, at its worst: what is in the buffers stands beside the new ones."""
        owner = self._owner and self._owner()
        moved = owner.nbytes_of_tokens if owner else 0
        return cache.nbytes_of_token * rows * capacity - self.nbytes + moved

    def grow(self, cache: RoomyCache, rows: int, capacity: int) -> None:
        """Replaces the buffers by larger ones; whoever owned the old ones keeps what it had in them."""
        self.evict()
        self.release()
        layer: Any
        flat = []
        for layer in cache.layers:
            keys, values = (
                old.new_zeros(rows * old.shape[1] * capacity * old.shape[3]) for old in (layer.keys, layer.values)
            )
            flat.append((keys, values))
        self._flat = flat  # all of them, or none where memory runs out

    def release(self) -> None:
        """Leaves the buffers to the cache that is in them; without one they are free."""
        self._flat, self._owner = [], None

    def layers(self, cache: RoomyCache, rows: int, capacity: int, column: torch.Tensor) -> Cache:
        """The buffers in a shape, as transformers' cache."""
        layers: list[Any] = []
        layer: Any
        for (flat_keys, flat_values), layer in zip(self._flat, cache.layers, strict=True):
            keys, values = (
                flat[: rows * old.shape[1] * capacity * old.shape[3]].view(rows, old.shape[1], capacity, old.shape[3])
                for flat, old in ((flat_keys, layer.keys), (flat_values, layer.values))
            )
            layers.append(StaticLayer(keys, values, column))
        return Cache(layers=layers)

    def adopt(self, cache: RoomyCache, static: Cache) -> None:
        """Moves a cache's tokens to the beginning of static buffers, unless they are there."""
        if self._owner is None or self._owner() is not cache:
            self.evict()
            self._owner = weakref.ref(cache)
        layer: Any
        target: Any
        for layer, target in zip(cache.layers, static.layers, strict=True):
            layer.move_into(target.keys, target.values)

    def evict(self) -> None:
        """Lets the cache that is in the buffers have memory of its own."""
        if owner := self._owner and self._owner():
            layer: Any
            for layer in owner.layers:
                layer.move_out()
        self._owner = None
