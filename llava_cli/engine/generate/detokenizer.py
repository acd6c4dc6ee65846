"""Tokens in, text out as soon as it is certain: no broken UTF-8, no half stop text, no outer spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Turns an answer's token ids into pieces of text that join to `decode(ids).strip()`.

    A piece is held back while it may still change: an unfinished character, spaces that may turn out
    to be the answer's last, a beginning of one of the `stop` texts. `stopped` says that one was met.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._ids: list[int] = []
        self._start = 0  # ids before it are settled; decoding starts there
        self._settled = ""  # the text of ids[start:read], to be cut off the front
        self._held = ""
        self._begun = False
        self.stopped = False

    def put(self, token: int, show: bool = True) -> str:
        """The text that has become certain with one more token; without `show` only where a stop text may come."""
        self._ids.append(token)
        if not show and not self._stop:
            return ""  # decoding takes longer than a small model
        text = self._decode()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # bytes of an unfinished character
        return self._give(self._new(text))

    def end(self) -> str:
        """What was still held back, at the answer's end."""
        rest = self._give(self._new(self._decode())) + ("" if self.stopped else self._held.rstrip())
        self._held = ""
        return rest

    def _decode(self) -> str:
        ids = self._ids[self._start :]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _new(self, text: str) -> str:
        new = text[len(self._settled) :]
        self._settled = text
        # Decoding from the first token each time would take time squared. A few tokens of context are
        # enough for the decoder to join the next one as it would in the whole.
        if len(self._ids) - self._start > 32:
            self._start = len(self._ids) - 4
            self._settled = self._decode()
        return new

    def _give(self, new: str) -> str:
        self._held += new if self._begun else new.lstrip()
        self._begun = self._begun or bool(self._held)
        if self.stopped:
            return ""
        ends = [at for at in map(self._held.find, self._stop) if at >= 0]
        if ends:
            self.stopped = True
            text, self._held = self._held[: min(ends)].rstrip(), ""
            return text
        keep = max((self._beginning(s) for s in self._stop), default=0)
        sure = self._held[: len(self._held) - keep].rstrip()
        self._held = self._held[len(sure) :]
        return sure

    def _beginning(self, stop: str) -> int:
        """How many of the held text's last characters are the first of a stop text."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
