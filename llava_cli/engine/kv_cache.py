"""The KV cache that all answers are read into: what it holds, and room beside it for what comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    import torch

ROOM = 32
"""Tokens that are made room for at a time."""
_BOTH = "keys", "values"


class RoomyLayer(DynamicLayer):
    """Keys and values [rows, heads, tokens, width], the beginning of tensors that have room for more.

    A token is written where it belongs; transformers' own layer copies all there is for each one, which takes a
    fifth of a step at 64 rows of 80 tokens, and a twelfth at 7B. Nobody reads what is in the room.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self._stores: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        begin = self.get_seq_length()
        for store, new in zip(self.grow(key_states, value_states), (key_states, value_states), strict=True):
            store[: len(new), :, begin : begin + new.shape[2]] = new
        return self.keys, self.values  # type: ignore[return-value]

    def grow(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """By as many tokens as those have [rows, heads, tokens, width], which are to be written behind the others.

        All there is of both, and the room behind it [rows and more, heads, room, width], in one piece each.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, both = self.get_seq_length(), []
        for name, new in zip(_BOTH, (key_states, value_states), strict=True):
            rows, end = len(new), begin + new.shape[2]
            if not self._fits(name, rows, end):
                self._move(name, getattr(self, name) if begin else new[:, :, :0], rows, begin, end)
            self._hold(name, rows, end)
            both.append(self._stores[name])
        return both[0], both[1]

    def make_room(self, rows: int, width: int) -> None:
        """Moves the last `width` tokens to where there is room for `rows` in all; zeros stand before fewer."""
        for name in _BOTH:
            old = getattr(self, name)
            if self._fits(name, rows, width + ROOM // 2):
                if old.shape[2] != width:
                    _to_the_right(self._stores[name][: len(old), :, :width], old.clone())
            else:
                if name in self._stores:  # of which rows have left: not all of it has to stand beside the new one
                    old = old.clone()
                    setattr(self, name, old)
                    del self._stores[name]
                self._move(name, old, rows, width, width)
            self._hold(name, len(old), width)

    def join(self, other: RoomyLayer) -> None:
        """Puts another layer's rows, of no more tokens, below these, where there is room for them."""
        for name in _BOTH:
            (rows, _, tokens, _), new = getattr(self, name).shape, getattr(other, name)
            _to_the_right(self._stores[name][rows : rows + len(new), :, :tokens], new)
            self._hold(name, rows + len(new), tokens)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._stores.clear()  # of no use any more, and large

    def drop(self, rows: list[int]) -> None:
        """Lets go of rows, in descending order; the last row takes the place of each."""
        for name in _BOTH:
            left = getattr(self, name)
            for row in rows:
                left[row] = left[-1]
                left = left[:-1]
            setattr(self, name, left)

    def _fits(self, name: str, rows: int, tokens: int) -> bool:
        """Whether the tensor that holds the old tokens has room for so many rows and tokens."""
        store, old = self._stores.get(name), getattr(self, name)
        if store is None or store.data_ptr() != old.data_ptr():
            return False
        return len(store) >= rows and store.shape[2] >= tokens

    def _move(self, name: str, old: torch.Tensor, rows: int, width: int, end: int) -> None:
        """To a tensor for `rows` of `end` tokens and some more, the last `width` of the old ones at its beginning."""
        self._stores[name] = store = old.new_empty(rows, old.shape[1], end + ROOM, old.shape[3])
        _to_the_right(store[: len(old), :, :width], old)

    def _hold(self, name: str, rows: int, tokens: int) -> None:
        setattr(self, name, self._stores[name][:rows, :, :tokens])


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
    """The layers of a model with a `plain_cache`, made as they come, with room for more.

    One with a sliding window keeps what has slid out of it, for the mask to hide, and can be cut like any other.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RoomyLayer)
