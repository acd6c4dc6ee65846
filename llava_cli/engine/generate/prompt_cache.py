"""Keys and values of prompts that were read before: a conversation that grows is read from where it differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_cli.engine.generate.prefix import alike

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.generate.batch import Row
    from llava_cli.engine.kv_cache import RoomyCache

MOST = 256
"""Prompts that are kept: each one about the same picture is compared with a new one."""

Layer = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class Read:
    """What was read: tokens, the pictures among them (SHA-256), keys and values [1, heads, tokens, width] a layer."""

    ids: list[int]
    pictures: tuple[str, ...]
    layers: list[Layer]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.nbytes for layer in self.layers for part in layer)


@dataclass(frozen=True)
class Beginning:
    """What a row need not read: `tokens` of it, with the first `pictures` of its pictures."""

    tokens: int
    pictures: int
    layers: list[Layer]


class Kept:
    """What was read last, of at most `budget` bytes. `image` is the token that stands for a part of a picture."""

    def __init__(self, budget: int, image: int | None) -> None:
        self._budget, self._image = budget, image
        self._read: list[Read] = []  # the oldest first
        self.size = 0

    def begin(self, row: Row) -> Beginning | None:
        """The longest beginning that a row shares with what is kept."""
        best, its = None, 0
        for read in self._read:
            tokens, pictures = self._shared(read, row)
            if tokens > its:
                best, its = (read, pictures), tokens
        if best is None:
            return None
        read, pictures = best
        self._read.remove(read)  # to the end: it was wanted last
        self._read.append(read)
        return Beginning(its, pictures, [(keys[:, :, :its], values[:, :, :its]) for keys, values in read.layers])

    def put(self, row: Row, cache: RoomyCache, number: int, mask: torch.Tensor) -> None:
        """Keeps what a cache holds of its row `number`, whose tokens are where `mask` [columns] is true."""
        there, its = mask, slice(number, number + 1)
        every: list[Any] = cache.layers
        layers = [(layer.keys[its, :, there], layer.values[its, :, there]) for layer in every]
        read = Read(row.ids[: int(there.sum())], row.pictures, layers)
        for other in [one for one in self._read if self._contains(read, one)]:
            self._forget(other)
        self._read.append(read)
        self.size += read.size
        while self._read and (self.size > self._budget or len(self._read) > MOST):
            self._forget(self._read[0])

    def clear(self) -> None:
        """Forgets all."""
        self._read, self.size = [], 0

    def _forget(self, read: Read) -> None:
        self._read.remove(read)
        self.size -= read.size

    def _contains(self, read: Read, other: Read) -> bool:
        same_pictures = read.pictures[: len(other.pictures)] == other.pictures
        return same_pictures and read.ids[: len(other.ids)] == other.ids

    def _shared(self, read: Read, row: Row) -> tuple[int, int]:
        """How many tokens and pictures at a row's beginning have been read; in the midst of pictures none."""
        if read.pictures[:1] != row.pictures[:1]:
            return 0, 0
        tokens = alike(row.ids[:-1], read.ids)  # the last one has to be read for its logits
        within = row.ids[:tokens].count(self._image)  # type: ignore[arg-type]
        if within == row.ids.count(self._image):  # type: ignore[arg-type]
            pictures = len(row.pictures)
        elif within == read.ids.count(self._image):  # type: ignore[arg-type]
            pictures = len(read.pictures)
            if pictures and len(row.inputs["pixel_values"]) != len(row.pictures):
                return 0, 0  # whose are whose is the family's own business
        else:
            return 0, 0
        return (tokens, pictures) if read.pictures[:pictures] == row.pictures[:pictures] else (0, 0)
