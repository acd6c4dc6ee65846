"""The KV cache of what the model read last: a prompt that begins the same way is read from where it differs."""

from __future__ import annotations

from collections.abc import Collection
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from llava_cli.engine.forward import Forward
from llava_cli.engine.kv_cache import RoomyCache, plain_cache

if TYPE_CHECKING:
    import torch

# What may come beside `input_ids`, and still the rest of a prompt can be read alone: pixels and sizes
# with one row a picture, and what is about all pictures together. Other inputs say something about every
# token or carry positions of their own; such a model reads each prompt from its beginning.
ROWS = ("pixel_values", "pixel_attention_mask", "image_sizes")
WHOLE = ("batch_num_images",)
_KNOWN = {"input_ids", "attention_mask", *ROWS, *WHOLE}


def alike(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class PrefixCache:
    """Runs one model over one sequence, and keeps its KV cache for the next.

    It knows the tokens that the cache is sure to hold, whatever happened: Ctrl-C in the midst of a forward
    pass leaves layers of different lengths, and the next prompt cuts them to what they share.
    """

    def __init__(self, model: Any) -> None:
        self.model, self._forward = model, Forward(model)
        self.found = 0  # how many tokens of the last prompt did not have to be read
        self._reader: object = None
        self._image: int | None = getattr(model.config, "image_token_id", None)
        self._cuttable = plain_cache(model)
        self._forget()

    def _forget(self) -> None:
        from transformers import DynamicCache

        self._read: tuple[list[int], dict[str, torch.Tensor]] = [], {}
        self._cache = RoomyCache() if self._cuttable else DynamicCache(config=self.model.config)

    def can_part(self, inputs: Collection[str]) -> bool:
        """Whether prompts with inputs of these names can be read a part at a time, or as rows beside others."""
        return self._cuttable and _KNOWN.issuperset(inputs)

    def prefill(self, inputs: dict[str, torch.Tensor], reader: object) -> torch.Tensor:
        """One prompt as its processor makes it, `input_ids` [1, tokens] -> logits after its end [1, vocabulary]."""
        ids: list[int] = inputs["input_ids"][0].tolist()
        rows = {name: inputs[name] for name in ROWS if name in inputs}
        kept, seen = self._shared(ids, rows, inputs)
        self._reader = reader
        if kept:
            # First what is sure, then the cut, then the new tokens: Ctrl-C may come between any two lines.
            self._read = ids[:kept], {name: row[:seen] for name, row in rows.items()}
            layer: Any
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[..., :kept, :], layer.values[..., :kept, :]
            step = {"input_ids": inputs["input_ids"][:, kept:]}
            if self._image in ids[kept:]:
                step |= {name: row[seen:] for name, row in rows.items()}
                step |= {name: inputs[name] for name in WHOLE if name in inputs}
        else:
            self._forget()
            step = inputs
        logits = self._forward(step, self._cache)
        self._read, self.found = (ids, rows), kept
        return logits

    def step(self, token: int, reader: object) -> torch.Tensor:
        """The next token, read -> logits [1, vocabulary]. `RuntimeError` once another prompt has been read."""
        import torch

        if reader is not self._reader:
            raise RuntimeError("another answer was begun before this one was complete")
        logits = self._forward({"input_ids": torch.tensor([[token]], device=self.model.device)}, self._cache)
        self._read[0].append(token)
        return logits

    def _shared(
        self, ids: list[int], rows: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
    ) -> tuple[int, int]:
        """How many leading tokens of `ids` need not be read again, and how many pictures are among them."""
        if not self.can_part(inputs):
            return 0, 0
        tokens, old_rows = self._read
        kept = alike(ids[:-1], tokens)  # the last one has to be read for its logits
        before, after = tokens.count(self._image), ids.count(self._image)  # type: ignore[arg-type]
        within = ids[:kept].count(self._image)  # type: ignore[arg-type]
        if within not in (before, after):
            return 0, 0  # in the midst of pictures, where one ends is the family's own business
        old, new = (len(r.get("pixel_values", ())) for r in (old_rows, rows))
        seen = new if within == after else old
        same_pictures = seen <= min(old, new) and all(
            _same(row[:seen], old_rows[name][:seen]) for name, row in rows.items() if seen
        )
        return (kept, seen) if same_pictures else (0, 0)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether rows are equal, apart from padding to as many tiles, or sides, as the largest picture beside them has."""
    import torch

    if one.shape == other.shape or one.dim() < 2:
        return torch.equal(one, other)
    shared = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))

    def is_padding(row: torch.Tensor) -> bool:
        return bool(row.count_nonzero() == row[shared].count_nonzero())

    return torch.equal(one[shared], other[shared]) and is_padding(one) and is_padding(other)
