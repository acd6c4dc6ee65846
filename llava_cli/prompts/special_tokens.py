"""Special tokens in what a user writes stay text: they become neither control tokens nor pictures.

Each special token has a stand-in, a private-use character. `SpecialTokens.hide` puts it where a user has written the
token's text, so a prompt has both: tokens of the template, and stand-ins. To tokenize, the two trade places, and
special tokens are not recognized: the user's text is then tokenized as any other, together with its neighbors, and the
ids of stand-ins become those of the template's tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any

from transformers import AddedToken, BatchEncoding

from llava_cli import limits
from llava_cli.errors import ModelUnusable
from llava_cli.prompts.trie_regex import any_of

_FIRST_STAND_IN = "\U000f0000"
"""The first character of a Unicode plane for private use (15), in which no tokenizer has words."""
_BREAK = "\U000ffffd"
"""The last one, which breaks up a word that would be recognized as it is."""
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
"""How an added token is found in a text; its stand-in is found in the same way."""


class SpecialTokens:
    """The special tokens of a tokenizer, which learns their stand-ins here, because later other threads use it.

    Raises `ModelUnusable` if there are too many.
    """

    def __init__(self, tokenizer: Any, image_token: str) -> None:
        self._tokenizer = tokenizer
        # Added tokens that are not marked as special are control tokens too, except runs of spaces.
        added = {
            token.content: token
            for token in tokenizer.added_tokens_decoder.values()
            if token.content.strip() and token.content < _FIRST_STAND_IN
        }
        words = sorted({*added, image_token})
        if len(words) > limits.ADDED_TOKENS:
            reason = f"it has more than {limits.ADDED_TOKENS:,} added tokens"
            raise ModelUnusable("the checkpoint's tokenizer", reason, "llava models lists others")
        self._stand_ins = {word: chr(ord(_FIRST_STAND_IN) + i) for i, word in enumerate(words)}
        self._words = {stand_in: word for word, stand_in in self._stand_ins.items()}
        # Only tokens that are marked as special can be kept from being recognized; others are broken up.
        self._special = {word for word in words if word in added and added[word].special}
        self._whole = {*self._special}  # those that a user's text has in one piece
        stand_ins = [_like(added.get(word), stand_in) for word, stand_in in self._stand_ins.items()]
        tokenizer.add_tokens([*stand_ins, _like(None, _BREAK)])
        try:
            self._pattern = re.compile(any_of(words))
        except RecursionError:
            reason = "too many of its special tokens are beginnings of each other"
            raise ModelUnusable("the checkpoint's tokenizer", reason) from None
        self._either = re.compile(f"{self._pattern.pattern}|[{_FIRST_STAND_IN}-{max(self._words)}]")

    def hide(self, text: str) -> str:
        """A user's text with stand-ins for special tokens."""
        return self._pattern.sub(lambda match: self._stand_ins[match[0]], text)

    def show(self, text: str) -> str:
        """The text again, for a person."""
        return text.translate({ord(stand_in): word for stand_in, word in self._words.items()})

    def are_in(self, text: str) -> bool:
        """Whether a prompt has stand-ins."""
        return not self._words.keys().isdisjoint(text)

    def tokenize(self, tokenizer: Any, text: str, **options: Any) -> BatchEncoding:
        """The ids of a prompt that has stand-ins."""
        swapped, places = self._trade(text)
        encoding = tokenizer([swapped], **{**options, "split_special_tokens": True})
        words = {self._id(word): word for word in self._special}
        found, from_template = encoding.encodings[0].ids, encoding.encodings[0].special_tokens_mask
        for number, is_bos in zip(found, from_template, strict=True):
            if not is_bos and words.get(number) in self._whole:  # ordinary tokens have merged to a special one
                self._whole.remove(words[number])
                return self.tokenize(tokenizer, text, **options)
        ids = {self._id(self._stand_ins[word]): number for number, word in words.items()}
        seam = self._id(_BREAK)
        kept = [i for i, number in enumerate(found) if number != seam]
        data = {name: [[int(values[0][i]) for i in kept]] for name, values in encoding.items()}
        data["input_ids"] = [[ids.get(found[i], found[i]) for i in kept]]
        return _Traded(data, encoding.encodings, options.get("return_tensors"), places)

    def _trade(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """A prompt whose stand-ins and special tokens have traded places, and where its parts were and are."""
        parts, places, end, length = [], [(0, 0)], 0, 0
        for match in self._either.finditer(text):
            if word := self._words.get(match[0]):
                found = word if word in self._whole else word[0] + _BREAK + word[1:]
            else:
                found = self._stand_ins[match[0]] if match[0] in self._special else match[0]
            parts += [text[end : match.start()], found]
            length += match.start() - end
            places.append((match.start(), length))
            length += len(found)
            end = match.end()
            places.append((end, length))
        return "".join([*parts, text[end:]]), places

    def _id(self, token: str) -> int:
        return int(self._tokenizer.convert_tokens_to_ids(token))


class _Traded(BatchEncoding):
    """The encoding of a prompt, for callers that know where a character was before the trade."""

    def __init__(
        self, data: dict[str, Any], encodings: Any, tensors: str | None, places: list[tuple[int, int]]
    ) -> None:
        super().__init__(data, encodings, tensor_type=tensors)
        self._places = places

    def char_to_token(self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0) -> int:
        """The token that a character of the first and only text became."""
        character = batch_or_char_index if char_index is None else char_index
        part = bisect_right(self._places, character, key=lambda place: place[0]) - 1
        start, now = self._places[part]
        last = self._places[part + 1][1] - 1 if part + 1 < len(self._places) else now + character - start
        return super().char_to_token(0, min(now + character - start, last), sequence_index)


def _like(token: AddedToken | None, stand_in: str) -> AddedToken:
    """A stand-in that is found in a text as its special token is."""
    flags = {flag: getattr(token, flag) for flag in _FLAGS} if token and token.special else {"normalized": False}
    return AddedToken(stand_in, special=False, **flags)
