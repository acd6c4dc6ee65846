"""One more token of each row, computed in buffers that never move: what a CUDA graph captures.

It is transformers' own forward pass over one token, so it serves every family. Its inputs are written before, and its
outputs read after; in between nothing waits for the device. It computes the same when it is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_cli.engine.gpu.static_attention import SeenColumns, static_attention
from llava_cli.engine.gpu.static_cache import KvArena
from llava_cli.engine.kv_cache import RoomyCache

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shape:
    """What a step is made for; a batch of fewer rows and tokens fits in, too."""

    rows: int
    capacity: int
    """Tokens of a row in the KV cache, with the one that is read."""


class DecodeStep:
    """A step of one shape over an arena's buffers."""

    def __init__(self, model: Any, arena: KvArena, cache: RoomyCache, shape: Shape) -> None:
        import torch

        self._model, self.shape, device = model, shape, model.device
        self._config = model.config.get_text_config()
        rows, capacity, numbers = shape.rows, shape.capacity, 2 * shape.rows + 1
        # Token ids, positions and the column come in one copy from memory that the device reads by itself.
        self._host = torch.zeros(numbers, dtype=torch.long, pin_memory=device.type == "cuda")
        self._numbers = torch.zeros(numbers, dtype=torch.long, device=device)
        self._ids, self._positions = self._numbers[:-1].view(2, rows, 1)
        self._column = self._numbers[-1:]
        self._mask = torch.zeros(rows, 1, 1, capacity, dtype=torch.bool, device=device)
        self.cache = arena.layers(cache, rows, capacity, self._column)
        self._seen: torch.Tensor | tuple[int, int] | None = None
        """What the mask shows after the step: as `set_inputs` was told, or [rows, columns] without padding."""
        self._logits: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None

    def set_inputs(
        self, tokens: Sequence[int], positions: Sequence[int], column: int, mask: torch.Tensor | None
    ) -> None:
        """The last token of each row, its position, and the column that keys and values are written to.

        `mask` [rows, column + 1], in the host's memory, is true where a token is; None where there is no padding.
        """
        import torch

        rows, spare = len(tokens), [0] * (self.shape.rows - len(tokens))
        self._host.copy_(torch.tensor([*tokens, *spare, *positions, *spare, column]))
        self._numbers.copy_(self._host, non_blocking=True)
        if not self._is_seen(rows, column, mask):
            self._write_mask(rows, column, mask)
        self._seen = (rows, column + 1) if mask is None else mask.clone()

    def _is_seen(self, rows: int, column: int, mask: torch.Tensor | None) -> bool:
        """Whether the step before let the same rows see the same columns, up to the new one."""
        import torch

        if mask is None or not isinstance(self._seen, torch.Tensor):
            return mask is None and self._seen == (rows, column)
        return torch.equal(self._seen, mask[:, :-1])

    def _write_mask(self, rows: int, column: int, mask: torch.Tensor | None) -> None:
        """Rows that nobody uses see one column: attention to none would be 0 / 0."""
        self._mask.zero_()
        self._mask[rows:, :, :, 0] = True
        self._mask[:rows, 0, 0, : column + 1] = True if mask is None else mask

    def compute(self) -> None:
        """Reads the tokens: what is captured. The mask of a row gets the new column by itself."""
        import torch

        with torch.inference_mode():
            self._mask.index_fill_(3, self._column, True)
            with static_attention(self._config, SeenColumns(self._mask, self._column)):
                output = self._model(
                    input_ids=self._ids,
                    position_ids=self._positions,
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            self._logits = output.logits[:, -1].float()
            self._tokens = self._logits.argmax(-1)

    def outputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [rows, vocabulary] and the tokens of the largest [rows], until the next step overwrites them."""
        assert self._logits is not None and self._tokens is not None
        return self._logits[:rows], self._tokens[:rows]
