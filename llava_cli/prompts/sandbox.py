"""The sandboxed job for a checkpoint's text: rendering its chat template, and tokenizing.

A template is a program, and a tokenizer's file may contain any regular expression. Templates are rendered only here.
Texts are tokenized twice: here first, within limits, and if that succeeds where the model is; the same work on the same
text takes no more there.

A request is one letter and its data. A reply is `_DONE` and the result, or `_REFUSED` and the reason as UTF-8.
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
from llava_cli.errors import ModelUnusable, os_reason, plain_message
from llava_cli.regular_files import NotRegular, TooLarge, read
from llava_cli.sandbox.process import Worker, WorkerDied, WorkerLate
from llava_cli.untrusted_text import one_line

_RENDER, _LOAD, _COUNT, _ENCODE, _WRITE = b"R", b"L", b"C", b"E", b"W"
_DONE, _REFUSED = b"=", b"!"
PIECE_CHARACTERS = 16_384
"""Texts are tokenized in pieces of this length to find out whether they have too many tokens."""
_PIECE_MARGIN = 64
"""The most tokens by which a cut between pieces may raise the sum over the pieces."""


_ADDED_TOKEN = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
"""What makes an added token."""


class TextRefused(Exception):
    """A template or tokenizer cannot do its work, or not within the limits: the reason in a few words."""


class TextSandbox:
    """A process that renders and tokenizes for one checkpoint; threads take turns."""

    def __init__(self, tokenizer: Path | None) -> None:
        """`tokenizer` is the checkpoint's `tokenizer.json` or `tokenizer.model`; None if it has none, or ours."""
        self._worker = Worker("llava_cli.prompts.sandbox", limits.TEXT_MEMORY)
        self.tokenizer = tokenizer
        self._loaded_in = 0  # the number of the worker's process that has loaded the tokenizer
        self._refusal: TextRefused | None = None
        self._lock = threading.Lock()

    def start_loading(self) -> None:
        """Loads the tokenizer in the background."""

        def load() -> None:
            with suppress(TextRefused):  # which `check_tokenizer` raises again
                self.check_tokenizer()

        if self.tokenizer:
            threading.Thread(target=load, daemon=True).start()

    def render(
        self, template: str, messages: Sequence[Any], add_generation_prompt: bool, special_tokens: dict[str, str]
    ) -> str:
        """The prompt that a chat template makes of messages. Raises `TextRefused`."""
        request = {
            "template": template,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "special_tokens": special_tokens,
        }
        with self._lock:
            text = self._ask(_RENDER, json.dumps(request).encode(), limits.TEMPLATE_SECONDS)
        return text.decode(errors="surrogatepass")

    def check_tokenizer(self) -> None:
        """Loads the tokenizer. Raises `TextRefused` if that fails, or if its file asks for what is never run."""
        with self._lock:
            self._load()

    def count(self, text: str, most: int = 0, special_tokens: bool = True) -> int:
        """The number of tokens in a text; if that is above `most`, and `most` is not 0, any number above it.

        Special tokens are recognized unless `special_tokens` is false. Raises `TextRefused`.
        """
        with self._lock:
            self._load()
            data = bytes([special_tokens]) + most.to_bytes(8, "little") + text.encode(errors="surrogatepass")
            return int.from_bytes(self._ask(_COUNT, data, limits.TOKENIZE_SECONDS), "little")

    def encode(self, text: str, added: Sequence[Any], special_tokens: bool) -> tuple[list[int], dict[str, int]]:
        """The ids of a text by the tokenizer's own file, and those of `added`, tokens that it learns first.

        With `special_tokens` it begins with BOS, if the file says so.

        Raises `TextRefused`.
        """
        flags = [{name: getattr(token, name) for name in _ADDED_TOKEN} for token in added]
        with self._lock:
            self._load()
            request = json.dumps({"text": text, "added": flags, "special_tokens": special_tokens}).encode()
            ids, added_ids = json.loads(self._ask(_ENCODE, request, limits.TOKENIZE_SECONDS))
        return ids, added_ids

    def tokenizer_json(self) -> bytes:
        """The tokenizer as a `tokenizer.json`. Raises `TextRefused`."""
        with self._lock:
            self._load()
            return self._ask(_WRITE, b"", limits.TOKENIZE_SECONDS)

    def end(self) -> None:
        """Kills the process."""
        self._worker.end()

    def _load(self) -> None:
        """Makes sure that the worker's current process has the tokenizer."""
        if self._refusal:
            raise self._refusal
        with _worker_errors():
            self._worker.start()
        if self.tokenizer is None or self._loaded_in == self._worker.starts:
            return
        try:
            self._ask(_LOAD, read(self.tokenizer, limits.TOKENIZER_BYTES), limits.TOKENIZE_SECONDS)
            self._loaded_in = self._worker.starts
        except TextRefused as error:
            self._refusal = error
        except OSError as error:
            self._refusal = TextRefused(
                os_reason(error) if isinstance(error, (NotRegular, TooLarge)) else plain_message(error)
            )
        if self._refusal:
            raise self._refusal

    def _ask(self, letter: bytes, data: bytes, seconds: float) -> bytes:
        with _worker_errors():
            reply = self._worker.ask((letter, data), 1 + 4 * limits.PROMPT_CHARACTERS, seconds)
        if reply[:1] != _DONE:
            raise TextRefused(one_line(reply[1:1000].decode("utf-8", "replace")))
        return bytes(reply[1:])


class CheckedTokenizer:
    """A transformers tokenizer that tokenizes each text in the sandbox first, where time and memory are bounded."""

    def __init__(self, tokenizer: Any, sandbox: TextSandbox) -> None:
        self._tokenizer, self._sandbox = tokenizer, sandbox

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        """Raises `ModelUnusable`."""
        for part in [text] if isinstance(text, str) else text:
            with tokenizer_errors():
                self._sandbox.count(part, special_tokens=not options.get("split_special_tokens"))
        return self._tokenizer(text, **options)


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Translates `TextRefused` to the error that a user sees."""
    try:
        yield
    except TextRefused as error:
        raise ModelUnusable("the checkpoint's tokenizer", str(error), "llava models lists others") from None


@contextmanager
def _worker_errors() -> Iterator[None]:
    """Translates the end of a worker's process to `TextRefused`."""
    try:
        yield
    except WorkerLate as error:
        raise TextRefused(f"takes longer than {error} s") from None
    except WorkerDied as error:
        raise TextRefused(str(error) or "crashes, or takes too much memory") from None


def exceeds(tokenize: Callable[[str], Sequence[int]], text: str, most: int) -> bool:
    """Whether a text certainly has more than `most` tokens: tokenizes pieces of it until that is known.

    A megabyte takes a tokenizer 1.5 s, for which other threads would wait.
    """
    if len(text) <= PIECE_CHARACTERS:
        return False
    count = 0
    for start in range(0, len(text), PIECE_CHARACTERS):
        count += len(tokenize(text[start : start + PIECE_CHARACTERS])) - _PIECE_MARGIN
        if count > most:
            return True
    return False


# Below: inside the sandbox.

_tokenizer: Any = None
_LATE_IMPORTS_OF_JINJA = (
    "encodings.unicode_escape",
    "html",
    "jinja2.constants",
    "jinja2.debug",
    "pprint",
    "textwrap",
)


def prepare() -> None:
    """Imports everything that may be needed: after this no file can be opened."""
    import_module("tokenizers")
    import_module("llava_cli.prompts.sentencepiece_model")
    for name in _LATE_IMPORTS_OF_JINJA:
        import_module(name)
    time.localtime()  # reads the time zone, which templates may ask for
    with suppress(Exception):  # what Jinja sets up at the first literal, date and error
        _compiled("{{ 'a' ~ strftime_now('%d') ~ messages.a.b }}").render(messages=[])


def answer(request: bytes) -> tuple[bytes, ...]:
    """The parts of a reply."""
    handle = {_RENDER: _render, _LOAD: _load, _COUNT: _count, _ENCODE: _encode, _WRITE: _write}[request[:1]]
    try:
        return _DONE, handle(request[1:])
    except MemoryError:
        return _REFUSED, b"takes too much memory"
    except BaseException as error:  # Rust panics are not Exceptions
        return _REFUSED, (str(error) or type(error).__name__).encode(errors="replace")


def _render(data: bytes) -> bytes:
    request = json.loads(data)
    template = _compiled(request["template"])
    options = {"tools": None, "documents": None, "add_generation_prompt": request["add_generation_prompt"]}
    text: str = template.render(messages=request["messages"], **{**options, **request["special_tokens"]})
    if len(text) > limits.PROMPT_CHARACTERS:
        raise ValueError(f"makes a prompt of more than {limits.PROMPT_CHARACTERS:,} characters")
    return text.encode(errors="surrogatepass")


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    """A template in the same environment as in transformers (utils/chat_template_utils.py)."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; here it renders its content."""

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
    is_json = data.lstrip()[:1] == b"{"
    tokenizer = Tokenizer.from_buffer(data) if is_json else _from_sentencepiece(data)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _check_decoder(tokenizer)
    _tokenizer = tokenizer
    return b""


def _from_sentencepiece(data: bytes) -> Any:
    from llava_cli.prompts.sentencepiece_model import to_tokenizer

    return to_tokenizer(data)


def _check_decoder(tokenizer: Any) -> None:
    """Raises `ValueError` for a decoder that may be slow or write much.

    Decoding is not tried in the sandbox first, because any token may come at any time.
    """
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
    most, text = int.from_bytes(data[1:9], "little"), data[9:].decode(errors="surrogatepass")
    _tokenizer.encode_special_tokens = not data[0]

    def tokenize(part: str) -> Sequence[int]:
        return _tokenizer.encode(part, add_special_tokens=False).ids  # type: ignore[no-any-return]

    count = most + 1 if most and exceeds(tokenize, text, most) else len(tokenize(text))
    return count.to_bytes(8, "little")


def _encode(data: bytes) -> bytes:
    from tokenizers import AddedToken

    request = json.loads(data)
    _tokenizer.encode_special_tokens = False
    _tokenizer.add_tokens([AddedToken(**token) for token in request["added"]])
    added = {token["content"]: _tokenizer.token_to_id(token["content"]) for token in request["added"]}
    ids = _tokenizer.encode(request["text"], add_special_tokens=request["special_tokens"]).ids
    return json.dumps([ids, added]).encode()


def _write(data: bytes) -> bytes:
    return _tokenizer.to_str().encode()  # type: ignore[no-any-return]
