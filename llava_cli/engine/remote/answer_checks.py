"""Whether a server's answer has the form that was asked for: servers ignore what they do not know."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from llava_cli import bounded_json, limits
from llava_cli.choices import spellings
from llava_cli.engine.base import Answer, Confidence
from llava_cli.engine.remote.choice_logprobs import TokenLogprobs, choice_probabilities
from llava_cli.engine.remote.dialects import Dialect
from llava_cli.engine.remote.openai_response import MalformedResponse, answer_details, token_logprobs
from llava_cli.engine.remote.schema_check import misfit
from llava_cli.errors import NoAnswer, ServerFailed, UsageError, printable
from llava_cli.settings import Sampling
from llava_cli.untrusted_text import one_line

Fits = Callable[[Sampling, str], bool]
"""Whether a text has the form that answers with these options have."""

_BOUNDS = bounded_json.Bounds(limits.REPLY_BYTES, limits.REPLY_DEPTH, limits.REPLY_ITEMS)


def checked_answer(
    server: str, dialect: Dialect, fits: Fits, sampling: Sampling, answer: Answer, told: Sequence[dict[str, Any]]
) -> Answer:
    """The answer with all that was asked for: as the server has `told`, or from its tokens' log-probabilities.

    `fits` is asked about regular expressions and grammars. Raises `NoAnswer` if it has not the form that was asked for,
    `ServerFailed` if something else is missing, and `MalformedResponse`.
    """
    if dialect.is_llava:
        answer = replace(answer, **{name: value for choice in told for name, value in answer_details(choice).items()})
        _check_told(server, sampling, answer)
    elif sampling.confidence or sampling.choices:
        every = (token for choice in told for token in token_logprobs(choice))
        tokens = list(islice(every, sampling.max_tokens))  # a server may send any number of them
        if sampling.confidence:
            answer = replace(answer, confidence=_confidence(server, tokens))
        if sampling.choices:
            answer = _chosen(server, dialect, sampling, answer, tokens)
    if sampling.grammar_option and answer.finish_reason == "stop" and answer.data is None:
        answer = _formed(server, fits, sampling, answer)
    return answer


def _check_told(server: str, sampling: Sampling, answer: Answer) -> None:
    missing = {
        "--choices": sampling.choices and answer.probabilities is None,
        "--confidence": sampling.confidence and answer.confidence is None,
    }
    for flag, is_missing in missing.items():
        if is_missing:
            raise ServerFailed(server, f"answers as if there were no {flag}", "`pip install -U llava-cli` there")
    if sampling.choices and answer.text not in (*sampling.choices, sampling.otherwise):
        raise _other(server, "is none of the choices", answer.text)
    told = answer.probabilities or {}
    if sampling.choices and not (set(told) == {*sampling.choices} and all(0 <= p <= 1 for p in told.values())):
        raise MalformedResponse("tells probabilities of other choices, or such as there are none")


def _chosen(
    server: str, dialect: Dialect, sampling: Sampling, answer: Answer, tokens: Sequence[TokenLogprobs]
) -> Answer:
    """The likeliest choice, or what is to be said in its place."""
    spelled = {choice: choice for choice in sampling.choices}
    if not dialect.choices:
        spelled = {spelling: choice for choice in sampling.choices for spelling in spellings(choice)}
    probabilities = choice_probabilities(spelled, tokens)
    said = spelled.get(answer.text.strip())
    if said is None and (dialect.choices or probabilities is None):
        raise _other(server, "is none of the choices", answer.text)
    text = said or ""
    if probabilities:
        text = next(iter(probabilities))
        if sampling.at_least is not None and probabilities[text] < sampling.at_least:
            text = sampling.otherwise or ""
    elif sampling.at_least is not None:
        reason = "does not tell how probable the choices are"
        raise ServerFailed(server, reason, "leave --or and --at-least out")
    return replace(answer, text=text, finish_reason="stop", probabilities=probabilities)


def _confidence(server: str, tokens: Sequence[TokenLogprobs]) -> Confidence:
    if not tokens:
        raise ServerFailed(server, "does not tell how probable its tokens are", "leave --confidence out")
    lowest = min(tokens, key=lambda token: token.logprob)
    mean = math.fsum(token.logprob for token in tokens) / len(tokens)
    return Confidence(math.exp(mean), math.exp(lowest.logprob), lowest.text)


def _formed(server: str, fits: Fits, sampling: Sampling, answer: Answer) -> Answer:
    """The answer with what it says, where it is JSON; without white space before it, where that has no place.

    Raises `NoAnswer` if it does not fit.
    """
    text = answer.text.lstrip()
    if sampling.schema:
        return replace(answer, text=text, data=_data(server, sampling.schema, text))
    try:
        fitting = next((one for one in (answer.text, text) if fits(sampling, one)), None)
    except UsageError:  # it cannot be checked here: servers know more kinds of expressions
        return answer
    if fitting is None:
        option = sampling.grammar_option
        raise _other(server, f"does not fit {option and option.flag}", answer.text)
    return replace(answer, text=fitting)


def _data(server: str, schema: str, text: str) -> Any:
    try:
        data = bounded_json.loads(text.encode(), _BOUNDS, bounded_json.parse_finite)
    except ValueError:
        raise _other(server, "is not JSON, though it was asked for", text) from None
    if place := misfit(json.loads(schema), data):
        raise _other(server, f"does not fit --schema{'' if place == '.' else f' at {one_line(place)}'}", text)
    return data


def _other(server: str, words: str, text: str) -> NoAnswer:
    return NoAnswer(server, f"its answer {words}: {printable(one_line(text))[:100]}")
