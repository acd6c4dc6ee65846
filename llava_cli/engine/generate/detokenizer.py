"""Turns tokens into text as soon as it is certain: no broken UTF-8, no half stop text, no outer spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_WINDOW, _CONTEXT = 32, 4
"""Tokens decoded at a time, and how many of them remain as context for the next: enough to join text as in the whole.

Decoding from the first token each time would take quadratic time.
"""

_CHARACTER_BYTES = 4
"""The most that UTF-8 has."""
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What bytes that are no whole character are decoded to."""


class Detokenizer:
    """Turns an answer's token ids into pieces of text that join to `decode(ids).strip()`.

    A piece is held back while it may still change: an unfinished character, spaces that may turn out to be the
    answer's last, the beginning of one of the `stop` texts. `stopped` is true once a stop text was met.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self.restart()

    def restart(self) -> None:
        """Forgets the answer so far."""
        self._ids: list[int] = []
        self._start = 0  # decoding starts at this token
        self._decoded = ""  # the text of the tokens from there on, as last decoded
        self._held = ""
        self._has_begun = False
        self.stopped = False

    def append(self, token: int, show: bool = True) -> str:
        """The text that one more token makes certain. Without `show`, empty unless there are stop texts to look for."""
        self._ids.append(token)
        if not show and not self._stop:
            return ""  # decoding takes longer than a small model
        text = self._decode()
        if text.endswith(_UNFINISHED):
            return ""
        return self._release(self._new_text(text))

    def flush(self) -> str:
        """What was still held back, at the end of the answer."""
        rest = self._release(self._new_text(self._decode())) + ("" if self.stopped else self._held.rstrip())
        self._held = ""
        return rest

    def _decode(self) -> str:
        ids = self._ids[self._start :]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _new_text(self, text: str) -> str:
        new = text[len(self._decoded) :]
        self._decoded = text
        if len(self._ids) - self._start > _WINDOW:
            self._start = len(self._ids) - _CONTEXT
            self._decoded = self._decode()
        return new

    def _release(self, new: str) -> str:
        self._held += new if self._has_begun else new.lstrip()
        self._has_begun = self._has_begun or bool(self._held)
        if self.stopped:
            return ""
        positions = [position for position in map(self._held.find, self._stop) if position >= 0]
        if positions:
            self.stopped = True
            text, self._held = self._held[: min(positions)].rstrip(), ""
            return text
        partial = max((self._partial_stop(stop) for stop in self._stop), default=0)
        certain = self._held[: len(self._held) - partial].rstrip()
        self._held = self._held[len(certain) :]
        return certain

    def _partial_stop(self, stop: str) -> int:
        """How many of the held text's last characters are the beginning of a stop text."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def text_of(tokenizer: Any, ids: Sequence[int], index: int) -> str:
    """The text of one of the tokens `ids`, for people: of a byte of a character, that of the whole character."""
    for width in range(1, _CHARACTER_BYTES + 1):
        for begin in range(max(0, index - width + 1), min(index, len(ids) - width) + 1):
            text = str(tokenizer.decode(ids[begin : begin + width], clean_up_tokenization_spaces=False))
            if _UNFINISHED not in text:
                return text.strip() or text
    return _UNFINISHED
