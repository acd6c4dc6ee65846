"""How servers name the form of an answer: what OpenAI's API has no word for, each calls by its own.

https://docs.vllm.ai/en/latest/features/structured_outputs, https://docs.sglang.io/docs/advanced_features and
llama.cpp's `tools/server/README.md`. A server says what it is in the `owned_by` of its models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava_cli.engine.remote.choice_logprobs import TOP_LOGPROBS
from llava_cli.errors import UsageError
from llava_cli.settings import FORM_OPTIONS, OPTIONS, PLAIN_OPTIONS, Sampling

Fields = dict[str, Any]
"""Members of a request."""

_MIN_CHOICE_TOKENS = 16


@dataclass(frozen=True)
class Dialect:
    """One kind of server; a form is None if it has nothing like it."""

    choices: Callable[[Sequence[str]], Fields] | None = None
    """Without it, a plain answer's log-probabilities choose."""
    regex: Callable[[str], Fields] | None = None
    grammar: Callable[[str], Fields] | None = None
    """Takes a grammar in Lark's syntax."""
    is_llava: bool = False
    """Whether it is `llava serve`, which tells more of an answer than its text."""

    def fields(self, sampling: Sampling, server: str) -> Fields:
        """The options of an answer as members of a request.

        Options that nobody has set and that have their default value are left out: newer models accept no other value.
        Raises `UsageError` for what the server, whose name is `server`, has nothing like.
        """
        fields = {
            name: value
            for name in PLAIN_OPTIONS
            if (value := getattr(sampling, name)) not in (None, ())
            and (name not in sampling.unset or value != OPTIONS[name].default)
        }
        if sampling.schema:
            schema = {"name": "answer", "strict": True, "schema": json.loads(sampling.schema)}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        for key in ("regex", "grammar"):
            if value := getattr(sampling, key):
                form: Callable[[str], Fields] | None = getattr(self, key)
                if form is None:
                    raise _unknown(key, server)
                fields |= form(value)
        if self.is_llava:
            return fields | self._llava_fields(sampling)
        if sampling.sight:
            raise _unknown("sight", server)
        if sampling.choices:
            fields |= self._choice_fields(sampling)
        if sampling.confidence:
            fields["logprobs"] = True
        return fields

    def _choice_fields(self, sampling: Sampling) -> Fields:
        longest = max(len(choice.encode()) for choice in sampling.choices)
        return {
            "max_tokens": min(sampling.max_tokens, max(longest + 2, _MIN_CHOICE_TOKENS)),
            "logprobs": True,
            "top_logprobs": TOP_LOGPROBS,
            **(self.choices(sampling.choices) if self.choices else {}),
        }

    def _llava_fields(self, sampling: Sampling) -> Fields:
        keys = [key for key in sampling.names() if key not in (*PLAIN_OPTIONS, *FORM_OPTIONS)]
        asked = {key: value for key in keys if (value := getattr(sampling, key)) != OPTIONS[key].default}
        choices = self.choices(sampling.choices) if self.choices and sampling.choices else {}
        return choices | ({"llava": asked} if asked else {})


def _unknown(key: str, server: str) -> UsageError:
    flag = OPTIONS[key].flag
    return UsageError(flag, f"{server} has nothing like it", f"leave {flag} out, or ask a model that is loaded here")


def _structured_outputs(name: str) -> Callable[[Any], Fields]:
    return lambda value: {"structured_outputs": {name: list(value) if isinstance(value, tuple) else value}}


def _vllm(name: str) -> Callable[[Any], Fields]:
    """Under the new name and the one before 0.12: each version ignores the other one's."""
    new = _structured_outputs(name)
    return lambda value: {**new(value), f"guided_{name}": new(value)["structured_outputs"][name]}


def _alternatives(choices: Sequence[str]) -> Fields:
    """Choices as a regular expression; only what means something else in one is escaped.

    Many models put a space before their first word. Without it they could not say the tokens that they would.
    """
    return {"regex": " ?(" + "|".join(re.sub(r"([\\.^$*+?{}\[\]|()])", r"\\\1", choice) for choice in choices) + ")"}


def _gbnf(choices: Sequence[str]) -> Fields:
    """The same as a grammar of llama.cpp's, whose texts are written as in JSON."""
    texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return {"grammar": f'root ::= " "? ({texts})'}


PLAIN = Dialect()
"""OpenAI's API and nothing else."""
LLAVA = Dialect(
    _structured_outputs("choice"), _structured_outputs("regex"), _structured_outputs("grammar"), is_llava=True
)
DIALECTS = {
    "llava": LLAVA,
    "vllm": Dialect(_vllm("choice"), _vllm("regex"), _vllm("grammar")),
    "sglang": Dialect(_alternatives, lambda regex: {"regex": regex}),
    "llamacpp": Dialect(_gbnf),
}
"""By the `owned_by` of a server's models; every other server's is `PLAIN`."""
