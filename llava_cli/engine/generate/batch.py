"""Many answers at once: rows of one KV cache, which join it and leave it between two steps.

A row's tokens stand at the cache's right end; on its left, and where rows that share their pictures have
questions of different lengths, there is padding that the attention mask hides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_cli.engine.base import Answer
from llava_cli.engine.forward import Forward
from llava_cli.engine.generate.decode import Chooser
from llava_cli.engine.generate.prefix import ROWS, WHOLE, alike
from llava_cli.engine.generate.prompt_cache import Beginning, Kept
from llava_cli.engine.generate.reply import Reply
from llava_cli.engine.kv_cache import RoomyCache

if TYPE_CHECKING:
    import torch

PREFILL = 1536
"""Tokens, padding included, that one forward pass reads: with twice as many a small model is a sixth slower."""


class Row:
    """Request number `number`: its prompt, the tensors of its pictures, and the answer that it gets.

    `group` is equal for rows with the same pictures, which then are read only once. `start` makes what chooses and
    what takes the answer's tokens, of which there may be `most`. `show`, where there is one, gets each token as it
    comes, and the text that is certain with it; with `top`, also what was likeliest in its place.
    """

    pictures: tuple[str, ...] = ()
    """Their SHA-256, where what was read of them may serve others."""
    show: Callable[[Token], None] | None = None
    top: int | None = None
    read: Beginning | None = None
    """What need not be read of it."""

    def __init__(
        self,
        number: int,
        inputs: dict[str, torch.Tensor],
        group: Any,
        most: int,
        start: Callable[[], tuple[Chooser, Reply]],
    ) -> None:
        self.number, self.inputs, self.group = number, inputs, group
        self.prompt: list[int] = inputs["input_ids"][0].tolist()
        self.most_tokens = len(self.prompt) + most
        self._start = start
        self.begin()

    def begin(self) -> None:
        """Starts the answer, anew if need be."""
        self.ids = list(self.prompt)  # and then the answer's
        self.choose, self.reply = self._start()

    def answer(self) -> Answer:
        """The whole answer, once its `reply` is done."""
        last = self.reply.end()
        if self.show and last:
            self.show(Token(last))
        return self.reply.answer(len(self.prompt), self.read.tokens if self.read else 0)

    def take(self, token: int, logits: torch.Tensor) -> None:
        """One more token, chosen by `logits` [vocabulary]."""
        self.ids.append(token)
        text = self.reply.put(token, show=self.show is not None)
        if self.show and (text or self.top is not None):
            self.show(Token(text, None if self.top is None else Likelihood.of(token, logits, self.top)))


@dataclass(frozen=True)
class Likelihood:
    """A token, the logarithm of its probability, and as much of those that were likeliest in its place."""

    token: int
    logarithm: float
    likeliest: list[tuple[int, float]]

    @classmethod
    def of(cls, token: int, logits: torch.Tensor, top: int) -> Likelihood:
        logarithms = logits.float().log_softmax(-1)
        best, which = logarithms.topk(min(top, len(logarithms)))
        likeliest = list(zip(which.tolist(), best.tolist(), strict=True))
        return cls(token, float(logarithms[token]), likeliest)


@dataclass(frozen=True)
class Token:
    """The text that became certain with one more token."""

    text: str
    likelihood: Likelihood | None = None


@dataclass(frozen=True)
class _Group:
    """Rows whose first `head` tokens, all their pictures among them, are the same."""

    rows: list[Row]
    head: int


class Batch:
    """The rows that are being answered together by one model."""

    def __init__(self, model: Any, kept: Kept | None = None) -> None:
        self.model, self._kept, self._forward = model, kept, Forward(model)
        self.rows: list[Row] = []
        self._image: int | None = getattr(model.config, "image_token_id", None)
        # A sliding window counts columns: with padding in their midst it would hide too much.
        self._shares = not getattr(model.config.get_text_config(), "sliding_window", None)
        self._cache: Any = None
        self._mask: torch.Tensor = None  # type: ignore[assignment]  # [rows, columns], true where a token is

    def join(self, rows: Sequence[Row]) -> None:
        """Reads the rows' prompts, all but their last tokens, and puts them to those that are being answered."""
        import torch

        groups: list[_Group] = []
        for row in rows:
            if self._kept is not None:
                row.read = self._kept.begin(row)
            if groups and (head := self._shared(groups[-1], row)):
                groups[-1] = _Group([*groups[-1].rows, row], head)
            else:
                groups.append(_Group([row], len(row.ids) - 1))
        parts, total = list(_parts(groups)), len(self.rows) + len(rows)
        width = max(_width(part) for part in parts)
        if self.rows:
            # Columns on the left that only rows had which have left go with them.
            width = max(width, self._mask.shape[1] - int(self._mask.any(0).int().argmax()))
            with torch.inference_mode():
                self._make_room(total, width)
        for part in parts:
            new = [row for group in part for row in group.rows]
            cache, mask = self._read(part, len(new))
            with torch.inference_mode():
                if self.rows:
                    self._append(new, cache, mask)
                else:
                    self.rows, self._cache, self._mask = new, cache, mask
                    self._make_room(total, width)

    def step(self) -> list[Row]:
        """One more token for every row; returns those whose `reply` is then done, which have left."""
        import torch

        device = self._mask.device
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
        ids = torch.tensor([row.ids[-1:] for row in self.rows], device=device)
        positions = torch.tensor([[len(row.ids) - 1] for row in self.rows], device=device)
        logits = self._forward({"input_ids": ids}, self._cache, _if_padded(self._mask), positions).float()
        tokens: list[int]
        if all(row.choose.greedy for row in self.rows):
            tokens = logits.argmax(-1).tolist()
        else:
            tokens = [
                int(row.choose(torch.tensor([row.ids], device=logits.device), logits[i : i + 1]))
                for i, row in enumerate(self.rows)
            ]
        for row, token, its in zip(self.rows, tokens, logits, strict=True):
            row.take(token, its)
        done = [i for i, row in enumerate(self.rows) if row.reply.done]
        leaving = [self.rows[i] for i in done]
        if done:
            self._drop(done)
        return leaving

    def _shared(self, group: _Group, row: Row) -> int:
        """How many tokens the group and a row begin with alike, if all their pictures are among them; else 0."""
        first = group.rows[0]
        if not self._shares or first.group != row.group or first.read or row.read:
            return 0
        head = alike(first.ids[: group.head], row.ids[:-1])
        # In the midst of pictures, where one ends is the family's own business.
        return head if self._image not in first.ids[head:] and self._image not in row.ids[head:] else 0

    def _read(self, groups: Sequence[_Group], rows: int) -> tuple[RoomyCache, torch.Tensor]:
        """Reads what the rows of each group have in common once, then each row's rest but for its last token.

        Returns the keys and values of that many rows, and their mask [rows, columns].
        """
        import torch

        if begun := groups[0].rows[0].read:
            return self._read_on(groups[0].rows[0], begun)
        cache = RoomyCache()
        ids, mask = self._left_padded([group.rows[0].ids[: group.head] for group in groups])
        self._read_columns({"input_ids": ids, **_stacked([group.rows[0].inputs for group in groups])}, cache, mask)
        if rows > len(groups):
            index = torch.tensor([i for i, group in enumerate(groups) for _ in group.rows], device=mask.device)
            cache.batch_select_indices(index)
            ids, tail = self._left_padded([row.ids[group.head : -1] for group in groups for row in group.rows])
            mask = torch.cat([mask[index], tail], dim=1)
            if ids.shape[1]:
                self._read_columns({"input_ids": ids}, cache, mask)
        return cache, mask

    def _read_on(self, row: Row, begun: Beginning) -> tuple[RoomyCache, torch.Tensor]:
        """Reads what is left of one row, but for its last token, behind what was read of it before."""
        cache = RoomyCache()
        for number, (keys, values) in enumerate(begun.layers):
            cache.update(keys, values, number)
        ids, mask = self._left_padded([row.ids[:-1]])
        inputs = {"input_ids": ids[:, begun.tokens :]}
        if self._image in row.ids[begun.tokens :]:
            inputs |= {name: row.inputs[name][begun.pictures :] for name in ROWS if name in row.inputs}
            inputs |= {name: row.inputs[name] for name in WHOLE if name in row.inputs}
        if inputs["input_ids"].shape[1]:
            self._read_columns(inputs, cache, mask)
        return cache, mask

    def _make_room(self, rows: int, width: int) -> None:
        """For so many rows of `width` columns in all."""
        from torch.nn.functional import pad

        for layer in self._cache.layers:
            layer.make_room(rows, width)
        self._mask = pad(self._mask, (width - self._mask.shape[1], 0))  # cuts where that is negative

    def _append(self, rows: list[Row], cache: RoomyCache, mask: torch.Tensor) -> None:
        """Puts freshly read rows below those that are being answered."""
        import torch
        from torch.nn.functional import pad

        for layer, new in zip(self._cache.layers, cache.layers, strict=True):
            layer.join(new)
        mask = pad(mask, (self._mask.shape[1] - mask.shape[1], 0))
        self._mask, self.rows = torch.cat([self._mask, mask]), self.rows + rows

    def leave(self, row: Row) -> None:
        """Lets a row go before it is done."""
        self._drop([self.rows.index(row)])

    def _drop(self, done: list[int]) -> None:
        """Lets rows go."""
        import torch

        if self._kept is not None:
            with torch.inference_mode():
                for i in done:
                    self._kept.put(self.rows[i], self._cache, i, self._mask[i])
        if len(done) == len(self.rows):
            self.rows, self._cache = [], None
            return
        with torch.inference_mode():
            for i in reversed(done):  # as the cache's layers do it: the last row takes its place
                self.rows[i], self._mask[i] = self.rows[-1], self._mask[-1]
                self.rows, self._mask = self.rows[:-1], self._mask[:-1]
            for layer in self._cache.layers:
                layer.drop(done[::-1])

    def _read_columns(self, inputs: dict[str, Any], cache: Any, mask: torch.Tensor) -> None:
        """Reads the last columns of `mask` [rows, columns]."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]
        self._forward(inputs, cache, _if_padded(mask), positions)

    def _left_padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [rows, longest] with padding on their left, and the mask that is true where they are."""
        import torch

        width, padding = max(map(len, rows)), int(self._image == 0)  # any token that is no picture: it is never seen
        ids = [[padding] * (width - len(row)) + row for row in rows]
        mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
        device = self.model.device
        shape = len(rows), width
        return torch.tensor(ids, device=device).view(shape).long(), torch.tensor(mask, device=device).view(shape).bool()


def _if_padded(mask: torch.Tensor) -> torch.Tensor | None:
    """Without one the model makes none of its own."""
    return None if mask.all() else mask


def _parts(groups: Sequence[_Group]) -> Iterator[Sequence[_Group]]:
    """As many groups at a time as are read in one forward pass; a row that was begun before alone."""
    first, widest = 0, 0
    for last, group in enumerate(groups):
        widest = max(widest, group.head)
        alone = bool(group.rows[0].read or groups[first].rows[0].read)
        if (alone or (last - first + 1) * widest > PREFILL) and last > first:
            yield groups[first:last]
            first, widest = last, group.head
    yield groups[first:]


def _width(groups: Sequence[_Group]) -> int:
    """How many columns they have once they are read."""
    tail = max(len(row.ids) - 1 - group.head for group in groups for row in group.rows)
    return max(group.head for group in groups) + tail


_TILED = {"pixel_values": 5, "pixel_attention_mask": 4}
"""How many dimensions they have where a row is tiles."""


def _stacked(inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The pictures of several prompts as those of one: rows one after another.

    Tiles are padded to the most there are, and pictures whose sizes are told (Pixtral's) to the largest.
    """
    import torch

    stacked, are_sized = {}, any("image_sizes" in one for one in inputs)
    for name in (*ROWS, *WHOLE):
        parts = [one[name] for one in inputs if name in one]
        if parts and (parts[0].dim() == _TILED.get(name) or (are_sized and name == "pixel_values")):
            parts = _padded(parts)
        if parts:
            stacked[name] = torch.cat(parts)
    return stacked


def _padded(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors with zeros at the end of each dimension but the first, up to the longest."""
    from torch.nn.functional import pad

    longest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]

    def lacking(part: torch.Tensor) -> list[int]:
        """As `pad` takes it: before and after, the last dimension first."""
        both = zip(reversed(longest), reversed(part.shape[1:]), strict=True)
        return [count for most, size in both for count in (0, most - size)]

    return [pad(part, lacking(part)) for part in parts]
