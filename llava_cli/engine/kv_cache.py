"""The KV cache that all answers are read into, with spare space behind the tokens it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    import torch

ROOM = 32
"""How many tokens of spare space are allocated at a time."""
_BOTH = "keys", "values"


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [rows, heads, tokens, head_dim], the beginning of buffers with space for more.

    A token is written into place; transformers' own layer copies everything for each one, which takes a fifth of a
    step at 64 rows of 80 tokens, and a twelfth at 7B. The spare space holds garbage that nobody reads.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self._buffers: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        begin = self.get_seq_length()
        for buffer, new in zip(self.grow(key_states, value_states), (key_states, value_states), strict=True):
            buffer[: len(new), :, begin : begin + new.shape[2]] = new
        return self.keys, self.values  # type: ignore[return-value]

    def grow(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Extends the layer by key_states.shape[2] tokens without writing them.

        Returns both whole buffers [rows or more, heads, tokens or more, head_dim].
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, buffers = self.get_seq_length(), []
        for name, new in zip(_BOTH, (key_states, value_states), strict=True):
            rows, end = len(new), begin + new.shape[2]
            if not self._fits(name, rows, end):
                self._move(name, getattr(self, name) if begin else new[:, :, :0], rows, begin, end)
            self._set_size(name, rows, end)
            buffers.append(self._buffers[name])
        return buffers[0], buffers[1]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def extend(self, tokens: int) -> None:
        """Counts tokens that somebody wrote behind the last ones, in space that the layer has."""
        for name in _BOTH:
            old = getattr(self, name)
            self._set_size(name, len(old), old.shape[2] + tokens)

    def move_into(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Makes these buffers [rows or more, heads, tokens or more, head_dim] the layer's own, with what it holds.

        All else in them becomes 0: what a mask hides of an infinity is still no number.
        """
        for name, buffer in zip(_BOTH, (keys, values), strict=True):
            if self._buffers.get(name) is not buffer:
                old = getattr(self, name).clone()  # it may be in the same memory, in another shape
                setattr(self, name, old)  # whole at any time, whenever Ctrl-C comes
                buffer.zero_()
                rows, _, tokens, _ = old.shape
                buffer[:rows, :, :tokens] = old
                self._buffers[name] = buffer
                self._set_size(name, rows, tokens)

    def move_out(self) -> None:
        """Leaves buffers that belong to somebody else."""
        for name in _BOTH:
            setattr(self, name, getattr(self, name).clone())
        self._buffers.clear()

    def truncate(self, length: int) -> None:
        """Keeps the first tokens only. Keys and values may differ in length, if Ctrl-C interrupted `grow`."""
        for name in _BOTH:
            setattr(self, name, getattr(self, name)[:, :, :length])

    def reserve(self, rows: int, tokens: int) -> None:
        """Makes space for that many rows of the last `tokens` tokens; where there are fewer, zeros precede them."""
        for name in _BOTH:
            old = getattr(self, name)
            if self._fits(name, rows, tokens + ROOM // 2):
                if old.shape[2] != tokens:
                    _align_right(self._buffers[name][: len(old), :, :tokens], old.clone())
            else:
                if name in self._buffers:  # frees what removed rows leave unused before the new buffer is allocated
                    old = old.clone()
                    setattr(self, name, old)
                    del self._buffers[name]
                self._move(name, old, rows, tokens, tokens)
            self._set_size(name, len(old), tokens)

    def append_rows(self, other: RoomyLayer) -> None:
        """Adds another layer's rows, of at most as many tokens, in space that is reserved for them."""
        for name in _BOTH:
            (rows, _, tokens, _), new = getattr(self, name).shape, getattr(other, name)
            _align_right(self._buffers[name][rows : rows + len(new), :, :tokens], new)
            self._set_size(name, rows + len(new), tokens)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices.to(self.keys.device))  # type: ignore[union-attr]
        self._buffers.clear()  # large, and of no use any more

    def drop_rows(self, rows: list[int]) -> None:
        """Removes rows, in descending order; the last row takes the place of each."""
        for name in _BOTH:
            left = getattr(self, name)
            for row in rows:
                left[row] = left[-1]
                left = left[:-1]
            setattr(self, name, left)

    def _fits(self, name: str, rows: int, tokens: int) -> bool:
        """Whether the buffer that holds the tokens has space for that many rows and tokens."""
        buffer, old = self._buffers.get(name), getattr(self, name)
        if buffer is None or buffer.data_ptr() != old.data_ptr():
            return False
        return len(buffer) >= rows and buffer.shape[2] >= tokens

    def _move(self, name: str, old: torch.Tensor, rows: int, tokens: int, end: int) -> None:
        """Moves the last `tokens` tokens to the beginning of a new buffer for `rows` rows of `end` tokens and more."""
        self._buffers[name] = buffer = old.new_empty(rows, old.shape[1], end + ROOM, old.shape[3])
        _align_right(buffer[: len(old), :, :tokens], old)

    def _set_size(self, name: str, rows: int, tokens: int) -> None:
        setattr(self, name, self._buffers[name][:rows, :, :tokens])


def _align_right(target: torch.Tensor, tokens: torch.Tensor) -> None:
    """Fills `target` [rows, heads, tokens, head_dim] from its right end, and with zeros where tokens are missing."""
    begin = max(0, target.shape[2] - tokens.shape[2])
    target[:, :, :begin] = 0
    target[:, :, begin:] = tokens[:, :, max(0, tokens.shape[2] - target.shape[2]) :]


def plain_cache(model: Any) -> bool:
    """Whether a model's KV cache is keys and values for each token and nothing else."""
    layers = DynamicCache(config=model.config).layers
    are_plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return are_plain and getattr(model.config, "image_token_id", None) is not None


class RoomyCache(Cache):
    """The layers of a model with a `plain_cache`, created as they are used, with space for more tokens.

    A layer with a sliding window keeps what has left the window, which the mask hides: it can be truncated like others.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RoomyLayer)

    @property
    def nbytes(self) -> int:
        layers: list[Any] = self.layers
        return sum(layer.nbytes for layer in layers)

    @property
    def nbytes_of_token(self) -> int:
        """Bytes of one token of one row."""
        layers: list[Any] = self.layers
        return sum(x[0, :, 0].nbytes for layer in layers for x in (layer.keys, layer.values))

    @property
    def nbytes_of_tokens(self) -> int:
        """Without the spare space."""
        layers: list[Any] = self.layers
        return sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))

    def extend(self, tokens: int) -> None:
        """Counts tokens that somebody wrote behind the last ones."""
        layer: Any
        for layer in self.layers:
            layer.extend(tokens)

    def truncate(self, length: int) -> None:
        """Keeps the first tokens only."""
        layer: Any
        for layer in self.layers:
            layer.truncate(length)

    def copy_rows(self, rows: list[int]) -> RoomyCache:
        """A cache with a copy of those rows."""
        copy, layers = RoomyCache(), list[Any](self.layers)
        for index, layer in enumerate(layers):
            copy.update(layer.keys[rows], layer.values[rows], index)
        return copy

    def copy_row(self, row: int, columns: torch.Tensor | slice) -> RoomyCache:
        """A cache of one row: a copy of those tokens (a mask [columns], or a slice)."""
        copy, layers = RoomyCache(), list[Any](self.layers)
        if not isinstance(columns, slice):
            columns = columns.nonzero()[:, 0]  # for a mask each layer would wait until it is known how many there are
        for index, layer in enumerate(layers):
            one = slice(row, row + 1)
            columns = columns if isinstance(columns, slice) else columns.to(layer.keys.device)
            copy.update(layer.keys[one, :, columns], layer.values[one, :, columns], index)
        return copy
