"""Pictures, turns and conversations. All are immutable; each step makes a new conversation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli.errors import PromptTooLong
from llava_cli.parts import WHOLE, Part

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """An upright RGB picture and where it came from."""

    name: str
    """The path, URL or "-" that the user typed."""
    image: Image = field(repr=False, compare=False)
    sha256: str
    """Of the file's bytes, in hex."""
    frames: int = 1
    """How many pages or frames the file has."""
    truncated: bool = False
    """Whether the file's end is missing, which the user allowed."""
    data: bytes | None = field(default=None, repr=False, compare=False)
    """The file's bytes; None if they were not kept, or if they do not tell which picture it is."""
    format: str = field(default="", compare=False)
    """JPEG or PNG; empty for other formats, or if unknown."""
    plain: bool = field(default=False, compare=False)
    """Whether every decoder gets the same pixels from `data` as ours."""
    part: Part = WHOLE
    """Which page or frame of the file it is."""
    region: str | None = None
    """What of the page or frame it is (see `parts.parse_region`); None for all of it."""
    dpi: int | None = None
    """Dots an inch with which it was drawn; None for what has pixels of its own."""
    file: bytes | Path | None = field(default=None, repr=False, compare=False)
    """The file that it is a part of, where that is kept to be asked what else it says."""
    original_size: tuple[int, int] | None = field(default=None, compare=False)
    """Width and height before it was resized, if it was: for one model alone, as its processor would do it."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as its file has them."""
        return self.original_size or self.image.size

    def with_image(self, image: Image, **changes: Any) -> Picture:
        """One with other pixels, which its file's bytes do not tell."""
        return replace(self, image=image, data=None, format="", plain=False, original_size=None, **changes)

    @property
    def reference(self) -> str:
        """Its name with the part: `invoice.pdf#2`."""
        return f"{self.name}{self.part}"

    @property
    def label(self) -> str:
        """What people read: `invoice.pdf#2 at 60%,0,100%,30%`."""
        return f"{self.reference} at {self.region}" if self.region else self.reference

    @property
    def is_whole_file(self) -> bool:
        """Whether its file has no other pictures that it could be taken for."""
        return self.part == WHOLE and self.region is None and self.dpi is None

    @cached_property
    def identity(self) -> str:
        """Equal for pictures with the same pixels: the digest of the file or, if that does not tell, of the pixels."""
        if self.sha256 and self.is_whole_file:
            return self.sha256
        return hashlib.sha256(f"{self.image.size}".encode() + self.image.tobytes()).hexdigest()


@dataclass(frozen=True)
class Turn:
    """One question about zero or more pictures; `answer` is None until it is answered."""

    question: str
    pictures: tuple[Picture, ...] = ()
    answer: str | None = None
    parts: tuple[str | Picture, ...] = ()
    """The question's texts and pictures in order; empty for the usual order, pictures first (see `of`)."""
    is_unasked: bool = False
    """Whether there is no question: the model speaks first, or once more."""
    system: str | None = None
    """Instructions before this turn, after the conversation's own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", _as_text(self.question))
        object.__setattr__(self, "parts", tuple(_as_text(p) if isinstance(p, str) else p for p in self.parts))

    @classmethod
    def of(cls, parts: Iterable[str | Picture], answer: str | None = None) -> Turn:
        """A turn of texts and pictures in this order. Adjacent texts become lines of one."""
        joined: list[str | Picture] = []
        for part in parts:
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += f"\n{part}"
            else:
                joined.append(part)
        texts = [part for part in joined if isinstance(part, str)]
        pictures = tuple(part for part in joined if isinstance(part, Picture))
        is_usual = joined == [*pictures, *texts]
        return cls("\n".join(texts), pictures, answer, () if is_usual else tuple(joined))


@dataclass(frozen=True)
class Conversation:
    """Turns in order, after an optional system text. The last one is unanswered when it goes to an engine."""

    turns: tuple[Turn, ...] = ()
    system: str | None = None

    def __post_init__(self) -> None:
        if self.system is not None:
            object.__setattr__(self, "system", _as_text(self.system))

    def ask(self, question: str, pictures: Sequence[Picture] = ()) -> Conversation:
        """This conversation with one more question."""
        return replace(self, turns=(*self.turns, Turn(question, tuple(pictures))))

    def answered(self, text: str) -> Conversation:
        """This conversation with its last question answered."""
        return replace(self, turns=(*self.turns[:-1], replace(self.turns[-1], answer=text)))

    def with_pictures(self, change: Callable[[Picture], Picture]) -> Conversation:
        """This conversation with what `change` makes of each picture in its place."""

        def changed(turn: Turn) -> Turn:
            parts = tuple(part if isinstance(part, str) else change(part) for part in turn.parts)
            return replace(turn, pictures=tuple(map(change, turn.pictures)), parts=parts)

        return replace(self, turns=tuple(map(changed, self.turns)))

    @property
    def instructions(self) -> tuple[str, ...]:
        """All system texts, in the order in which the prompt has them."""
        texts = (self.system, *(turn.system for turn in self.turns))
        return tuple(text for text in texts if text is not None)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures, in the order in which the prompt names them."""
        return tuple(picture for turn in self.turns for picture in turn.pictures)


@contextmanager
def naming_fewer_parts(conversation: Conversation) -> Iterator[None]:
    """Has a `PromptTooLong` name the option that takes fewer pages or frames of a file, if there are several."""
    try:
        yield
    except PromptTooLong as error:
        parts = [picture.part for picture in conversation.pictures if picture.part != WHOLE]
        if len(parts) > 1:
            half = len(parts) // 2
            pages = "1" if half == 1 else f"1-{half}"
            fewer = f"--pages {pages}" if parts[0].time is None else f"--frames {half}"
            error.hint = f"{len(parts)} pages or frames are in it; {fewer} takes fewer"
        raise


def _as_text(text: str) -> str:
    """Replaces bytes that are not UTF-8, which a command line or a pipe may have and no tokenizer takes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
