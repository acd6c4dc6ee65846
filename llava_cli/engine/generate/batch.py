"""Sequences that are answered together: rows of one KV cache, which join it and leave it between two steps.

A row's tokens stand at the cache's right end. There is padding, hidden by the attention mask, to their left and, where
sequences that share their pictures have questions of different lengths, between the pictures and the question.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from llava_cli.engine.forward import Forward
from llava_cli.engine.generate.confidence import token_log_probabilities
from llava_cli.engine.generate.picture_inputs import PER_IMAGE_INPUTS, SHARED_INPUTS, pictures_from, stack_pictures
from llava_cli.engine.generate.positions import Positions
from llava_cli.engine.generate.prompt_cache import CachedPrefix, PromptCache, common_prefix_length
from llava_cli.engine.generate.sequence import Sequence
from llava_cli.engine.kv_cache import RoomyCache, plain_cache
from llava_cli.models.families import READS_PARTS, READS_WHOLE

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.generate.choices import ChoiceSequence

PREFILL_TOKENS = {"cuda": 8192}
"""Tokens, padding included, that one forward pass reads, by device; what it makes of pictures is held at once, too."""
_OTHER_PREFILL_TOKENS = 1536
"""On a CPU a small model is a sixth slower with twice as many."""
_TOKEN_TYPES = "token_type_ids"
"""A model input [1, tokens] with a number for each kind of token: those of a picture, for example, see each other."""
_NO_TYPE = -1
_TOKEN_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", _TOKEN_TYPES)
_BATCHABLE_INPUTS = {*_TOKEN_INPUTS, *PER_IMAGE_INPUTS, *SHARED_INPUTS}


def can_batch(model: Any, inputs: Collection[str]) -> bool:
    """Whether prompts with inputs of these names can be read beside others. Other caches than ours cannot be cut."""
    is_known = model.config.model_type in READS_PARTS | READS_WHOLE
    return is_known and _BATCHABLE_INPUTS.issuperset(inputs) and plain_cache(model)


@dataclass(frozen=True)
class _Group:
    """Sequences that share their first `prefix` tokens, all of their pictures among them."""

    sequences: list[Sequence]
    prefix: int
    cached: CachedPrefix | None = None
    """What the prompt cache has of the only sequence."""


class _Span(NamedTuple):
    """Tokens of a sequence, from the one with number `begin` to before `end`."""

    sequence: Sequence
    begin: int
    end: int


class Batch:
    """The sequences that one model is answering together."""

    def __init__(self, model: Any, prompt_cache: PromptCache | None = None) -> None:
        self.model, self._forward = model, Forward(model)
        self._reads_whole = model.config.model_type in READS_WHOLE
        # What was read of a prompt that sees what is behind it is right for no other one.
        self._prompt_cache = None if self._reads_whole else prompt_cache
        self.sequences: list[Sequence] = []
        self._image_token: int | None = getattr(model.config, "image_token_id", None)
        # A sliding window counts columns: padding between a sequence's tokens would hide too much.
        self._can_share = not getattr(model.config.get_text_config(), "sliding_window", None)
        self._cache: Any = None
        self._columns = 0  # of the cache, that all of its layers hold for sure
        # [rows, columns], true where a token is; None without padding. In the host's memory, as all masks here: to ask
        # a device whether there is padding is to wait for it.
        self._mask: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        """[rows, vocabulary] for the next step, if reading the prompt gave them."""

    def join(self, sequences: collections.abc.Sequence[Sequence]) -> None:
        """Reads prompts, all but their last tokens, and adds them to the batch.

        A lone one is read whole, as all are by models that want it; then there are `logits`.
        """
        import torch

        is_lone = len(sequences) == 1 and not self.sequences
        whole = is_lone or self._reads_whole
        groups: list[_Group] = []
        for sequence in sequences:
            sequence.has_begun = True
            sequence.positions = Positions.of(self.model, sequence.inputs)
            cached = None if self._prompt_cache is None else self._prompt_cache.find(sequence)
            sequence.cached_tokens = cached.length if cached else 0
            if groups and (prefix := self._shared_prefix(groups[-1], sequence)):
                groups[-1] = _Group([*groups[-1].sequences, sequence], prefix)
            else:
                groups.append(_Group([sequence], len(sequence.ids) - (not whole), cached))
        with torch.inference_mode():
            if is_lone:
                self._cache, mask, self.logits = self._prefill(groups)
                self._columns, self.sequences = mask.shape[1], list(sequences)
            else:
                self._join_groups(groups, len(self.sequences) + len(sequences))

    def _join_groups(self, groups: list[_Group], rows: int) -> None:
        """Reads groups, as many at a time as one forward pass does, until the batch has that many rows."""
        import torch

        logits = []
        if self._reads_whole and self.sequences:  # the logits of their next step, which may be known already
            logits = [self._decode()[0] if self.logits is None else self.logits]
        most = PREFILL_TOKENS.get(self.model.device.type, _OTHER_PREFILL_TOKENS)
        parts = list(_forward_passes(groups, most))
        width = max(_width(part) for part in parts)
        mask = self._full_mask() if self.sequences else None
        if mask is not None:
            # Drops columns on the left that only sequences had which have left.
            width = max(width, mask.shape[1] - int(mask.any(0).int().argmax()))
            mask = self._reserve(mask, rows, width)
        for part in parts:
            new = [sequence for group in part for sequence in group.sequences]
            cache, new_mask, new_logits = self._prefill(part)
            if self._reads_whole:
                logits.append(new_logits)
            if mask is None:
                self._cache, mask = cache, self._reserve(new_mask, rows, width, cache)
            else:
                for layer, new_layer in zip(self._cache.layers, cache.layers, strict=True):
                    layer.append_rows(new_layer)
                mask = torch.cat([mask, _left_padded(new_mask, width)])
            self.sequences = [*self.sequences, *new]
            self._set_mask(mask)
        if self._reads_whole:
            self.logits = torch.cat(logits)

    def step(self) -> list[Sequence]:
        """Adds a token to every sequence. Returns those whose answer is then complete, which have left the batch.

        Where some choose from a list, their answers are completed, and the others wait.
        """
        import torch

        if choosing := [row for row, sequence in enumerate(self.sequences) if sequence.chooses]:
            return self._choose(choosing)
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
            self._record(logits, tokens)
            for sequence, token, row in zip(self.sequences, tokens.tolist(), logits, strict=True):
                sequence.append(token, row)
        complete = [i for i, sequence in enumerate(self.sequences) if sequence.is_complete]
        leaving = [self.sequences[i] for i in complete]
        if complete:
            self._remove(complete)
        return leaving

    def _choose(self, rows: list[int]) -> list[Sequence]:
        """Completes the answers of rows that choose from a list."""
        import torch

        from llava_cli.engine.generate.choice_pass import read_trees

        choosing = [self.sequences[row] for row in rows]
        with torch.inference_mode():
            is_all = len(rows) == len(self.sequences)
            cache = self._cache if is_all else self._cache.copy_rows(rows)
            mask = self._mask if is_all or self._mask is None else self._mask[rows]
            logits = self.logits if is_all or self.logits is None else self.logits[rows]
            read_trees(self._forward, cast("list[ChoiceSequence]", choosing), cache, mask, logits)
        self._remove(rows)
        return choosing

    def _record(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """Tells sequences that want it how probable their next token is: [rows, vocabulary] and [rows]."""
        rows = [row for row, sequence in enumerate(self.sequences) if sequence.records]
        if not rows:
            return
        if len(rows) < len(self.sequences):
            logits, tokens = logits[rows], tokens[rows]
        for row, log_probability in zip(rows, token_log_probabilities(logits, tokens), strict=True):
            self.sequences[row].record(log_probability)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence before its answer is complete."""
        self._remove([self.sequences.index(sequence)])

    def _decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads the last token of each sequence -> logits [rows, vocabulary] and the likeliest tokens [rows]."""
        import torch

        mask = self._mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(self.sequences), 1)], dim=1)
        tokens = [sequence.ids[-1] for sequence in self.sequences]
        positions = [len(sequence.ids) - 1 + sequence.positions.delta for sequence in self.sequences]
        outputs = self._forward.decode(tokens, positions, self._cache, mask)
        self._columns, self._mask = self._columns + 1, mask
        return outputs

    def _shared_prefix(self, group: _Group, sequence: Sequence) -> int:
        """How many leading tokens a group and a sequence share, if all their pictures are among them; else 0."""
        first = group.sequences[0]
        if first.images != sequence.images or group.cached or sequence.cached_tokens:
            return 0
        if not self._can_share or _TOKEN_TYPES in first.inputs:
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
            return self._prefill_rest(_Span(groups[0].sequences[0], cached.length, groups[0].prefix), cached)
        cache = RoomyCache()
        spans = [_Span(group.sequences[0], 0, group.prefix) for group in groups]
        mask = self._mask_of(spans)
        logits = self._read(spans, cache, mask, stack_pictures([span.sequence.inputs for span in spans]))
        if any(len(group.sequences) > 1 for group in groups):
            rows = [i for i, group in enumerate(groups) for _ in group.sequences]
            index = torch.tensor(rows)
            cache.batch_select_indices(index)
            spans = [_Span(s, group.prefix, len(s.ids) - 1) for group in groups for s in group.sequences]
            rest = self._mask_of(spans)
            mask = torch.cat([mask[index], rest], dim=1)
            if rest.shape[1]:
                logits = self._read(spans, cache, mask, {})
        return cache, mask, logits

    def _prefill_rest(self, span: _Span, cached: CachedPrefix) -> tuple[RoomyCache, torch.Tensor, torch.Tensor]:
        """Reads what a cached prefix lacks of a sequence's tokens up to the end of `span`."""
        sequence, begin, end = span
        cache, mask = cached.take_cache(), self._mask_of([_Span(sequence, 0, end)])
        if begin == end:
            return cache, mask, mask.new_empty(0)
        has_pictures = self._image_token in sequence.ids[begin:]
        pictures = pictures_from(sequence.inputs, cached.images) if has_pictures else {}
        return cache, mask, self._read([span], cache, mask, pictures)

    def _read(
        self,
        spans: collections.abc.Sequence[_Span],
        cache: RoomyCache,
        mask: torch.Tensor,
        pictures: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Reads spans with their pictures, the last columns of `mask` [rows, columns] -> logits [rows, vocabulary]."""
        import torch

        padding = int(self._image_token == 0)  # any token that is no picture
        width = max(end - begin for _, begin, end in spans)
        ids = [[padding] * (width - end + begin) + sequence.ids[begin:end] for sequence, begin, end in spans]
        positions = [_left_padded(sequence.positions.between(begin, end), width) for sequence, begin, end in spans]
        inputs = {"input_ids": torch.tensor(ids, device=self.model.device), **pictures}
        if _TOKEN_TYPES in spans[0].sequence.inputs:
            inputs[_TOKEN_TYPES] = torch.cat([_token_types(span, mask.shape[1]) for span in spans])
        # Without a mask the model makes none of its own.
        return self._forward(inputs, cache, None if mask.all() else mask, torch.stack(positions, dim=-2)).float()

    def _mask_of(self, spans: collections.abc.Sequence[_Span]) -> torch.Tensor:
        """[rows, longest]: true where tokens are that are padded on their left."""
        import torch

        lengths = [end - begin for _, begin, end in spans]
        width = max(lengths)
        mask = [[False] * (width - length) + [True] * length for length in lengths]
        return torch.tensor(mask).view(len(lengths), width).bool()

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
                if self.logits is not None:
                    self.logits[row] = self.logits[-1]
                    self.logits = self.logits[:-1]
            for layer in self._cache.layers:
                layer.drop_rows(rows[::-1])
            if mask is not None:
                self._set_mask(mask)

    def _full_mask(self) -> torch.Tensor:
        import torch

        if self._mask is not None:
            return self._mask
        return torch.ones(len(self.sequences), self._columns, dtype=torch.bool)

    def _set_mask(self, mask: torch.Tensor) -> None:
        self._columns, self._mask = mask.shape[1], None if mask.all() else mask


def _left_padded(columns: torch.Tensor, width: int) -> torch.Tensor:
    """[..., columns] -> [..., width], padded with zeros or cut on its left."""
    from torch.nn.functional import pad

    return pad(columns, (width - columns.shape[-1], 0))


def _token_types(span: _Span, width: int) -> torch.Tensor:
    """[1, width]: the types of a sequence's tokens up to the end of `span`; padding and its answer have none."""
    from torch.nn.functional import pad

    types = span.sequence.inputs[_TOKEN_TYPES][:, : span.end]
    return pad(types, (width - span.end, span.end - types.shape[1]), value=_NO_TYPE)


def _forward_passes(groups: collections.abc.Sequence[_Group], most: int) -> Iterator[collections.abc.Sequence[_Group]]:
    """As many groups at a time as have `most` tokens; a sequence with a cached prefix alone."""
    first, widest = 0, 0
    for last, group in enumerate(groups):
        widest = max(widest, group.prefix)
        is_alone = bool(group.cached or groups[first].cached)
        if (is_alone or (last - first + 1) * widest > most) and last > first:
            yield groups[first:last]
            first, widest = last, group.prefix
    yield groups[first:]


def _width(groups: collections.abc.Sequence[_Group]) -> int:
    """How many columns the groups have once they are read."""
    rest = [len(sequence.ids) - 1 - group.prefix for group in groups for sequence in group.sequences]
    return max(group.prefix for group in groups) + max(0, *rest)
