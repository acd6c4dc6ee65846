"""What the user asks for: an argument, else the environment (`LLAVA_MODEL`, …), else the config file, else the default.

Every option is declared once, as a field of the dataclass that needs it. `OPTIONS` collects them; the command line, the
environment, the config file and the documentation are derived from it.
"""

# ruff: noqa: RUF009  (`_option` makes a field)

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from llava_cli import files, limits
from llava_cli.choices import check_choices, parse_choices
from llava_cli.errors import OutputError, UsageError, os_reason
from llava_cli.parts import parse_every, parse_pages, parse_region
from llava_cli.paths import config_file
from llava_cli.schemas import parse_grammar, parse_regex, parse_schema
from llava_cli.untrusted_text import printable

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

Precision = Literal["auto", "fp32", "bf16", "fp16", "8bit", "4bit"]
QUANTIZED = ("8bit", "4bit")
Device = Literal["auto", "cpu", "cuda", "mps"]
Fit = Literal["auto", "pad", "crop"]
Attention = Literal["auto", "sdpa", "flash"]

VARIABLES = {
    "LLAVA_CONFIG": "The config file.",
    "LLAVA_DATA": "The folder of chats, typed history and the list of pulled models.",
    "LLAVA_CACHE": "The folder of quantized copies, kernels, digests and a measurement; it may be deleted at any time.",
    "LLAVA_SOCKET": "The socket of the server that answers this user's own commands.",
    "LLAVA_FAST": "0 turns off our kernels and everything else that only saves time.",
    "LLAVA_DEBUG": "Any value shows tracebacks and the warnings of libraries.",
}
"""The environment variables that are no options, with what each of them sets."""


def is_fast() -> bool:
    """Whether to do what only saves time; `LLAVA_FAST=0` turns all of it off."""
    return os.environ.get("LLAVA_FAST") != "0"


@dataclass(frozen=True)
class Option:
    """One option: what each source of settings calls it, and which values it takes."""

    key: str
    """In the config file and as a Python argument."""
    type: Any
    """Without `None`, which is the default of some."""
    default: Any
    help: str
    short: str = ""
    """The one-letter flag."""
    metavar: str | None = None
    bounds: tuple[float, float] | None = None
    """The smallest and the largest number."""
    is_secret: bool = False
    """Whether it has no flag, since other users see the command lines of a machine."""
    name: str = ""
    """Of the flag, where it is not that of the key."""
    parse: Callable[[str, Any], Any] | None = None
    """Makes the value of what a source has, where its type does not say how; see `convert`."""

    @property
    def variable(self) -> str:
        return f"LLAVA_{self.key.upper()}"

    @property
    def flag(self) -> str:
        return "" if self.is_secret else f"--{self.name or self.key.replace('_', '-')}"

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def convert(self, source: str, value: Any) -> Any:
        """The value in the option's type. Raises `UsageError`, about `source`, if it does not fit."""
        if self.parse:
            return self.parse(source, value)
        if self.choices:
            return _choice(source, value, self.choices)
        if self.type is bool:
            return _boolean(source, value)
        if self.type is str:
            return _text(source, value)
        if self.bounds:
            return _number(source, value, self.type, *self.bounds)
        return _texts(source, value)


@dataclass(frozen=True)
class _Options:
    """Fields that have metadata are options; their values are converted and checked."""

    def __post_init__(self) -> None:
        for key in self.names():
            if (value := getattr(self, key)) is not None and value is not OPTIONS[key].default:
                object.__setattr__(self, key, OPTIONS[key].convert(key, value))

    @classmethod
    def names(cls) -> list[str]:
        """The options' keys."""
        return [one.name for one in fields(cls) if one.metadata]


def _option(default: Any, help: str, *, secret: bool = False, **more: Any) -> Any:  # noqa: A002
    """A field of a dataclass that is an option; `more` are fields of `Option`."""
    return field(default=default, repr=not secret, metadata={"help": help, "is_secret": secret, **more})


PLAIN_OPTIONS = ("max_tokens", "temperature", "top_p", "seed", "stop")
"""The options of `Sampling` that every server has, under the same name; the others say what an answer is, or what is
told of it."""
GRAMMAR_OPTIONS = ("schema", "regex", "grammar")
"""Those that say which texts an answer may have."""
FORM_OPTIONS = ("choices", *GRAMMAR_OPTIONS)
"""Those that say what an answer is; it can have one of them."""


@dataclass(frozen=True)
class Sampling(_Options):
    """How an answer's tokens are chosen."""

    max_tokens: int = _option(512, "End the answer here.", metavar="N", bounds=(1, 1_000_000))
    temperature: float = _option(0.0, "0 is greedy and always the same.", metavar="T", bounds=(0, 10))
    top_p: float = _option(1.0, "Sample from this much probability.", metavar="P", bounds=(0.0001, 1))
    seed: int | None = _option(None, "Make sampling repeatable.", metavar="N", bounds=(-(2**63), 2**64 - 1))
    stop: tuple[str, ...] = _option((), "End before this text; repeatable.", metavar="TEXT")
    choices: tuple[str, ...] = _option(
        (), "Answer with one of these; a file has one in each line.", metavar="A,B,C|FILE", parse=parse_choices
    )
    otherwise: str | None = _option(
        None, "With --choices: say this where no choice is probable enough.", metavar="WORD", name="or"
    )
    at_least: float | None = _option(
        None, "With --or: the probability that a choice needs.", metavar="P", bounds=(0, 1)
    )
    schema: str | None = _option(
        None,
        'Answer in JSON: a JSON schema, or fields: "shop, total float, items [name, price float]".',
        metavar="FILE|FIELDS",
        parse=parse_schema,
    )
    regex: str | None = _option(
        None, "Answer with text that matches this regular expression.", metavar="RE", parse=parse_regex
    )
    grammar: str | None = _option(None, "Answer with text of this Lark grammar.", metavar="FILE", parse=parse_grammar)
    confidence: bool = _option(False, "Tell how probable the answer's tokens are.")
    sight: bool = _option(False, "Tell how far the answer depends on the picture: ask with a gray one, too.")
    unset: frozenset[str] = field(default=frozenset(), repr=False, compare=False, kw_only=True)
    """The options that nobody has set: a checkpoint's own defaults count for them."""

    def said(self) -> dict[str, Any]:
        """The options by name; those of an answer's form only where they are set."""
        values = {name: getattr(self, name) for name in self.names()}
        return {
            name: value for name, value in values.items() if name in PLAIN_OPTIONS or value != OPTIONS[name].default
        }

    @property
    def grammar_option(self) -> Option | None:
        """The option that says which texts an answer may have, if one does: schema, regex or grammar."""
        return next((OPTIONS[key] for key in GRAMMAR_OPTIONS if getattr(self, key)), None)

    def __post_init__(self) -> None:
        """Raises `UsageError` for options that exclude or need each other."""
        super().__post_init__()
        forms = [OPTIONS[key].flag for key in FORM_OPTIONS if getattr(self, key)]
        if len(forms) > 1:
            raise UsageError(forms[1], f"{forms[0]} says already what an answer is", "give one of them")
        if self.stop and self.grammar_option:
            flag = OPTIONS["stop"].flag
            raise UsageError(flag, f"{self.grammar_option.flag} says already where an answer ends", f"leave {flag} out")
        if self.choices:
            check_choices(OPTIONS["choices"].flag, self.choices)
        elif self.otherwise is not None or self.at_least is not None:
            flag = OPTIONS["otherwise" if self.otherwise is not None else "at_least"].flag
            raise UsageError(flag, "there are no choices", 'llava ask img.jpg "the weather?" --choices sunny,rain')
        if (self.otherwise is None) != (self.at_least is None):
            hint = "--or WORD --at-least P says WORD where no choice is as probable"
            raise UsageError("--or, --at-least", "one is there without the other", hint)
        if self.otherwise in self.choices:
            raise UsageError(
                OPTIONS["otherwise"].flag, f"{self.otherwise!r} is one of the choices", "take another word"
            )


@dataclass(frozen=True)
class LoadOptions(_Options):
    """Which model to load, and how."""

    model: str | None = _option(None, "The model; `llava models` lists them.", short="-m", metavar="NAME|REPO|FOLDER")
    adapter: str | None = _option(None, "Merge this PEFT adapter (LoRA, DoRA, …) into the model.", metavar="FOLDER")
    precision: Precision = _option("auto", "Number format of the weights; auto suits the device.", short="-p")
    double_quant: bool = _option(False, "With 4bit: quantize the scales too; 0.4 bits a weight less.")
    device: Device = _option("auto", "Where the model runs.")
    attention: Attention = _option("auto", "On a GPU: torch's own or FlashAttention 2; auto is torch's.")
    template: str | None = _option(
        None,
        "Prompt format: the checkpoint's own, that of its training, a named one or a .jinja file. [hub]",
        metavar="hub|native|NAME|FILE",
    )
    fit: Fit = _option("auto", "All of a picture that is not square, or its middle; auto: as in training.")
    visual_tokens: int | None = _option(
        None, "Read only the N most diverse tokens of each picture. [all]", metavar="N", bounds=(1, 1_000_000)
    )


@dataclass(frozen=True)
class PictureOptions(_Options):
    """Which pictures a file with several gives, and what of them is looked at."""

    pages: str | None = _option(
        None, "Which pages of a document, or frames of an animation.", metavar="1-3,5|all", parse=parse_pages
    )
    frames: int | None = _option(
        None, "So many frames of a film or animation, evenly spread.", metavar="N", bounds=(1, 10_000)
    )
    every: float | None = _option(
        None, "A frame of a film or animation each so many seconds.", metavar="5s", parse=parse_every
    )
    dpi: int = _option(150, "How finely pages are drawn.", metavar="N", bounds=(10, 1200))
    region: str | None = _option(
        None, "Look at this part only: left,top,right,bottom.", metavar="60%,0,100%,30%", parse=parse_region
    )

    def said(self) -> dict[str, Any]:
        """The options that are set, by name."""
        values = {name: getattr(self, name) for name in self.names()}
        return {name: value for name, value in values.items() if value != OPTIONS[name].default}

    def __post_init__(self) -> None:
        """Raises `UsageError` for options that exclude each other."""
        super().__post_init__()
        if self.frames and self.every:
            raise UsageError(OPTIONS["every"].flag, "--frames says already which frames", "give one of them")


@dataclass(frozen=True)
class ServerOptions(_Options):
    """Which server answers in the place of a model that is loaded here."""

    server: str | None = _option(None, "Ask this OpenAI-compatible API; the key is in LLAVA_API_KEY.", metavar="URL")
    api_key: str | None = _option(
        None, "The key that is sent to the server, and that `llava serve` asks for over TCP.", secret=True
    )
    escalate_key: str | None = _option(None, "The key that is sent to the server of --escalate.", secret=True)
    concurrency: int = _option(8, "Requests at a time to the --server.", metavar="N", bounds=(1, 1024))


@dataclass(frozen=True)
class Settings(_Options):
    """Everything that outlives one command line."""

    load: LoadOptions = field(default_factory=LoadOptions)
    sampling: Sampling = field(default_factory=Sampling)
    remote: ServerOptions = field(default_factory=ServerOptions)
    pictures: PictureOptions = field(default_factory=PictureOptions)
    system: str | None = _option(None, "Instructions before the conversation.", metavar="TEXT")

    @classmethod
    def resolve(cls, **arguments: Any) -> Settings:
        """Merges the arguments over the environment over the config file; None or an empty list is "not given".

        Raises `UsageError`, naming the flag, variable or key, for a value that does not fit.
        """
        path = config_file()
        in_file = {key: value for key, value in _read_config(path).items() if value != ""}
        in_environment = {key: value for key, option in OPTIONS.items() if (value := os.environ.get(option.variable))}
        given = {key: value for key, value in arguments.items() if value is not None and value != []}
        values = {
            **{key: OPTIONS[key].convert(f"{path}: {key}", value) for key, value in in_file.items()},
            **{key: OPTIONS[key].convert(OPTIONS[key].variable, value) for key, value in in_environment.items()},
            **{key: OPTIONS[key].convert(OPTIONS[key].flag or key, value) for key, value in given.items()},
        }

        def of(group: type[_Options]) -> dict[str, Any]:
            return {name: values[name] for name in group.names() if name in values}

        sampling = Sampling(**of(Sampling), unset=frozenset(Sampling.names()) - values.keys())
        groups = LoadOptions(**of(LoadOptions)), sampling, ServerOptions(**of(ServerOptions))
        return cls(*groups, PictureOptions(**of(PictureOptions)), **of(cls))


def _declared(group: type[_Options]) -> Iterator[Option]:
    types = get_type_hints(group)
    for one in fields(group):
        if one.metadata:
            kinds = get_args(types[one.name]) if get_origin(types[one.name]) is UnionType else (types[one.name],)
            yield Option(one.name, kinds[0], one.default, **one.metadata)


OPTIONS = {
    option.key: option
    for group in (Sampling, LoadOptions, PictureOptions, Settings, ServerOptions)
    for option in _declared(group)
}
"""Every option by its key."""


def set_default_model(name: str) -> None:
    """Writes `model = NAME` to the config file and leaves the rest of it as it is."""
    import tomlkit

    path = config_file()
    if (document := _document(path)) is None:
        document = tomlkit.document()
    document["model"] = name
    try:
        real = files.follow_links(path)  # a link into a folder of config files stays one
        files.make_folder(files.follow_links(real.parent), 0o700)
        files.atomic_write(real, [tomlkit.dumps(document).encode()], files.SECRET)  # there may be a key in it
    except files.IsLink as error:
        raise OutputError(str(path), f"{os_reason(error)}, which is another user's", _OTHER_FILE) from None
    except OSError as error:
        raise OutputError(str(path), os_reason(error), _OTHER_FILE) from None


_OTHER_FILE, _REPAIR = "LLAVA_CONFIG=FILE names another file", "repair or delete that file"


def _read_config(path: Path) -> dict[str, Any]:
    document = _document(path)
    values: dict[str, Any] = document.unwrap() if document is not None else {}
    if unknown := sorted(set(values) - set(OPTIONS)):
        raise UsageError(str(path), f"unknown key {unknown[0]!r}", f"the keys are: {', '.join(OPTIONS)}")
    return values


def _document(path: Path) -> TOMLDocument | None:
    """The config file; None if there is none, or if it would be in a home that this user cannot enter."""
    try:
        with open(path, "rb") as file:
            text = file.read(limits.SETTINGS_BYTES + 1)
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) or _is_out_of_sight(path):
            return None
        hint = _OTHER_FILE if isinstance(error, PermissionError) else _REPAIR
        raise UsageError(str(path), os_reason(error), hint) from None
    if len(text) > limits.SETTINGS_BYTES:
        raise _damaged(path, f"larger than {limits.SETTINGS_BYTES:,} bytes")
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        document = tomlkit.parse(text)
        document.unwrap()  # finds keys that are there twice, which parsing does not
        return document
    except (ValueError, TOMLKitError, RecursionError) as error:
        raise _damaged(path, str(error)) from None


def _is_out_of_sight(path: Path) -> bool:
    """Whether this user cannot even see if there is a config file; one that they have named has to be visible."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP) and not os.environ.get("LLAVA_CONFIG")
    return False


def _damaged(path: Path, reason: str) -> UsageError:
    return UsageError(str(path), printable(reason), _REPAIR)


def _choice(source: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UsageError(source, f"{_shown(value)} is not one of {', '.join(choices)}")
    return str(value)


def _boolean(source: str, value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    known = value if isinstance(value, bool) else words.get(value.lower() if isinstance(value, str) else _shown(value))
    if known is None:
        raise UsageError(source, f"{_shown(value)} is neither true nor false")
    return known


def _text(source: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(source, f"{_shown(value)} is not text")
    return value


def _texts(source: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UsageError(source, f"{_shown(value)} is not text or a list of texts")
    return tuple(texts)


def _number(source: str, value: Any, kind: type[int] | type[float], least: float, most: float) -> float:
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError  # Python would make 1 of them
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(source, f"{_shown(value)} is not {'a whole number' if kind is int else 'a number'}") from None
    if not least <= number <= most:
        raise UsageError(source, f"{_shown(number)} is not between {least} and {most}")
    return number


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return "a number of thousands of digits"
