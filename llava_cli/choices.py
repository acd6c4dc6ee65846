"""Answers from a list: what a user gives as one, and how a model may spell each of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from llava_cli import limits, regular_files
from llava_cli.errors import InputMissing, UsageError, os_reason, printable

_EXAMPLE = "--choices sunny,cloudy,rain"
_ENDS = (".", "!", "?")


def spellings(choice: str) -> tuple[str, ...]:
    """The ways in which a model may say a choice: as given, in lower case, capitalized; each with and without a period.

    Each of them once. What ends with an exclamation or question mark gets no period.
    """
    bare = choice.removesuffix(".")
    cases = dict.fromkeys((bare, bare.lower(), bare[:1].upper() + bare[1:], bare[:1].upper() + bare[1:].lower()))
    ends = ("",) if bare.endswith(_ENDS) else ("", ".")
    return tuple(case + end for end in ends for case in cases)


def parse_choices(source: str, value: Any) -> tuple[str, ...]:
    """Choices as a user gives them: several texts, each a choice; or one text, or a file's name.

    A text is as `written_choices` has it, and a file has a choice in each line. Raises `UsageError` or `InputMissing`,
    about `source`, for what is no such thing.
    """
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, (list, tuple)) and len(texts) == 1 and isinstance(texts[0], str):
        lines = _lines_of(source, texts[0])
        value = texts[0] if lines is None else [line for line in lines if line.strip()]
    return written_choices(source, value)


def written_choices(source: str, value: Any) -> tuple[str, ...]:
    """As `parse_choices`, where it is not the user who gives them: never a file's name.

    In one text there is `|` between choices, or a comma where there is no `|`.
    """
    if isinstance(value, str):
        value = value.split("|" if "|" in value else ",")
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise UsageError(source, "not a list of texts", _EXAMPLE)
    if any(text != text.encode("utf-8", "ignore").decode() for text in value):
        raise UsageError(source, "not UTF-8", _EXAMPLE)
    return tuple(text.strip() for text in value)


def _lines_of(source: str, text: str) -> list[str] | None:
    """The lines of the file with this name; None if there is none."""
    try:
        if not os.path.isfile(text):
            return None
        return regular_files.read(text, limits.SETTINGS_BYTES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{source} {printable(text)}", "not UTF-8") from None
    except ValueError:  # no name of a file has a null byte
        return None
    except OSError as error:
        raise InputMissing(f"{source} {printable(text)}", os_reason(error)) from None


def check_choices(source: str, choices: Sequence[str]) -> None:
    """Raises `UsageError` unless there are two choices or more, none of them empty, that a model spells differently."""
    if len(choices) > limits.CHOICES:
        raise UsageError(source, f"{len(choices)} choices; at most {limits.CHOICES} are compared")
    spelled: dict[str, str] = {}
    for choice in choices:
        if not choice.removesuffix("."):
            raise UsageError(source, "one of the choices is empty", _EXAMPLE)
        if len(choice) > limits.CHOICE_CHARACTERS:
            raise UsageError(source, f"a choice has more than {limits.CHOICE_CHARACTERS} characters")
        for spelling in spellings(choice):
            if spelling in spelled:
                first, second = printable(repr(spelled[spelling])), printable(repr(choice))
                reason = f"{first} is there twice" if first == second else f"{first} and {second} may be spelled alike"
                raise UsageError(source, reason, "leave one of them out")
        spelled.update(dict.fromkeys(spellings(choice), choice))
    if len(choices) < 2:
        raise UsageError(source, "there has to be more than one choice", _EXAMPLE)
