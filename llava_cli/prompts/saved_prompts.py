"""Prompts that a user has saved by name: a TOML file each, with a text that may have fields, and some options.

text = "Describe this picture in one sentence of {lang}."
system = "You are terse."

[parameters]
lang = "English"
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llava_cli import files, limits, regular_files
from llava_cli.errors import OutputError, UsageError, os_reason
from llava_cli.paths import prompts_folder
from llava_cli.settings import FORM_OPTIONS, OPTIONS
from llava_cli.untrusted_text import printable

KEPT_OPTIONS = ("system", "max_tokens", "choices", "otherwise", "at_least", "schema", "regex")
"""The options that a saved prompt may have."""
OF_FORM = (*FORM_OPTIONS, "otherwise", "at_least")
"""Options of which one that is given takes the place of all that are saved."""
_LIST = "llava prompts lists them"
_NAME = re.compile(r"\w[\w-]{0,63}")
_SUFFIX = ".toml"


@dataclass(frozen=True)
class SavedPrompt:
    """A question that has a name."""

    name: str
    text: str
    """A template (see `question_template`)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Values of `KEPT_OPTIONS`, as in the config file."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """What the text's own fields are filled in with unless the user says otherwise."""
    is_builtin: bool = False

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        own = {"name": self.name, "text": self.text, **self.options, "parameters": dict(self.parameters)}
        return own | {"builtin": self.is_builtin}

    def to_toml(self) -> str:
        """The content of its file."""
        import tomlkit

        document = tomlkit.document()
        document["text"] = _toml_text(self.text)
        for key, value in self.options.items():
            document[key] = _toml_text(value) if isinstance(value, str) else value
        if self.parameters:
            document["parameters"] = dict(self.parameters)
        return tomlkit.dumps(document)


_IN_LANGUAGE = "{% if lang %} Write it in this language: {lang}.{% endif %}"
BUILTIN = {
    prompt.name: prompt
    for prompt in (
        SavedPrompt("alt", f"Write alternative text for this picture in one sentence.{_IN_LANGUAGE}", is_builtin=True),
        SavedPrompt("caption", f"Describe this picture in one sentence.{_IN_LANGUAGE}", is_builtin=True),
        SavedPrompt("read", "Write down all text in this picture, line by line, and nothing else.", is_builtin=True),
        SavedPrompt(
            "tags",
            f"List up to {{count or 10}} keywords for this picture, separated by commas.{_IN_LANGUAGE}",
            is_builtin=True,
        ),
    )
}
"""Prompts that every user has; one that is saved under such a name takes its place."""


def all_prompts() -> Iterator[SavedPrompt]:
    """Every prompt, by name. Raises `UsageError` for a damaged file."""
    own = {path.stem for path in prompts_folder().glob(f"*{_SUFFIX}") if _NAME.fullmatch(path.stem)}
    yield from (find(name) for name in sorted(own | BUILTIN.keys()))


def find(name: str) -> SavedPrompt:
    """The prompt with this name. Raises `UsageError` if there is none, or if its file is damaged."""
    path = _path(name)
    try:
        data = regular_files.read(path, limits.SAVED_PROMPT_BYTES)
    except FileNotFoundError:
        if name in BUILTIN:
            return BUILTIN[name]
        raise _unknown(name) from None
    except OSError as error:
        raise UsageError(str(path), os_reason(error), _LIST) from None
    return _parsed(name, path, data)


def save(prompt: SavedPrompt, replace: bool) -> Path:
    """Writes a prompt's file, which is returned. Raises `UsageError` if another is saved and not to be replaced."""
    path, data = _path(prompt.name), prompt.to_toml().encode()
    try:
        if path.exists() and not replace and regular_files.read(path, limits.SAVED_PROMPT_BYTES) != data:
            raise UsageError(prompt.name, "another prompt is saved under that name", "--force replaces it")
        files.make_own_folder(path.parent.parent)
        files.make_own_folder(path.parent)
        files.atomic_write(path, [data])
    except OSError as error:
        raise _failed(path, error) from None
    return path


def delete(name: str) -> None:
    """Deletes a prompt. Raises `UsageError` if there is none that the user has saved."""
    try:
        _path(name).unlink()
    except FileNotFoundError:
        if name in BUILTIN:
            raise UsageError(name, "a built-in prompt", f"llava prompts save {name} TEXT takes its place") from None
        raise _unknown(name) from None
    except OSError as error:
        raise _failed(_path(name), error) from None


def check_name(name: str) -> None:
    """Raises `UsageError` for what cannot be a prompt's name, and a file's on every system."""
    if not _NAME.fullmatch(name):
        reason = "no name for a prompt: up to 64 letters, digits, - and _"
        raise UsageError(printable(name) or "''", reason, 'llava prompts save caption "Describe this picture."')


def _path(name: str) -> Path:
    check_name(name)
    return prompts_folder() / f"{name}{_SUFFIX}"


def _unknown(name: str) -> UsageError:
    own = (path.stem for path in prompts_folder().glob(f"*{_SUFFIX}"))
    close = get_close_matches(name, [*own, *BUILTIN], 1)
    return UsageError(name, "no prompt has that name", f"did you mean {printable(close[0])}?" if close else _LIST)


def _failed(path: Path, error: OSError) -> OutputError:
    return OutputError(printable(str(path)), os_reason(error), "LLAVA_DATA=FOLDER names another place")


def _parsed(name: str, path: Path, data: bytes) -> SavedPrompt:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    def damaged(reason: str) -> UsageError:
        return UsageError(printable(str(path)), printable(reason), "repair or delete that file")

    try:
        values: dict[str, Any] = tomlkit.parse(data).unwrap()
    except (ValueError, TOMLKitError, RecursionError) as error:
        raise damaged(str(error)) from None
    text, parameters = values.pop("text", None), values.pop("parameters", {})
    if not isinstance(text, str) or not text.strip():
        raise damaged("it has no text")
    if not isinstance(parameters, dict) or not all(isinstance(one, (str, int, float)) for one in parameters.values()):
        raise damaged("its parameters are no texts")
    if unknown := sorted(values.keys() - set(KEPT_OPTIONS)):
        raise damaged(f"unknown key {unknown[0]!r}; the keys are: text, parameters, {', '.join(KEPT_OPTIONS)}")
    options = {key: OPTIONS[key].convert(f"{path}: {key}", value) for key, value in values.items()}
    return SavedPrompt(name, text, options, {key: str(value) for key, value in parameters.items()})


def _toml_text(text: str) -> Any:
    """A text over several lines where it has some, so that the file is easy to read and edit."""
    import tomlkit

    return tomlkit.string(text, multiline="\n" in text)
