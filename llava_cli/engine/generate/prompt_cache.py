"""Keys and values of earlier prompts: a conversation that grows is read only from where it differs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from llava_cli.engine.generate.picture_inputs import count_pictures
from llava_cli.engine.kv_cache import RoomyCache

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.generate.sequence import Sequence

MAX_PROMPTS = 256
"""Prompts that are kept: a new one is compared with each one about the same picture."""


@dataclass
class CachedPrompt:
    """Tokens that were read, the pictures among them, and a KV cache with one row for them."""

    ids: list[int]
    images: tuple[str, ...]
    cache: RoomyCache

    def truncate(self, length: int, images: int) -> None:
        """Forgets all but the first tokens and pictures."""
        # The tokens first: if Ctrl-C interrupts the loop, they are still in every layer.
        self.ids, self.images = self.ids[:length], self.images[:images]
        self.cache.truncate(length)

    def starts_with(self, other: CachedPrompt) -> bool:
        same_images = self.images[: len(other.images)] == other.images
        return same_images and self.ids[: len(other.ids)] == other.ids


@dataclass(frozen=True)
class CachedPrefix:
    """What a sequence need not read: its first `length` tokens, with its first `images` pictures."""

    length: int
    images: int
    prompt: CachedPrompt
    in_place: bool

    def take_cache(self) -> RoomyCache:
        """A KV cache with one row that holds the prefix and may be extended."""
        return self.prompt.cache if self.in_place else self.prompt.cache.copy_row(0, slice(0, self.length))


class PromptCache:
    """The prompts that were read last.

    Up to `budget` bytes of them, for many sequences at a time, each of which extends a copy. Without a budget (None)
    only the last prompt, for one sequence at a time, which extends the cached tensors themselves: nothing is copied.
    """

    def __init__(self, budget: int | None, image_token: int | None) -> None:
        self._budget, self._image_token = budget, image_token
        self._prompts: list[CachedPrompt] = []  # least recently used first
        self.nbytes = 0

    def find(self, sequence: Sequence) -> CachedPrefix | None:
        """The longest prefix that the sequence shares with a cached prompt."""
        best, length, images = None, 0, 0
        for prompt in self._prompts:
            tokens, pictures = shared_prefix(prompt, sequence, self._image_token)
            if tokens > length:
                best, length, images = prompt, tokens, pictures
        if self._budget is None:
            self._prompts = [best] if best else []
            if best:
                best.truncate(length, images)
        elif best:
            self._prompts.remove(best)
            self._prompts.append(best)
        return CachedPrefix(length, images, best, self._budget is None) if best else None

    def store(
        self, sequence: Sequence, length: int, cache: RoomyCache, row: int, columns: torch.Tensor | slice
    ) -> None:
        """Keeps the first `length` tokens of a sequence, which are those columns of a row of the batch's cache."""
        if self._budget is None:
            self._prompts = [CachedPrompt(sequence.ids[:length], sequence.images, cache)]
            return
        new = CachedPrompt(sequence.ids[:length], sequence.images, cache.copy_row(row, columns))
        for prompt in [prompt for prompt in self._prompts if new.starts_with(prompt)]:
            self._remove(prompt)
        self._prompts.append(new)
        self.nbytes += new.cache.nbytes
        while self._prompts and (self.nbytes > self._budget or len(self._prompts) > MAX_PROMPTS):
            self._remove(self._prompts[0])

    def clear(self) -> None:
        self._prompts, self.nbytes = [], 0

    def _remove(self, prompt: CachedPrompt) -> None:
        self._prompts.remove(prompt)
        self.nbytes -= prompt.cache.nbytes


def common_prefix_length(first: list[int], second: list[int]) -> int:
    """How many tokens two lists have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def shared_prefix(prompt: CachedPrompt, sequence: Sequence, image_token: int | None) -> tuple[int, int]:
    """How many leading tokens and pictures of a sequence a cached prompt holds; never a part of the pictures.

    Only the family's code knows where one picture's tokens end and the next one's begin, so a prefix has all pictures
    of one of both.
    """
    if prompt.images and sequence.images and prompt.images[0] != sequence.images[0]:
        return 0, 0
    length = common_prefix_length(sequence.ids[:-1], prompt.ids)  # the last token has to be read for its logits
    within = sequence.ids[:length].count(image_token)  # type: ignore[arg-type]
    if within == sequence.ids.count(image_token):  # type: ignore[arg-type]
        images = len(sequence.images)
    elif within == prompt.ids.count(image_token):  # type: ignore[arg-type]
        images = len(prompt.images)
        if images and count_pictures(sequence.inputs) != len(sequence.images):
            return 0, 0  # the tensors do not say which picture is whose
    else:
        return 0, 0
    return (length, images) if prompt.images[:images] == sequence.images[:images] else (0, 0)
