"""What the user wants: flag, else environment (`LLAVA_MODEL`, …), else config file, else default.

The fields of `Settings` are the one list of options: their names are the config file's keys and,
behind `LLAVA_` in capitals, the environment's variables.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from llava_cli import files, limits
from llava_cli.errors import OutputError, UsageError
from llava_cli.paths import user_folder
from llava_cli.untrusted_text import printable

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

Precision = Literal["auto", "fp32", "bf16", "fp16", "8bit", "4bit"]
QUANTISED = ("8bit", "4bit")
Device = Literal["auto", "cpu", "cuda", "mps"]
Fit = Literal["auto", "pad", "crop"]
_ANOTHER, _MEND = "LLAVA_CONFIG=FILE names another file", "mend or delete that file"


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen."""

    max_tokens: int = 512
    """The answer ends here at the latest."""
    temperature: float = 0.0
    """0 is greedy: always the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    seed: int | None = None
    """Makes sampling repeatable."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts; one alone may be given as it is."""
    unset: frozenset[str] = field(default=frozenset(), repr=False, compare=False, kw_only=True)
    """Names of the options that nobody has set. No option itself."""

    def __post_init__(self) -> None:
        for name in self.names():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _convert(name, name, value))

    @classmethod
    def names(cls) -> list[str]:
        """The options."""
        return [one.name for one in fields(cls) if one.name != "unset"]


@dataclass(frozen=True)
class Settings(Sampling):
    """Every option that outlives one command line: what to load, and how it answers."""

    model: str | None = None
    """An alias, a Hub repo or a folder; None for the default model."""
    adapter: str | None = None
    """The folder of a PEFT adapter that is merged into the model; None for none."""
    precision: Precision = "auto"
    double_quant: bool = False
    """With 4-bit weights, their scales are quantised too: 0.4 bits a weight less."""
    device: Device = "auto"
    template: str | None = None
    """A named template or a .jinja file; None for the checkpoint's own."""
    fit: Fit = "auto"
    visual_tokens: int | None = None
    """How many tokens the decoder gets of each picture, the most diverse ones; None for all."""
    system: str | None = None
    server: str | None = None
    """The address of an OpenAI-compatible API that answers instead of a model that is loaded here; empty for none."""
    api_key: str | None = field(default=None, repr=False)
    """Goes with each request to `server`; `llava serve` asks it of who comes by TCP. No option: others see those."""
    concurrency: int = 8
    """How many requests of a batch `server` gets at a time."""

    @classmethod
    def resolve(cls, **flags: Any) -> Settings:
        """Merges flags (None or an empty list is "not given") over the environment over the config file.

        Raises `UsageError`, naming the flag, variable or key, for a value that does not fit.
        """
        path = config_file()
        environment = {name: os.environ.get(f"LLAVA_{name.upper()}", "") for name in _TYPES}
        given = {name: value for name, value in flags.items() if value is not None and value != []}
        values = {
            **_read(lambda name: f"{path}: {name}", _read_config(path)),
            **_read(lambda name: f"LLAVA_{name.upper()}", environment),
            **{name: _convert(f"--{name.replace('_', '-')}", name, value) for name, value in given.items()},
        }
        return cls(**values, unset=frozenset(_TYPES) - values.keys())


_TYPES: dict[str, Any] = {name: kind for name, kind in get_type_hints(Settings).items() if name in Settings.names()}
_RANGES = {
    "max_tokens": (1, 1_000_000),
    "temperature": (0, 10),
    "top_p": (0.0001, 1),
    "visual_tokens": (1, 1_000_000),
    "concurrency": (1, 1024),
    "seed": (-(2**63), 2**64 - 1),  # what torch takes
}


def config_file() -> Path:
    """Where `llava models default` writes and everybody may edit: `LLAVA_CONFIG` or the user's config folder."""
    if named := os.environ.get("LLAVA_CONFIG"):
        return Path(named)
    return user_folder("config") / "config.toml"


def set_default_model(name: str) -> None:
    """Writes `model = NAME` to the config file and leaves the rest of it as it is."""
    import tomlkit

    path = config_file()
    if (document := _document(path)) is None:
        document = tomlkit.document()
    document["model"] = name
    try:
        real = files.followed(path)  # a link into a folder of config files stays one
        files.make_folder(files.followed(real.parent), 0o700)
        files.put(real, [tomlkit.dumps(document).encode()], files.SECRET)  # there may be a key in it
    except files.IsLink as error:
        reason = f"{printable(str(error.strerror))}, which is another user's"
        raise OutputError(str(path), reason, _ANOTHER) from None
    except OSError as error:
        raise OutputError(str(path), error.strerror or str(error), _ANOTHER) from None


def _document(path: Path) -> TOMLDocument | None:
    """The config file; None where there is none, or where there may be none, in a home that this user cannot enter."""
    try:
        with open(path, "rb") as file:
            text = file.read(limits.SETTINGS_BYTES + 1)
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) or _is_out_of_sight(path):
            return None
        hint = _ANOTHER if isinstance(error, PermissionError) else _MEND
        raise UsageError(str(path), error.strerror or str(error), hint) from None
    if len(text) > limits.SETTINGS_BYTES:
        raise _damaged(path, f"larger than {limits.SETTINGS_BYTES:,} bytes")
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        document = tomlkit.parse(text)
        document.unwrap()  # some keys that are there twice are found only now
        return document
    except (ValueError, TOMLKitError, RecursionError) as error:
        raise _damaged(path, str(error)) from None


def _is_out_of_sight(path: Path) -> bool:
    """Whether this user cannot even see if there is a config file. One that they have named has to be seen."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP) and not os.environ.get("LLAVA_CONFIG")
    return False


def _damaged(path: Path, reason: str) -> UsageError:
    return UsageError(str(path), printable(reason), _MEND)


def _read_config(path: Path) -> dict[str, Any]:
    document = _document(path)
    values: dict[str, Any] = document.unwrap() if document is not None else {}
    if unknown := sorted(set(values) - set(_TYPES)):
        raise UsageError(str(path), f"unknown key {unknown[0]!r}", f"the keys are: {', '.join(_TYPES)}")
    return values


def _read(thing: Callable[[str], str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, an empty text being none; `thing` is what an error calls them."""
    return {name: _convert(thing(name), name, value) for name, value in values.items() if value != ""}


def _convert(thing: str, name: str, value: Any) -> Any:
    """A value of the field's type, and within its range."""
    kind = _TYPES[name]
    if get_origin(kind) is Literal:
        return _choice(thing, value, get_args(kind))
    if kind is bool:
        return _yes(thing, value)
    if kind == tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise UsageError(thing, f"{_shown(value)} is not text or a list of texts")
        return tuple(texts)
    wanted = next(t for t in (get_args(kind) or (kind,)) if t is not type(None))
    return _text(thing, value) if wanted is str else _number(thing, value, wanted, *_RANGES[name])


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return "a number of thousands of digits"


def _yes(thing: str, value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    known = value if isinstance(value, bool) else words.get(value.lower() if isinstance(value, str) else _shown(value))
    if known is None:
        raise UsageError(thing, f"{_shown(value)} is neither true nor false")
    return known


def _text(thing: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(thing, f"{_shown(value)} is not text")
    return value


def _number(thing: str, value: Any, wanted: type[int] | type[float], least: float, most: float) -> float:
    try:
        if isinstance(value, bool) or (wanted is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError  # Python would make 1 of them
        number = wanted(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(thing, f"{_shown(value)} is not {'a whole number' if wanted is int else 'a number'}") from None
    if not least <= number <= most:
        raise UsageError(thing, f"{_shown(number)} is not between {least} and {most}")
    return number


def _choice(thing: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise UsageError(thing, f"{_shown(value)} is not one of {', '.join(choices)}")
    return value
