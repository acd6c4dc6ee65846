"""Answers of a given form: which tokens may come next, by llguidance, from a JSON schema, a regex or a grammar.

llguidance works on bytes: a token may come if its bytes fit what the grammar has next, so a text is split into tokens
as the model likes.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llava_cli import limits
from llava_cli.bounded_json import Bounds, Scanner, TooMuch, parse_finite
from llava_cli.engine.generate.kept_schema import SCHEMA_HINT, kept_schema
from llava_cli.errors import UsageError, plain_message
from llava_cli.settings import OPTIONS, Sampling
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    import torch
    from llguidance import LLMatcher, LLTokenizer

COMPILED = 16
"""Grammars that are kept."""

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One line, with a space where `json.dumps` has one: free white space is what small models lose themselves in."""
_JSON_EXACT = {"lenient": False, "coerce_one_of": False, "json_allowed_escapes": 'nrbtf\\"'}
"""Without \\u each name of an object can be written in one way only, so that none is there twice."""

_ANSWER_BOUNDS = Bounds(limits.ROW_BYTES, limits.ANSWER_DEPTH, limits.ROW_ITEMS)

_LARK_TEXTS = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?!/)(?:[^/\\\n]|\\.)+/|(?://|#)[^\n]*|(%json)\s*')
"""Strings, regexes and comments of a Lark grammar, and what is before a JSON schema."""
_START, _INNER = re.compile(r"\bstart\b"), "llava_answer"
"""The first rule of a grammar, and what it is called where another one comes before it."""
_LARK_RULE = re.compile(r"(?<![\w.-])[\w.-]+\s*(?:\[[^\[\]]*\]\s*)?:")
"""From the beginning of a name up to its colon, in linear time: it is tried once for each name and bracket."""


def check(sampling: Sampling) -> None:
    """Raises `UsageError` for a schema, regex or grammar that no answer can have, or that llguidance does not know.

    It needs no model: the grammar is compiled for a vocabulary of bytes.
    """
    if option := sampling.grammar_option:
        check_text(option.key, getattr(sampling, option.key))


def check_text(key: str, text: str) -> None:
    """The same, for the text of the option `key`."""
    _bytes_alone().compiled(key, text)


def fits(sampling: Sampling, text: str) -> bool:
    """Whether a text has the form that its answers must have. Raises as `check` does."""
    return _bytes_alone().constraint(sampling).fits(text.encode(errors="replace"))


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
        self._compile = lru_cache(COMPILED)(self._matchers_of)
        self._lock = threading.Lock()

    def constraint(self, sampling: Sampling) -> Constraint:
        """A new answer's. Raises `UsageError`."""
        option = sampling.grammar_option
        assert option
        matchers = self.compiled(option.key, getattr(sampling, option.key))
        return Constraint(self, *matchers, option.flag, is_json=option.key == "schema")

    def compiled(self, key: str, text: str) -> tuple[LLMatcher, LLMatcher]:
        """The grammar in the text of the option `key`, and behind a space, to be copied for each answer.

        Raises `UsageError`.
        """
        with self._lock:
            return self._compile(key, text)

    def bytes_of(self, token: int) -> bytes:
        return self._vocabulary.tokens[token]

    def _matchers_of(self, key: str, text: str) -> tuple[LLMatcher, LLMatcher]:
        """A grammar as it is, and behind a space."""
        from llguidance import LLMatcher, LLParserLimits

        flag, bounds = OPTIONS[key].flag, LLParserLimits(max_lexer_states=limits.GRAMMAR_STATES, verbose_errors=False)
        try:
            grammars = (_LARK[key](flag, text, "start"), f'start: " " {_INNER}\n{_LARK[key](flag, text, _INNER)}')
        except RecursionError:
            raise UsageError(flag, "nested too deep", HINTS[key]) from None
        matcher, spaced = (LLMatcher(self._tokenizer, grammar, log_level=0, limits=bounds) for grammar in grammars)
        if not (error := matcher.get_error()):
            probe = matcher.deep_copy()
            probe.compute_bitmask()
            error = probe.get_error()
        if error:
            raise UsageError(flag, _reason(error), HINTS[key])
        return matcher, spaced


class Constraint:
    """The form of one answer: which tokens may come next, and the text of those that came.

    A first token may begin with a space that is not the answer's: many models put one before their first word.
    """

    def __init__(self, grammars: Grammars, matcher: LLMatcher, spaced: LLMatcher, flag: str, is_json: bool) -> None:
        self._grammars, self._flag, self._is_json = grammars, flag, is_json
        self._new_matcher, self._new_spaced = matcher, spaced
        self.restart()

    def restart(self) -> None:
        """Forgets the answer so far."""
        self._matcher = self._new_matcher.deep_copy()
        self._spaced: LLMatcher | None = self._new_spaced.deep_copy()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._problem = ""

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [1, vocabulary] -> a copy in which those of tokens that may not come next are -inf."""
        import numpy as np
        import torch

        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._problem = self._matcher.get_error()
        if self._spaced:
            bits = bits | np.frombuffer(self._spaced.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=logits.shape[-1], bitorder="little")
        if self._problem or not allowed.any():
            self._problem = self._problem or "the model has no token for what has to come next"
            return logits
        may_come = torch.from_numpy(allowed).view(torch.bool).to(logits.device)
        return torch.where(may_come, logits, -torch.inf)

    def append(self, token: int, show: bool = True) -> str:
        """The text of one more token, which is no end token."""
        if self._problem:
            return ""
        text = self._grammars.bytes_of(token)
        if self._spaced and not self._matcher.validate_tokens([token]):
            self._matcher, text = self._spaced, text.removeprefix(b" ")
        self._spaced = None
        if not self._matcher.consume_token(token):
            self._problem = self._matcher.get_error()
            return ""
        return self._decoder.decode(text)

    def flush(self) -> str:
        """The text that was still held back, of an unfinished character."""
        return self._decoder.decode(b"", final=True)

    def fits(self, tokens: Sequence[int]) -> bool:
        """Whether these tokens may be all of a whole answer."""
        matcher = self._new_matcher.deep_copy()
        return matcher.try_consume_tokens(list(tokens)) == len(tokens) and matcher.is_accepting()

    @property
    def stopped(self) -> bool:
        """Whether the answer is complete, so that nothing but its end can follow, or cannot go on."""
        return bool(self._problem) or self._matcher.is_stopped()

    def data(self, text: str) -> Any:
        """What a complete answer says, where it is JSON.

        Raises `UsageError` if it could not go on, or is nested deeper than programs read.
        """
        if self._problem:
            raise UsageError(
                self._flag, f"the answer cannot go on after {len(text)} characters: {_reason(self._problem)}"
            )
        if not self._is_json:
            return None
        try:
            Scanner(_ANSWER_BOUNDS).feed(text.encode())
        except TooMuch as error:
            raise UsageError(self._flag, f"the answer is {error}") from None
        return parse_finite(text)


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


def _lark_of_schema(flag: str, text: str, start: str) -> str:
    return f"{start}: {_inline_schema(flag, json.loads(text))}\n{_OPTIONS}"


def _inline_schema(flag: str, schema: dict[str, Any]) -> str:
    kept = kept_schema(flag, schema) | {"x-guidance": _JSON_STYLE | _JSON_EXACT}
    return f"%json {json.dumps(kept, ensure_ascii=False)}"


def _lark_of_regex(flag: str, text: str, start: str) -> str:
    from llguidance import regex_to_lark

    line = text.replace("\r", "\\r").replace("\n", "\\n")
    return f"{start}: /{regex_to_lark(line, 'd')}/\n{_OPTIONS}"


def _lark_of_grammar(flag: str, text: str, start: str) -> str:
    """A grammar whose schemas are kept, and whose first rule has another name.

    Raises `UsageError` for special tokens, and for more rules than are safe.
    """
    parts, rest, place = [], [], 0
    while match := _LARK_TEXTS.search(text, place):
        parts.append(_START.sub(start, text[place : match.start()]))
        rest.append(text[place : match.start()])
        place = match.end()
        if match[1]:
            schema, place = _schema_at(flag, text, place)
            parts.append(_inline_schema(flag, schema))
        else:
            parts.append(match[0])
    outside = " ".join([*rest, text[place:]])
    if token := re.search(r"<[^>\n]*>?", outside):
        reason = f"{one_line(token[0])} is a special token, and an answer is text"
        raise UsageError(flag, reason, "quote it to mean its text")
    if len(_LARK_RULE.findall(outside)) > limits.GRAMMAR_RULES:
        raise UsageError(flag, f"more than {limits.GRAMMAR_RULES} rules and terminals", HINTS["grammar"])
    return "".join([*parts, _START.sub(start, text[place:]), "\n", _OPTIONS])


def _schema_at(flag: str, text: str, place: int) -> tuple[dict[str, Any], int]:
    """The schema that begins in a grammar at this place, and where it ends."""
    try:
        schema, end = json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError) as error:
        raise UsageError(flag, f"what follows %json is not JSON ({plain_message(error)})", HINTS["grammar"]) from None
    if not isinstance(schema, dict):
        raise UsageError(flag, "what follows %json is no JSON schema, which is an object", HINTS["grammar"])
    return schema, end


_OPTIONS = '%llguidance {"no_forcing": true}\n'
"""Also where only one text can follow, the model chooses the tokens of which it is made."""
_LARK: dict[str, Callable[[str, str, str], str]] = {
    "schema": _lark_of_schema,
    "regex": _lark_of_regex,
    "grammar": _lark_of_grammar,
}
HINTS = {
    "schema": SCHEMA_HINT,
    "regex": "the syntax is that of Rust's regex: no look-around, no back-references",
    "grammar": "the syntax is Lark's, as llguidance reads it",
}


_WORDS = (
    (r"(?s).*?\nerror: ([^\n]+).*", r"\1"),
    (r"(?s).*lookarounds not supported yet.*", r"look-around, such as \\b, is not supported"),
    (r"(?s)NoExtension.*", "no text fits it"),
    (r"(?s)Unsatisfiable schema: Regex is empty.*", "no text fits it"),
    (r"(?s)Unsatisfiable schema: (.*)", r"no answer can satisfy it: \1"),
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
