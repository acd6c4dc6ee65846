"""SentencePiece models (`tokenizer.model`) of Llama's kind -> pipelines of the tokenizers library with the same ids.

Fields and their numbers are those of sentencepiece_model.proto (github.com/google/sentencepiece). Each text between
special tokens is tokenized by itself, as with SentencePiece.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Types of pieces."""
_BPE = 2
"""The type of models that merge pairs of pieces."""
_SPACE = "▁"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\n")
"""A line of another kind of vocabulary whose files have the same name: Llama 3's."""


def to_tokenizer(data: bytes) -> Tokenizer:
    """The pipeline of a model; texts begin with the model's BOS. Raises `ValueError` for other kinds of models."""
    if _TIKTOKEN.match(data):
        raise ValueError("is a vocabulary of tiktoken, not a SentencePiece model")
    fields = [(number, value) for number, value in _fields(data) if isinstance(value, bytes)]
    pieces = [dict(_fields(value)) for number, value in fields if number == 1]
    trainer = dict(_fields(b"".join(value for number, value in fields if number == 2)))
    normalizer = dict(_fields(b"".join(value for number, value in fields if number == 3)))
    if not pieces or trainer.get(3, 1) != _BPE:
        raise ValueError("is no SentencePiece model that merges pairs, as Llama's does")
    words = [piece[1].decode() for piece in pieces]
    ids = {word: number for number, word in enumerate(words)}
    scores = [struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0] for piece in pieces]
    types = [piece.get(3, 1) for piece in pieces]
    unknown = words[types.index(_UNKNOWN)] if _UNKNOWN in types else None
    merges = _merges(ids, scores)
    model = models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bool(trainer.get(35)))
    tokenizer = Tokenizer(model)
    has_prefix = bool(normalizer.get(3, 1))
    tokenizer.normalizer = _normalizer(normalizer, has_prefix)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if has_prefix else [])])
    kinds = list(zip(words, types, strict=True))
    # Those with spaces are found in the normalized text, by their merges.
    symbols = [word for word, kind in kinds if kind == _USER_DEFINED and _SPACE not in word]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in symbols])
    tokenizer.add_special_tokens([word for word, kind in kinds if kind in (_UNKNOWN, _CONTROL)])
    bos = trainer.get(41, 1)
    if isinstance(bos, int) and bos < len(words):  # a negative number is a large one
        template: Any = processors.TemplateProcessing
        begin = words[bos]
        tokenizer.post_processor = template(f"{begin} $A", f"{begin} $A {begin} $B", special_tokens=[(begin, bos)])
    return tokenizer


def _merges(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, those of the highest score first."""
    pairs = [(word[:cut], word[cut:]) for word in ids for cut in range(1, len(word))]
    found = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
    found.sort(key=lambda pair: (-scores[ids["".join(pair)]], ids[pair[0]], ids[pair[1]]))
    return found


def _normalizer(spec: dict[int, Any], has_prefix: bool) -> Any:
    steps: list[Any] = [normalizers.Precompiled(spec[2])] if spec.get(2) else []
    if spec.get(4, 1):  # remove_extra_whitespaces
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if has_prefix else []
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffers message: numbers, or bytes. Raises `ValueError` if it is none."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind, length = key & 7, {1: 8, 5: 4}.get(key & 7, 0)
        if kind == 0:
            number, position = _varint(data, position)
            yield key >> 3, number
            continue
        if kind == 2:
            length, position = _varint(data, position)
        if (not length and kind != 2) or position + length > len(data):
            raise ValueError("is no SentencePiece model, or damaged")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """An integer in 7 bits a byte, the lowest first, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("is no SentencePiece model, or damaged")
