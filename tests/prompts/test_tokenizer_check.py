"""Tokenizers of many kinds, as transformers builds them, held against their own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.tables import for_each
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from llava_cli.models.registry import Checkpoint
from llava_cli.prompts.sandbox import TextSandbox
from llava_cli.prompts.tokenizer_check import hold_to_file

SPECIAL = ("<unk>", "<s>", "</s>", "<image>")
TEXTS = (" two  spaces  ", "a  12 b", "<image> what</s> USER", "</s>USER", "X\n<image>\n  y", "1<image>2", "É e\u0301")
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
LLAMA, GPT2, BERT = ({"tokenizer_class": f"{name}Tokenizer"} for name in ("Llama", "GPT2", "Bert"))
ANY = {"tokenizer_class": "PreTrainedTokenizerFast"}


def vocabulary(*letters: str) -> dict[str, int]:
    words = (*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters)
    return {word: number for number, word in enumerate(dict.fromkeys(words))}


def sentencepiece(scheme: str | None) -> Tokenizer:
    """Of Llama's kind: a space before a text by its normalizer, or by its way of splitting."""
    made = Tokenizer(models.BPE(vocabulary("▁", "▁▁"), [("▁", "▁")], unk_token="<unk>", byte_fallback=True))
    if scheme:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def byte_level(has_prefix: bool, by_digit: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE(vocabulary(*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ"), [("Ġ", "Ġ")]))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if by_digit else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=has_prefix)])
    made.decoder = decoders.ByteLevel()
    return made


def word_piece() -> Tokenizer:
    letters = [letter for code in range(33, 127) for letter in (chr(code), f"##{chr(code)}")]
    made = Tokenizer(models.WordPiece(vocabulary(*letters), unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram([(word, -1.0) for word in vocabulary("▁", "▁▁")], unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return made


AGREES, IS_REPAIRED = "its ids are those of", "transformers' differs from"
KINDS: dict[str, tuple[Tokenizer, dict[str, Any], str]] = {
    "Llama's, as older releases converted it": (sentencepiece(None), LLAMA | {"legacy": True}, IS_REPAIRED),
    "a space before the first text": (sentencepiece("first"), LLAMA | {"legacy": False}, AGREES),
    "a space before each text": (sentencepiece("always"), LLAMA | {"legacy": True}, AGREES),
    "no space before a text": (sentencepiece("never"), LLAMA, IS_REPAIRED),
    "no special tokens": (sentencepiece("first"), LLAMA | {"split_special_tokens": True}, IS_REPAIRED),
    "digits as words": (byte_level(False, by_digit=True), GPT2, IS_REPAIRED),
    "a space that the config says": (byte_level(True), GPT2 | {"add_prefix_space": True}, AGREES),
    "WordPiece": (word_piece(), ANY, AGREES),
    "WordPiece, cased by its config": (word_piece(), BERT | {"do_lower_case": False}, IS_REPAIRED),
    "unigrams": (unigram(), ANY, AGREES),
}
"""The tokenizer in the file, `tokenizer_config.json`, and what is found."""


@for_each("made, words, found", KINDS.values(), ids=KINDS)
def test_the_ids_are_those_of_the_file(made: Tokenizer, words: dict[str, Any], found: str, tmp_path: Path) -> None:
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**NAMES, **words}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics3"}))  # which has no class of its own
    sandbox = TextSandbox(tmp_path / "tokenizer.json")
    try:
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        tokenizer, origin = hold_to_file(Checkpoint("a model", tmp_path), theirs, "<image>", sandbox)
    finally:
        sandbox.end()
    assert origin.startswith(found)
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [made.encode(text).ids for text in TEXTS]
