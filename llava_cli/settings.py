"""What the user wants: flag, else environment (`LLAVA_MODEL`, …), else config file, else default.

The fields of `Settings` are the one list of options: their names are the config file's keys and,
behind `LLAVA_` in capitals, the environment's variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llava_cli.errors import OutputError, UsageError

Precision = Literal["auto", "fp32", "bf16", "fp16", "8bit", "4bit"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Fit = Literal["auto", "pad", "crop"]


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
    """The answer ends before the first of these texts."""


@dataclass(frozen=True)
class Settings:
    """Every option that outlives one command line."""

    model: str | None = None
    """An alias, a Hub repo or a folder; None for the default model."""
    precision: Precision = "auto"
    device: Device = "auto"
    template: str | None = None
    """A named template or a .jinja file; None for the checkpoint's own."""
    fit: Fit = "auto"
    system: str | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges = {"max_tokens": (1, 1_000_000), "temperature": (0, 10), "top_p": (0.0001, 1)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise UsageError(name.replace("_", "-"), f"{value} is not between {least} and {most}")
        for name in ("precision", "device", "fit"):
            _choice(name, getattr(self, name), get_args(_TYPES[name]))

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{f.name: getattr(self, f.name) for f in fields(Sampling)})

    @classmethod
    def resolve(cls, **flags: Any) -> Settings:
        """Merges flags (None or an empty list is "not given") over the environment over the config file.

        Raises `UsageError`, naming the flag, variable or key, for a value that does not fit.
        """
        values = {
            **_read("config file", config_file(), _read_config()),
            **_read("environment", "LLAVA_{}", os.environ),
            **{k: v for k, v in flags.items() if v is not None and v != []},
        }
        values["stop"] = tuple(values.get("stop", ()))
        return cls(**values)


_TYPES: dict[str, Any] = get_type_hints(Settings)


def config_file() -> Path:
    """Where `llava models default` writes and everybody may edit: `LLAVA_CONFIG` or the user's config folder."""
    if named := os.environ.get("LLAVA_CONFIG"):
        return Path(named)
    from platformdirs import user_config_path

    return user_config_path("llava") / "config.toml"


def set_default_model(name: str) -> None:
    """Writes `model = NAME` to the config file and leaves the rest of it as it is."""
    import tomlkit

    path = config_file()
    document = tomlkit.parse(path.read_text("utf-8")) if path.exists() else tomlkit.document()
    document["model"] = name
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(tomlkit.dumps(document), "utf-8")
        new.replace(path)
    except OSError as error:
        raise OutputError(str(path), error.strerror or str(error)) from None


def _read_config() -> dict[str, Any]:
    path = config_file()
    if not path.exists():
        return {}
    import tomlkit

    try:
        values = tomlkit.parse(path.read_text("utf-8")).unwrap()
    except (OSError, ValueError) as error:
        raise UsageError(str(path), str(error), "mend or delete that file") from None
    if unknown := sorted(set(values) - set(_TYPES)):
        raise UsageError(str(path), f"unknown key {unknown[0]!r}", f"the keys are: {', '.join(_TYPES)}")
    return values


def _read(source: str, where: Path | str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among `values`, each turned into its field's type."""
    found = {}
    for name, kind in _TYPES.items():
        key = name if isinstance(where, Path) else where.format(name.upper())
        if key in values and values[key] != "":
            thing = f"{where}: {name}" if isinstance(where, Path) else key
            found[name] = _convert(thing, values[key], kind)
    return found


def _convert(thing: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return _choice(thing, value, get_args(kind))
    if kind == tuple[str, ...]:
        return (value,) if isinstance(value, str) else tuple(map(str, value))
    wanted = next(t for t in (get_args(kind) or (kind,)) if t is not type(None))
    try:
        return wanted(value)
    except (TypeError, ValueError):
        raise UsageError(thing, f"{value!r} is not {'a whole number' if wanted is int else 'a number'}") from None


def _choice(thing: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise UsageError(thing, f"{value!r} is not one of {', '.join(choices)}")
    return value
