"""Tokens to text: whole characters only, the same text as decoding all at once."""

from __future__ import annotations

from random import Random

import pytest
from helpers.families import tokenizer
from transformers import AutoTokenizer

from llava_cli.engine.generate.detokenizer import Detokenizer
from llava_cli.models.registry import builtin_folder

WORDS = tokenizer()
BUILTIN = AutoTokenizer.from_pretrained(builtin_folder())


@pytest.mark.parametrize("words", [WORDS, BUILTIN], ids=["bytes", "bpe"])
@pytest.mark.parametrize("seed", range(5))
def test_pieces_join_to_the_whole(words: object, seed: int) -> None:
    rng = Random(seed)
    text = "".join(rng.choice(["a", " ", "  ", "\n", "é", "漢字", "🙂", "word ", ". ", "</s>"]) for _ in range(150))
    ids = words.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
    stream = Detokenizer(words)
    pieces = [stream.append(i) for i in ids]
    pieces.append(stream.flush())
    assert "".join(pieces) == words.decode(ids, skip_special_tokens=True).strip()  # type: ignore[attr-defined]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(5))
def test_any_tokens_at_all(seed: int) -> None:
    ids = [Random(f"{seed}/{i}").randrange(len(WORDS)) for i in range(200)]
    stream = Detokenizer(WORDS)
    pieces = [stream.append(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == WORDS.decode(ids, skip_special_tokens=True).strip()


def test_character_of_several_tokens_comes_whole() -> None:
    stream = Detokenizer(WORDS)
    assert [stream.append(i) for i in WORDS.encode("é🙂", add_special_tokens=False)] == ["", "é", "", "", "", "🙂"]


def test_spaces_around_the_answer_are_not_in_it() -> None:
    stream = Detokenizer(WORDS)
    pieces = [stream.append(i) for i in WORDS.encode(" \n a b \n", add_special_tokens=False)]
    assert [*pieces, stream.flush()] == ["", "", "", "a", "", " b", "", "", ""]


@pytest.mark.parametrize(
    "said, stop, kept",
    [
        ("one two three", ["two"], "one"),
        ("one two three", ["three", "two"], "one"),
        ("one twin", ["two"], "one twin"),
        ("one tw", ["two"], "one tw"),
        ("aaab", ["aab"], "a"),
        ("é\nUSER: more", ["\nUSER:"], "é"),
        ("stop", ["stop"], ""),
    ],
)
def test_stop_texts(said: str, stop: list[str], kept: str) -> None:
    stream = Detokenizer(WORDS, stop)
    text = ""
    for token in WORDS.encode(said, add_special_tokens=False):
        text += stream.append(token)
        assert kept.startswith(text)
        if stream.stopped:
            break
    assert text + stream.flush() == kept
    assert stream.stopped == (said != kept)
