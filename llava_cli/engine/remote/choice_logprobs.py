"""How probable choices are, from the log-probabilities that a server tells of an answer's tokens.

A choice counts with the probability of its tokens up to the first that no other choice has in its place. Where the
server keeps to the choices, that is the probability of its way through them; where it does not, it is the probability
that an answer begins so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

TOP_LOGPROBS = 20
"""The most that OpenAI's API gives of a token's alternatives."""
_MAX_SHARED = 0.01
"""The part of the probability that may belong to tokens with which several choices begin."""
_END_TOKEN = re.compile(r"(?:<[^<>]*>)?")
"""The text of a token that ends an answer."""


class TokenLogprobs(NamedTuple):
    """A token of an answer, and those that the model found likeliest in its place, each with its log-probability."""

    text: str
    logprob: float
    top: Mapping[str, float]


def choice_probabilities(spelled: Mapping[str, str], tokens: Sequence[TokenLogprobs]) -> dict[str, float] | None:
    """The probabilities of choices, the likeliest first; `spelled` has the choice of each spelling.

    None if the tokens do not tell them apart.
    """
    weights = dict.fromkeys(spelled.values(), 0.0)
    shared, path, said, is_open = 0.0, 0.0, "", True
    for token in tokens:
        for text, logprob in {**token.top, token.text: token.logprob}.items():
            choices = _fitting(spelled, said, text)
            is_chosen = text == token.text
            if len(choices) == 1:
                weights[choices.pop()] += math.exp(path + logprob)
                is_open = is_open and not is_chosen
            elif is_chosen and not choices:
                is_open = False  # the answer is none of the choices from here on
            elif choices and not is_chosen and (said + text).strip():
                shared += math.exp(path + logprob)
        if not is_open:
            break
        path, said = path + token.logprob, said + token.text
    if is_open:  # it ends before it is clear which choice it is
        shared += math.exp(path)
    total = sum(weights.values())
    if total <= 0 or shared > _MAX_SHARED * (total + shared):
        return None
    return {choice: weight / total for choice, weight in sorted(weights.items(), key=lambda item: -item[1])}


def _fitting(spelled: Mapping[str, str], said: str, text: str) -> set[str]:
    """The choices that an answer may still be which began with `said`, and goes on with `text`."""
    begun, whole = (said + text).strip(), said.strip()
    if whole in spelled and _END_TOKEN.fullmatch(text.strip()):
        return {spelled[whole]}
    return {choice for spelling, choice in spelled.items() if spelling.startswith(begun)}
