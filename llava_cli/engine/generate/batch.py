"""Sequences that are answered together: rows of one KV cache, which join it and leave it between two steps.

A row's tokens stand at the cache's right end. There is padding, hidden by the attention mask, to their left and, where
sequences that share their pictures have questions of different lengths, between the pictures and the question.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_cli.engine.forward import Forward
from llava_cli.engine.generate.prompt_cache import CachedPrefix, PromptCache, common_prefix_length
from llava_cli.engine.generate.sequence import PER_IMAGE_INPUTS, SHARED_INPUTS, Sequence
from llava_cli.engine.kv_cache import RoomyCache, plain_cache
from llava_cli.models.families import READS_PARTS

if TYPE_CHECKING:
    import torch

PREFILL_TOKENS = 1536
"""Tokens, padding included, that one forward pass reads: with twice as many a small model is a sixth slower."""
_BATCHABLE_INPUTS = {"input_ids", "attention_mask", *PER_IMAGE_INPUTS, *SHARED_INPUTS}


def can_batch(model: Any, inputs: Collection[str]) -> bool:
    """Whether prompts with inputs of these names can be read in parts, and beside others.

    Other inputs say something about every token or bring positions of their own; other caches cannot be cut.
    """
    return model.config.model_type in READS_PARTS and _BATCHABLE_INPUTS.issuperset(inputs) and plain_cache(model)


@dataclass(frozen=True)
class _Group:
    """Sequences that share their first `prefix` tokens, all of their pictures among them."""

    sequences: list[Sequence]
    prefix: int
    cached: CachedPrefix | None = None
    """What the prompt cache has of the only sequence."""


class Batch:
    """The sequences that one model is answering together."""

    def __init__(self, model: Any, prompt_cache: PromptCache | None = None) -> None:
        self.model, self._prompt_cache, self._forward = model, prompt_cache, Forward(model)
        self.sequences: list[Sequence] = []
        self._image_token: int | None = getattr(model.config, "image_token_id", None)
        # A sliding window counts columns: padding between a sequence's tokens would hide too much.
        self._can_share = not getattr(model.config.get_text_config(), "sliding_window", None)
        self._cache: Any = None
        self._columns = 0  # of the cache, that all of its layers hold for sure
        self._mask: torch.Tensor | None = None  # [rows, columns], true where a token is; None without padding
        self.logits: torch.Tensor | None = None
        """[rows, vocabulary] for the next step, if reading the prompt gave them."""

    def join(self, sequences: collections.abc.Sequence[Sequence]) -> None:
        """Reads prompts, all but their last tokens, and adds them to the batch. A lone one is read whole."""
        import torch

        is_lone = len(sequences) == 1 and not self.sequences
        groups: list[_Group] = []
        for sequence in sequences:
            cached = None if self._prompt_cache is None else self._prompt_cache.find(sequence)
            sequence.cached_tokens = cached.length if cached else 0
            if groups and (prefix := self._shared_prefix(groups[-1], sequence)):
                groups[-1] = _Group([*groups[-1].sequences, sequence], prefix)
            else:
                groups.append(_Group([sequence], len(sequence.ids) - (not is_lone), cached))
        with torch.inference_mode():
            if is_lone:
                self._cache, mask, self.logits = self._prefill(groups)
                self._columns, self.sequences = mask.shape[1], list(sequences)
            else:
                self._join_groups(groups, len(self.sequences) + len(sequences))

    def _join_groups(self, groups: list[_Group], rows: int) -> None:
        """Reads groups, as many at a time as one forward pass does, until the batch has that many rows."""
        import torch

        parts = list(_forward_passes(groups))
        width = max(_width(part) for part in parts)
        mask = self._full_mask() if self.sequences else None
        if mask is not None:
            # Drops columns on the left that only sequences had which have left.
            width = max(width, mask.shape[1] - int(mask.any(0).int().argmax()))
            mask = self._reserve(mask, rows, width)
        for part in parts:
            new = [sequence for group in part for sequence in group.sequences]
            cache, new_mask, _ = self._prefill(part)
            if mask is None:
                self._cache, mask = cache, self._reserve(new_mask, rows, width, cache)
            else:
                for layer, new_layer in zip(self._cache.layers, cache.layers, strict=True):
                    layer.append_rows(new_layer)
                mask = torch.cat([mask, _left_padded(new_mask, width)])
            self.sequences = [*self.sequences, *new]
            self._set_mask(mask)

    def step(self) -> list[Sequence]:
        """Adds a token to every sequence. Returns those whose answer is then complete, which have left the batch."""
        import torch

        with torch.inference_mode():
            logits, likeliest = self._decode() if self.logits is None else (self.logits, self.logits.argmax(-1))
            self.logits = None
            tokens = likeliest
            if not all(sequence.sampler.is_argmax for sequence in self.sequences):
                tokens = torch.stack(
                    [
                        token if sequence.sampler.is_argmax else sequence.sampler(row[None])
                        for sequence, token, row in zip(self.sequences, likeliest, logits, strict=True)
                    ]
                )
            for sequence, token, row in zip(self.sequences, tokens.tolist(), logits, strict=True):
                sequence.append(token, row)
        complete = [i for i, sequence in enumerate(self.sequences) if sequence.is_complete]
        leaving = [self.sequences[i] for i in complete]
        if complete:
            self._remove(complete)
        return leaving

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence before its answer is complete."""
        self._remove([self.sequences.index(sequence)])

    def _decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads the last token of each sequence -> logits [rows, vocabulary] and the likeliest tokens [rows]."""
        import torch

        mask = self._mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(self.sequences), 1)], dim=1)
        tokens, positions = zip(
            *((sequence.ids[-1], len(sequence.ids) - 1) for sequence in self.sequences), strict=True
        )
        outputs = self._forward.decode(tokens, positions, self._cache, mask)
        self._columns, self._mask = self._columns + 1, mask
        return outputs

    def _shared_prefix(self, group: _Group, sequence: Sequence) -> int:
        """How many leading tokens a group and a sequence share, if all their pictures are among them; else 0."""
        first = group.sequences[0]
        if not self._can_share or first.images != sequence.images or group.cached or sequence.cached_tokens:
            return 0
        prefix = common_prefix_length(first.ids[: group.prefix], sequence.ids[:-1])
        has_all = self._image_token not in first.ids[prefix:] and self._image_token not in sequence.ids[prefix:]
        return prefix if has_all else 0

    def _prefill(self, groups: collections.abc.Sequence[_Group]) -> tuple[RoomyCache, torch.Tensor, torch.Tensor]:
        """Reads what the sequences of each group share once, then the rest of each but its last token.

        Returns the cache with a row for each sequence, its mask [rows, columns] and the last logits.
        """
        import torch

        if cached := groups[0].cached:
            return self._prefill_rest(groups[0].sequences[0], cached, groups[0].prefix)
        cache = RoomyCache()
        ids, mask = self._pad([group.sequences[0].ids[: group.prefix] for group in groups])
        inputs = _stack_images([group.sequences[0].inputs for group in groups])
        logits = self._read({"input_ids": ids, **inputs}, cache, mask)
        if any(len(group.sequences) > 1 for group in groups):
            rows = [i for i, group in enumerate(groups) for _ in group.sequences]
            index = torch.tensor(rows, device=mask.device)
            cache.batch_select_indices(index)
            ids, rest = self._pad([s.ids[group.prefix : -1] for group in groups for s in group.sequences])
            mask = torch.cat([mask[index], rest], dim=1)
            if ids.shape[1]:
                logits = self._read({"input_ids": ids}, cache, mask)
        return cache, mask, logits

    def _prefill_rest(
        self, sequence: Sequence, cached: CachedPrefix, end: int
    ) -> tuple[RoomyCache, torch.Tensor, torch.Tensor]:
        """Reads what a cached prefix lacks of a sequence's first `end` tokens."""
        begin = cached.length
        cache = cached.take_cache()
        ids, mask = self._pad([sequence.ids[:end]])
        inputs = {"input_ids": ids[:, begin:]}
        if self._image_token in sequence.ids[begin:]:
            given = sequence.inputs
            inputs |= {name: given[name][cached.images :] for name in PER_IMAGE_INPUTS if name in given}
            inputs |= {name: given[name] for name in SHARED_INPUTS if name in given}
        logits = self._read(inputs, cache, mask) if begin < end else mask.new_empty(0)
        return cache, mask, logits

    def _read(self, inputs: dict[str, Any], cache: RoomyCache, mask: torch.Tensor) -> torch.Tensor:
        """Reads the last columns of `mask` [rows, columns] -> logits [rows, vocabulary] after them."""
        if mask.all():  # the model makes no mask of its own then
            return self._forward(inputs, cache).float()
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]
        return self._forward(inputs, cache, mask, positions).float()

    def _reserve(self, mask: torch.Tensor, rows: int, width: int, cache: RoomyCache | None = None) -> torch.Tensor:
        """Gives the cache space for that many rows and columns -> the mask with as many columns."""
        layer: Any
        for layer in (cache or self._cache).layers:
            layer.reserve(rows, width)
        return _left_padded(mask, width)

    def _remove(self, rows: list[int]) -> None:
        """Removes rows, in ascending order; what was read of them goes to the prompt cache."""
        import torch

        with torch.inference_mode():
            if self._prompt_cache is not None:
                for row in rows:
                    mask = None if self._mask is None else self._mask[row]
                    length = self._columns if mask is None else int(mask.sum())
                    columns = slice(0, self._columns) if mask is None else mask
                    self._prompt_cache.store(self.sequences[row], length, self._cache, row, columns)
            if len(rows) == len(self.sequences):
                self.sequences, self._cache, self._mask, self.logits = [], None, None, None
                return
            mask = self._mask
            for row in reversed(rows):  # as the cache does it: the last row takes the place of each
                self.sequences[row] = self.sequences[-1]
                self.sequences = self.sequences[:-1]
                if mask is not None:
                    mask[row] = mask[-1]
                    mask = mask[:-1]
            for layer in self._cache.layers:
                layer.drop_rows(rows[::-1])
            if mask is not None:
                self._set_mask(mask)

    def _full_mask(self) -> torch.Tensor:
        import torch

        if self._mask is not None:
            return self._mask
        return torch.ones(len(self.sequences), self._columns, dtype=torch.bool, device=self.model.device)

    def _set_mask(self, mask: torch.Tensor) -> None:
        self._columns, self._mask = mask.shape[1], None if mask.all() else mask

    def _pad(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [rows, longest], padded on their left, and the mask that is true where they are."""
        import torch

        width, padding = max(map(len, rows)), int(self._image_token == 0)  # any token that is no picture
        ids = [[padding] * (width - len(row)) + row for row in rows]
        mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
        device, shape = self.model.device, (len(rows), width)
        return torch.tensor(ids, device=device).view(shape).long(), torch.tensor(mask, device=device).view(shape).bool()


def _left_padded(mask: torch.Tensor, width: int) -> torch.Tensor:
    """mask [rows, columns] -> [rows, width], padded or cut on its left."""
    from torch.nn.functional import pad

    return pad(mask, (width - mask.shape[1], 0))


def _forward_passes(groups: collections.abc.Sequence[_Group]) -> Iterator[collections.abc.Sequence[_Group]]:
    """As many groups at a time as one forward pass reads; a sequence with a cached prefix alone."""
    first, widest = 0, 0
    for last, group in enumerate(groups):
        widest = max(widest, group.prefix)
        is_alone = bool(group.cached or groups[first].cached)
        if (is_alone or (last - first + 1) * widest > PREFILL_TOKENS) and last > first:
            yield groups[first:last]
            first, widest = last, group.prefix
    yield groups[first:]


def _width(groups: collections.abc.Sequence[_Group]) -> int:
    """How many columns the groups have once they are read."""
    rest = max(len(sequence.ids) - 1 - group.prefix for group in groups for sequence in group.sequences)
    return max(group.prefix for group in groups) + rest


_TILED_DIMENSIONS = {"pixel_values": 5, "pixel_attention_mask": 4}
"""How many dimensions these inputs have where a picture is several tiles."""


def _stack_images(inputs: collections.abc.Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The picture inputs of several prompts as those of one, which the model reads one after another.

    Tiles are padded to the most there are, and pictures with explicit sizes (Pixtral's) to the largest.
    """
    import torch

    stacked, have_sizes = {}, any("image_sizes" in one for one in inputs)
    for name in (*PER_IMAGE_INPUTS, *SHARED_INPUTS):
        parts = [one[name] for one in inputs if name in one]
        if parts and (parts[0].dim() == _TILED_DIMENSIONS.get(name) or (have_sizes and name == "pixel_values")):
            parts = _pad_to_largest(parts)
        if parts:
            stacked[name] = torch.cat(parts)
    return stacked


def _pad_to_largest(parts: collections.abc.Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Pads tensors with zeros at the end of each dimension but the first."""
    from torch.nn.functional import pad

    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]

    def padding(part: torch.Tensor) -> list[int]:
        """In `pad`'s order: before and after, the last dimension first."""
        pairs = zip(reversed(largest), reversed(part.shape[1:]), strict=True)
        return [count for most, size in pairs for count in (0, most - size)]

    return [pad(part, padding(part)) for part in parts]
