"""Errors of other libraries in our words: one line, whatever was raised."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from helpers.tables import for_each
from tokenizers import Tokenizer, decoders, models

from llava_cli import limits
from llava_cli.errors import LlavaError, ModelUnusable, OutOfMemory, message_line, model_errors, plain_message


def a_decoder_that_strips_more_than_there_is() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.Strip("a", 5, 5)
    tokenizer.decode([0])


def a_normalizer_that_cannot_be_read() -> None:
    whole = json.loads(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str())
    Tokenizer.from_str(json.dumps({**whole, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}))


@pytest.mark.parametrize("panic", [a_decoder_that_strips_more_than_there_is, a_normalizer_that_cannot_be_read])
def test_a_panic_in_rust_is_one_line(panic: Callable[[], None]) -> None:
    """It is no `Exception`: uncaught, it would end a server."""
    with (
        pytest.raises(ModelUnusable, match=r"^its: cannot be used \(.+\)$") as raised,
        model_errors("its", "cannot be used", "hint"),
    ):
        panic()
    assert str(raised.value).isprintable()
    assert raised.value.hint == "hint"


class Died(BaseException):
    """Neither an error nor a panic."""


@for_each("ends", [KeyboardInterrupt, SystemExit, GeneratorExit, Died])
def test_what_ends_the_process_passes(ends: type[BaseException]) -> None:
    with pytest.raises(ends), model_errors("its", "cannot be used"):
        raise ends


@for_each(
    ("error", "kind"),
    [
        (RuntimeError("shape\n\x1b[2J"), ModelUnusable),
        (MemoryError(), OutOfMemory),
        (RuntimeError("CUDA out of memory"), OutOfMemory),
        (OutOfMemory("its", "said before"), OutOfMemory),
    ],
)
def test_what_a_library_raises_over_a_model(error: Exception, kind: type[LlavaError]) -> None:
    with pytest.raises(kind) as raised, model_errors("its", "cannot be used"):
        raise error
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("words", [message_line, plain_message])
def test_words_of_others_are_few(words: Callable[[BaseException], str]) -> None:
    assert len(words(ValueError("[" * 10**6))) == limits.NAME_CHARACTERS
    assert words(ValueError("\n \x1b]0;x\x07 y\nz")) == "\\x1b]0;x\\x07 y"
    assert words(ValueError("")).lower() == "valueerror"


def test_plainly() -> None:
    assert plain_message(OSError(2, "No such file")) == "no such file"
    assert plain_message(OSError("[SSL: WRONG_VERSION_NUMBER] Wrong version number")) == "wrong version number"
