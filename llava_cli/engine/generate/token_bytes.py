"""The bytes that each token of a vocabulary adds to a text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llava_cli.errors import ModelUnusable

_PRIVATE_USE = "\U000f0000"
"""From here on there are stand-ins for special tokens (`prompts/special_tokens.py`), which no answer has."""


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes that each token of a transformers tokenizer adds to a text, None for control tokens.

    Raises `ModelUnusable` for a tokenizer that joins its tokens in another way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    to_bytes = _decoder_of(json.loads(backend.decoder.__getstate__()) if backend and backend.decoder else {})
    if not to_bytes:
        reason = "joins tokens in a way for which --schema, --regex and --grammar are not made"
        raise ModelUnusable("the checkpoint's tokenizer", reason, "--choices works with every model")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    tokens: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for word, number in vocabulary.items():
        tokens[number] = to_bytes(word)
    for number, added in tokenizer.added_tokens_decoder.items():
        is_text = not added.special and added.content < _PRIVATE_USE
        tokens[number] = added.content.encode() if is_text else None
    return tokens


def _decoder_of(decoder: Mapping[str, Any]) -> Callable[[str], bytes] | None:
    """token -> bytes, as a decoder of `tokenizers` with this state joins them; None for others."""
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        letters = _byte_level()
        return lambda word: bytes(letters[c] for c in word) if letters.keys() >= set(word) else word.encode()
    replaces = all(step["pattern"] == {"String": "▁"} and step["content"] == " " for step in steps if "pattern" in step)
    if kinds & {"Metaspace", "ByteFallback"} and kinds <= _SENTENCEPIECE_STEPS and replaces:
        return _from_sentencepiece
    return None


_SENTENCEPIECE_STEPS = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _from_sentencepiece(word: str) -> bytes:
    byte = _BYTE.fullmatch(word)
    return bytes([int(byte[1], 16)]) if byte else word.replace("▁", " ").encode(errors="replace")


def _byte_level() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}
