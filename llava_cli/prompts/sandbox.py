"""The job that does what a checkpoint does with text: render its chat template, and tokenize.

A template is a program, and a tokenizer's file may have any regular expression in it. Rendering is done here alone.
Tokens are made twice: here first, within limits, and if that goes well where the model is; the same work on the same
text takes no more there.

A request is one letter and its data. A reply is `_DONE` and what was asked for, or `_REFUSED` and the reason as UTF-8.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from llava_cli import limits
from llava_cli.errors import ModelUnusable, plainly
from llava_cli.regular_files import NotRegular, TooLarge, read
from llava_cli.sandbox.process import Worker, WorkerDied, WorkerLate
from llava_cli.untrusted_text import one_line

_RENDER, _LOAD, _COUNT = b"R", b"L", b"C"
_DONE, _REFUSED = b"=", b"!"
PIECE = 16_384
"""Characters that are tokenized at a time where it is only to be seen whether they are too many."""
_MARGIN = 64
"""Tokens by which the sum over pieces may exceed those of the whole, for each cut."""


class Refused(Exception):
    """What a checkpoint's text processing cannot do, or not within the limits: the reason, in a few words."""


class TextSandbox:
    """A process that renders and tokenizes for one checkpoint, for any thread; one at a time."""

    def __init__(self, tokenizer: Path | None) -> None:
        """`tokenizer` is its `tokenizer.json`; None where it has none, or one that is ours."""
        self._worker = Worker("llava_cli.prompts.sandbox", limits.TEXT_MEMORY)
        self.tokenizer, self._loaded_in = tokenizer, 0  # which of the worker's processes has it
        self._refusal: Refused | None = None
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Begins to load the tokenizer, in the background."""

        def load() -> None:
            with suppress(Refused):  # which `check_tokenizer` raises
                self.check_tokenizer()

        if self.tokenizer:
            threading.Thread(target=load, daemon=True).start()

    def render(self, template: str, messages: Sequence[Any], asks: bool, special_tokens: dict[str, str]) -> str:
        """The prompt that a chat template makes of messages, with the beginning of an answer if it `asks` for one.

        Raises `Refused`.
        """
        asked = {"template": template, "messages": messages, "asks": asks, "special_tokens": special_tokens}
        with self._lock:
            text = self._ask(_RENDER, json.dumps(asked).encode(), limits.TEMPLATE_SECONDS)
        return text.decode(errors="surrogatepass")

    def check_tokenizer(self) -> None:
        """Loads the tokenizer. Raises `Refused` where that fails, or its file has what is not run."""
        with self._lock:
            self._load()

    def count(self, text: str, most: int = 0) -> int:
        """How many tokens a text is; for one of more than `most` any number above that, unless it is 0.

        Raises `Refused`.
        """
        with self._lock:
            self._load()
            data = most.to_bytes(8, "little") + text.encode(errors="surrogatepass")
            return int.from_bytes(self._ask(_COUNT, data, limits.TOKENIZE_SECONDS), "little")

    def end(self) -> None:
        """Ends the process, whatever it is at."""
        self._worker.end()

    def _load(self) -> None:
        """Sees that the worker's process has the tokenizer."""
        if self._refusal:
            raise self._refusal
        with _refusals():
            self._worker.start()
        if self.tokenizer is None or self._loaded_in == self._worker.starts:
            return
        try:
            self._ask(_LOAD, read(self.tokenizer, limits.TOKENIZER_BYTES), limits.TOKENIZE_SECONDS)
            self._loaded_in = self._worker.starts
        except Refused as error:
            self._refusal = error
        except OSError as error:
            self._refusal = Refused(error.strerror if isinstance(error, (NotRegular, TooLarge)) else plainly(error))
        if self._refusal:
            raise self._refusal

    def _ask(self, letter: bytes, data: bytes, seconds: float) -> bytes:
        with _refusals():
            reply = self._worker.ask((letter, data), 1 + 4 * limits.PROMPT_CHARACTERS, seconds)
        if reply[:1] != _DONE:
            raise Refused(one_line(reply[1:1000].decode("utf-8", "replace")))
        return bytes(reply[1:])


class RehearsedTokenizer:
    """transformers' tokenizer, whose texts are tokenized in the sandbox first, where time and memory are bounded."""

    def __init__(self, inner: Any, sandbox: TextSandbox) -> None:
        self._inner, self._sandbox = inner, sandbox

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        """Raises `ModelUnusable`."""
        for one in [text] if isinstance(text, str) else text:
            with tokenizer_errors():
                self._sandbox.count(one)
        return self._inner(text, **options)


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Makes of `Refused` what a user is told."""
    try:
        yield
    except Refused as error:
        raise ModelUnusable("the checkpoint's tokenizer", str(error), "llava models lists others") from None


@contextmanager
def _refusals() -> Iterator[None]:
    """What becomes of a process, in words."""
    try:
        yield
    except WorkerLate as error:
        raise Refused(f"takes longer than {error} s") from None
    except WorkerDied as error:
        raise Refused(str(error) or "crashes, or takes too much memory") from None


def are_more(tokenize: Callable[[str], Sequence[int]], text: str, most: int) -> bool:
    """Whether a text has more than `most` tokens for certain: in pieces, no more of it than is needed to know.

    A tokenizer takes 1.5 s for a megabyte, and who shares it waits meanwhile.
    """
    if len(text) <= PIECE:
        return False
    count = 0
    for begin in range(0, len(text), PIECE):
        count += len(tokenize(text[begin : begin + PIECE])) - _MARGIN
        if count > most:
            return True
    return False


# Inside the sandbox.

_tokenizer: Any = None


_JINJA_IMPORTS_LATE = ("encodings.unicode_escape", "html", "jinja2.constants", "jinja2.debug", "pprint", "textwrap")


def prepare() -> None:
    """Imports all that will be needed: afterwards no file can be opened."""
    import_module("tokenizers")
    for name in _JINJA_IMPORTS_LATE:
        import_module(name)
    time.localtime()  # reads the time zone, which templates may ask for
    with suppress(Exception):  # what is made at a first literal, date or error
        _compiled("{{ 'a' ~ strftime_now('%d') ~ messages.a.b }}").render(messages=[])


def answer(request: bytes) -> tuple[bytes, ...]:
    """A reply's parts."""
    what = {_RENDER: _render, _LOAD: _load, _COUNT: _count}[request[:1]]
    try:
        return _DONE, what(request[1:])
    except MemoryError:
        return _REFUSED, b"takes too much memory"
    except BaseException as error:  # also what Rust panics with
        return _REFUSED, (str(error) or type(error).__name__).encode(errors="replace")


def _render(data: bytes) -> bytes:
    asked = json.loads(data)
    template = _compiled(asked["template"])
    options = {"tools": None, "documents": None, "add_generation_prompt": asked["asks"], **asked["special_tokens"]}
    text: str = template.render(messages=asked["messages"], **options)
    if len(text) > limits.PROMPT_CHARACTERS:
        raise ValueError(f"makes a prompt of more than {limits.PROMPT_CHARACTERS:,} characters")
    return text.encode(errors="surrogatepass")


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    """A template in the environment that transformers gives it: utils/chat_template_utils.py."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant says, for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Callable[[], str]) -> str:
            return caller()

    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [Generation, loopcontrols]}
    environment = ImmutableSandboxedEnvironment(**options)
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _load(data: bytes) -> bytes:
    global _tokenizer
    from tokenizers import Tokenizer

    _tokenizer = None
    found = Tokenizer.from_buffer(data)
    found.no_truncation()
    found.no_padding()
    _check_decoder(found)
    _tokenizer = found
    return b""


def _check_decoder(tokenizer: Any) -> None:
    """Decoding is not rehearsed: a token may come at any time. So what makes it slow or large is not taken at all."""
    if tokenizer.decoder is not None:
        steps = json.loads(tokenizer.decoder.__getstate__())
        for step in steps.get("decoders", [steps]):
            if "Regex" in (step.get("pattern") or {}):
                raise ValueError("its decoder has a regular expression, which is never run")
            if len(step.get("content") or "") > limits.TOKEN_CHARACTERS:
                raise ValueError(f"its decoder writes more than {limits.TOKEN_CHARACTERS} characters for a token")
    if max(map(len, tokenizer.get_vocab()), default=0) > limits.TOKEN_CHARACTERS:
        raise ValueError(f"it has a token of more than {limits.TOKEN_CHARACTERS} characters")


def _count(data: bytes) -> bytes:
    most, text = int.from_bytes(data[:8], "little"), data[8:].decode(errors="surrogatepass")

    def tokenize(part: str) -> Sequence[int]:
        return _tokenizer.encode(part, add_special_tokens=False).ids  # type: ignore[no-any-return]

    count = most + 1 if most and are_more(tokenize, text, most) else len(tokenize(text))
    return count.to_bytes(8, "little")
