"""Answers of a given form: which tokens may come next, by llguidance, from a JSON schema, a regex or a grammar.

llguidance works on bytes: a token may come if its bytes fit what the grammar has next, so a text is split into tokens
as the model likes. What llguidance would accept without keeping it is replaced or refused here (`_kept`).
"""

from __future__ import annotations

import codecs
import json
import re
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from llava_cli import limits
from llava_cli.errors import ModelUnusable, UsageError
from llava_cli.settings import OPTIONS, Sampling
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    import numpy as np
    import torch
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

_PRIVATE_USE = "\U000f0000"
"""From here on there are stand-ins for special tokens (`prompts/special_tokens.py`), which no answer has."""
_COMPILED = 64
"""Grammars that are kept."""

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One line, with a space where `json.dumps` has one: free white space is what small models lose themselves in."""
_JSON_EXACT = {"lenient": False, "coerce_one_of": False, "json_allowed_escapes": 'nrbtf\\"'}
"""Without \\u each name of an object can be written in one way only, so that none is there twice."""

_DAY = (
    r"([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-"  # 0000 is no year
    r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_LEAP_DAY = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][48]|[13579][26]|[2468]0)00)-02-29"
_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_HOST = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,59}[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]{0,59}[a-zA-Z0-9])?){0,3}"
_MAILBOX = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]{1,15}(\.[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]{1,15}){0,3}"
_NO_PUNYCODE = r"^([^-]|-[^-])*$"
_FORMATS: dict[str, tuple[str, ...]] = {
    "date": (f"^({_DAY}|{_LEAP_DAY})$",),
    "time": (f"^{_CLOCK}$",),
    "date-time": (f"^({_DAY}|{_LEAP_DAY})T{_CLOCK}$",),
    "hostname": (f"^{_HOST}$", _NO_PUNYCODE),
    "email": (f"^{_MAILBOX}@{_HOST}$", r"@([^-]|-[^-])*$"),
}
"""Patterns for what llguidance's own are too generous about: leap days and seconds, lengths, labels like `xn--`."""
_OWN_FORMATS = ("duration", "ipv4", "ipv6", "uuid", "uri")
"""Formats that it keeps."""
_OTHER_FORMATS = (
    *("idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template"),
    *("json-pointer", "relative-json-pointer", "regex"),
)
"""Other formats that JSON Schema defines; of any that it does not, nothing is asked."""
_DATA = ("const", "enum", "default", "examples", "example")
"""Keywords with values of which none is a schema."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords with schemas by name."""
_LARK_TEXTS = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?!/)(?:[^/\\\n]|\\.)+/|(?://|#)[^\n]*')
"""Strings, regexes and comments of a Lark grammar."""


def check(sampling: Sampling) -> None:
    """Raises `UsageError` for a schema, regex or grammar that no answer can have, or that llguidance does not know.

    It needs no model: the grammar is compiled for a vocabulary of bytes.
    """
    if sampling.grammar_option:
        _bytes_alone().constraint(sampling)


class Grammars:
    """The grammars of one tokenizer, whose tokens are these bytes; None is a token that no text has.

    `end_tokens` end an answer. A grammar is compiled once, in 1 ms, and copied for each answer, in 0.01 ms. Threads
    may share it.
    """

    def __init__(self, tokens: Sequence[bytes | None], end_tokens: Collection[int]) -> None:
        from llguidance import LLTokenizer as Tokenizer

        # A model without end tokens never ends by itself: the token behind its last is never chosen.
        ends = sorted(end_tokens) or [len(tokens)]
        texts = [*tokens, *[None] * (ends[-1] + 1 - len(tokens))]
        for end in ends:
            texts[end] = None
        self._vocabulary = _Vocabulary(texts, ends)
        self._tokenizer: LLTokenizer = Tokenizer(self._vocabulary, eos_token=ends)  # type: ignore[arg-type]
        self._compile = lru_cache(_COMPILED)(self._compiled)
        self._lock = threading.Lock()

    def constraint(self, sampling: Sampling) -> Constraint:
        """A new answer's. Raises `UsageError`."""
        option = sampling.grammar_option
        assert option
        with self._lock:
            matcher = self._compile(option.key, getattr(sampling, option.key))
        return Constraint(self, matcher, option.flag, is_json=option.key == "schema")

    def bytes_of(self, token: int) -> bytes:
        return self._vocabulary.tokens[token]

    @cached_property
    def without_space(self) -> dict[int, int]:
        """Of each token that begins with a space the one without it; -1 where it is nothing but a space."""
        tokens = self._vocabulary.tokens
        ids = {text: number for number, text in enumerate(tokens)} | {b"": -1}
        return {i: ids[text[1:]] for i, text in enumerate(tokens) if text[:1] == b" " and text[1:] in ids}

    @cached_property
    def spaced(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same as two arrays."""
        import numpy as np

        return np.array(list(self.without_space), np.int64), np.array(list(self.without_space.values()), np.int64)

    def _compiled(self, key: str, text: str) -> LLMatcher:
        from llguidance import LLMatcher

        flag = OPTIONS[key].flag
        matcher = LLMatcher(self._tokenizer, _LARK[key](flag, text), log_level=0)
        if not (error := matcher.get_error()):
            probe = matcher.deep_copy()
            probe.compute_bitmask()
            error = probe.get_error()
        if error:
            raise UsageError(flag, _reason(error), _HINTS[key])
        return matcher


class Constraint:
    """The form of one answer: which tokens may come next, and the text of those that came.

    A first token may begin with a space that is not the answer's: many models put one before their first word.
    """

    def __init__(self, grammars: Grammars, matcher: LLMatcher, flag: str, is_json: bool) -> None:
        self._grammars, self._new_matcher, self._flag, self._is_json = grammars, matcher, flag, is_json
        self.restart()

    def restart(self) -> None:
        """Forgets the answer so far."""
        self._matcher = self._new_matcher.deep_copy()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._has_begun = False
        self._problem = ""

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [1, vocabulary] -> a copy in which those of tokens that may not come next are -inf."""
        import numpy as np
        import torch

        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._problem = self._matcher.get_error()
        allowed = np.unpackbits(bits, count=logits.shape[-1], bitorder="little")
        if not self._has_begun:
            spaced, bare = (
                ids[: np.searchsorted(self._grammars.spaced[0], len(allowed))] for ids in self._grammars.spaced
            )
            allowed[spaced] |= (bare < 0) | (bits[bare >> 3] >> (bare & 7) & 1).astype(bool)
        if self._problem or not allowed.any():
            self._problem = self._problem or "the model has no token for what has to come next"
            return logits
        may_come = torch.from_numpy(allowed).view(torch.bool).to(logits.device)
        return torch.where(may_come, logits, -torch.inf)

    def append(self, token: int, show: bool = True) -> str:
        """The text of one more token, which is no end token."""
        if self._problem:
            return ""
        if not self._has_begun and not self._matcher.validate_tokens([token]):
            token = self._grammars.without_space[token]
        self._has_begun = True
        if token < 0:
            return ""
        if not self._matcher.consume_token(token):
            self._problem = self._matcher.get_error()
            return ""
        return self._decoder.decode(self._grammars.bytes_of(token))

    def flush(self) -> str:
        """The text that was still held back, of an unfinished character."""
        return self._decoder.decode(b"", final=True)

    @property
    def stopped(self) -> bool:
        """Whether the answer is complete, so that nothing but its end can follow, or cannot go on."""
        return bool(self._problem) or self._matcher.is_stopped()

    def data(self, text: str) -> Any:
        """What a complete answer says, where it is JSON. Raises `UsageError` if it could not go on."""
        if self._problem:
            raise UsageError(
                self._flag, f"the answer cannot go on after {len(text)} characters: {_reason(self._problem)}"
            )
        return _parsed(text) if self._is_json else None


class _Vocabulary:
    """Tokens as `LLTokenizer` takes them. Texts are never tokenized: a checkpoint's tokenizer may be a stranger's."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes | None], end_tokens: Sequence[int]) -> None:
        self.tokens = [token or b"" for token in tokens]
        self.eos_token_id, self.special_token_ids = end_tokens[0], list(end_tokens)

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError  # "no_forcing" in each grammar


@lru_cache(1)
def _bytes_alone() -> Grammars:
    return Grammars([bytes([byte]) for byte in range(256)] + [None], [256])


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes that each token of a transformers tokenizer adds to a text, None for control tokens.

    Raises `ModelUnusable` for a tokenizer that joins its tokens in another way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    to_bytes = _decoder_of(json.loads(backend.decoder.__getstate__()) if backend and backend.decoder else {})
    if not to_bytes:
        reason = "joins tokens in a way for which --schema, --regex and --grammar are not made"
        raise ModelUnusable("the checkpoint's tokenizer", reason, "--choices works with every model")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    tokens: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for word, number in vocabulary.items():
        tokens[number] = to_bytes(word)
    for number, added in tokenizer.added_tokens_decoder.items():
        is_text = not added.special and added.content < _PRIVATE_USE
        tokens[number] = added.content.encode() if is_text else None
    return tokens


def _decoder_of(decoder: Mapping[str, Any]) -> Callable[[str], bytes] | None:
    """token -> bytes, as a decoder of `tokenizers` with this state joins them; None for others."""
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        letters = _byte_level()
        return lambda word: bytes(letters[c] for c in word) if letters.keys() >= set(word) else word.encode()
    replaces = all(step["pattern"] == {"String": "▁"} and step["content"] == " " for step in steps if "pattern" in step)
    if kinds & {"Metaspace", "ByteFallback"} and kinds <= _SENTENCEPIECE_STEPS and replaces:
        return _from_sentencepiece
    return None


_SENTENCEPIECE_STEPS = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _from_sentencepiece(word: str) -> bytes:
    byte = _BYTE.fullmatch(word)
    return bytes([int(byte[1], 16)]) if byte else word.replace("▁", " ").encode(errors="replace")


def _byte_level() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _lark_of_schema(flag: str, text: str) -> str:
    schema = _kept(flag, json.loads(text)) | {"x-guidance": _JSON_STYLE | _JSON_EXACT}
    return f"start: %json {json.dumps(schema, ensure_ascii=False)}\n{_OPTIONS}"


def _lark_of_regex(flag: str, text: str) -> str:
    from llguidance import regex_to_lark

    line = text.replace("\r", "\\r").replace("\n", "\\n")
    return f"start: /{regex_to_lark(line, 'd')}/\n{_OPTIONS}"


def _lark_of_grammar(flag: str, text: str) -> str:
    rest = _LARK_TEXTS.sub("", text)
    if match := re.search(r"<[^>\n]*>?|@\w*|%llguidance", rest):
        reason = f"{one_line(match[0])!r} is no Lark: an answer is text without special tokens"
        raise UsageError(flag, reason, "quote it to mean its text")
    return f"{text}\n{_OPTIONS}"


_OPTIONS = '%llguidance {"no_forcing": true}\n'
"""Also where only one text can follow, the model chooses the tokens of which it is made."""
_LARK: dict[str, Callable[[str, str], str]] = {
    "schema": _lark_of_schema,
    "regex": _lark_of_regex,
    "grammar": _lark_of_grammar,
}
_HINTS = {
    "schema": "docs/guide/structured.md lists what a schema may have",
    "regex": "the syntax is that of Rust's regex: no look-around, no back-references",
    "grammar": "the syntax is Lark's, as llguidance reads it",
}


def _kept(flag: str, schema: Any) -> Any:
    """A schema of which llguidance keeps everything. Raises `UsageError`."""
    if isinstance(schema, list):
        return [_kept(flag, item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            kept[key] = {name: _kept(flag, one) for name, one in value.items()}
        else:
            kept[key] = value if key in _DATA else _kept(flag, value)
    required, least = schema.get("required"), schema.get("minProperties")
    if isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0):
        raise UsageError(flag, "minProperties can only be kept by names that are required", _HINTS["schema"])
    if isinstance(schema.get("format"), str):
        _keep_format(flag, kept)
    return kept


def _keep_format(flag: str, schema: dict[str, Any]) -> None:
    name = schema["format"]
    if name in _OTHER_FORMATS:
        known = ", ".join(sorted((*_FORMATS, *_OWN_FORMATS)))
        raise UsageError(flag, f"the format {name!r} cannot be kept; those that can are {known}", "give a pattern")
    if name not in _OWN_FORMATS:
        del schema["format"]
        patterns = [{"pattern": pattern} for pattern in _FORMATS.get(name, ())]
        schema["allOf"] = [*schema.get("allOf", []), *patterns]
        if not schema["allOf"]:
            del schema["allOf"]


def _parsed(text: str) -> Any:
    """JSON -> Python. A number beyond a double's range is the nearest one that JSON can be written with."""

    def real(digits: str) -> float:
        return max(-sys.float_info.max, min(sys.float_info.max, float(digits)))

    def whole(digits: str) -> int:
        return int(digits) if len(digits) <= limits.NUMBER_CHARACTERS else int(real(digits))

    return json.loads(text, parse_float=real, parse_int=whole)


_WORDS = (
    (r"(?s).*?\nerror: ([^\n]+).*", r"\1"),
    (r"(?s).*lookarounds not supported yet.*", r"look-around, such as \\b, is not supported"),
    (r"(?s)NoExtension.*", "no text fits it"),
    (r"(?s)oneOf constraints.*", "oneOf can be kept only where its schemas exclude each other; anyOf takes any"),
    (r"(?s)Resource ('.*') is not present.*", r"\1 is elsewhere, and not fetched"),
    (r"(?s)Unimplemented keys: \[(.*)\].*", r"\1 cannot be kept"),
    (r"(?s)Failed to generate regex for (\w+ range): .*", r"\1 too large"),
    (r"(?s)(?:at )?(\d+)\((\d+)\): (.*)", r"line \1, column \2: \3"),
)
"""Messages of llguidance, as patterns, and what a user reads instead; the first that fits."""


def _reason(error: str) -> str:
    """What is wrong, in one line."""
    words = re.sub(r"^at 1\(\d+\): failed to compile JSON schema: ", "", error.split("<state>")[0].strip())
    for pattern, said in _WORDS:
        if match := re.fullmatch(pattern, words):
            words = match.expand(said)
            break
    return one_line(words[:1].lower() + words[1:])
