"""One prompt and its answer in the making."""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from llava_cli.engine.base import Answer, Confidence, FinishReason
from llava_cli.engine.generate.confidence import as_numbers, confidence_in
from llava_cli.engine.generate.detokenizer import Detokenizer
from llava_cli.engine.generate.positions import Positions
from llava_cli.engine.generate.sampler import NO_TOKEN, ForcedTokens, Sampler

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.generate.constraint import Constraint


@dataclass(frozen=True)
class Likelihood:
    """A token's log-probability, and the likeliest tokens in its place with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]

    @classmethod
    def of(cls, token: int, logits: torch.Tensor, count: int) -> Likelihood:
        """logits [vocabulary] -> the likelihood of `token` beside the `count` likeliest."""
        logprobs = logits.float().log_softmax(-1)
        values, ids = logprobs.topk(min(count, len(logprobs)))
        return cls(token, float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))


@dataclass(frozen=True)
class Token:
    """The text that became certain with one more token."""

    text: str
    likelihood: Likelihood | None = None


class Sequence:
    """Request `number`: its prompt, as `inputs` of the model, and the tokens of its answer.

    An answer is complete after one of `end_tokens` or `max_tokens` tokens, or where its detokenizer has stopped: after
    a stop text or, where it has to have a form, when that is complete.
    """

    images: tuple[str, ...] = ()
    """What identifies its pictures; sequences with the same pictures share the reading of them."""
    on_token: Callable[[Token], None] | None = None
    """Called for each token that brings text, or for every token if `top_logprobs` is set."""
    top_logprobs: int | None = None
    positions: Positions
    """Of its tokens; the batch that it joins asks the model for them."""
    constraint: Constraint | None = None
    """The form that the answer has to have, if any; it is the detokenizer, too."""
    chooses: bool = False
    """Whether the answer comes from a list, which is read instead of tokens being added: it is a `ChoiceSequence`."""
    cached_tokens: int = 0
    """How many of the prompt's tokens need not be read, because the prompt cache has them."""
    text_of: Callable[[list[int], int], str] | None = None
    """Makes text of a token of the answer, by its number, for people; None where nobody asks for confidence."""
    records: bool = False
    """Whether it wants the log-probability of each token that it gets; see `record`."""
    replay: Follower | None = None
    """What is to be answered after it, and completes its answer."""
    has_begun: bool = False
    """Whether a batch has taken it; once no more answers are begun, this one is still to be finished."""

    def __init__(
        self,
        number: int,
        inputs: dict[str, torch.Tensor],
        sampler: Sampler | ForcedTokens,
        detokenizer: Detokenizer | Constraint,
        end_tokens: Container[int],
        max_tokens: int,
        begin: float,
    ) -> None:
        self.number, self.inputs = number, inputs
        self.prompt: list[int] = inputs["input_ids"][0].tolist()
        self.max_length = len(self.prompt) + max_tokens
        self.sampler, self._detokenizer, self._end_tokens = sampler, detokenizer, end_tokens
        self._begin = self._first_token = begin
        self._reset()

    def _reset(self) -> None:
        self.ids = list(self.prompt)
        """The prompt's tokens, then the answer's."""
        self._pieces: list[str] = []
        self._log_probabilities: list[torch.Tensor] = []
        self._has_ended = False

    def restart(self) -> None:
        """Starts the answer over."""
        self._reset()
        self.sampler.restart()
        self._detokenizer.restart()

    def append(self, token: int, logits: torch.Tensor) -> None:
        """Adds the next token, which was chosen from `logits` [vocabulary]. Raises `RuntimeError` where it is none."""
        if token == NO_TOKEN:
            raise RuntimeError("its logits are no numbers")
        self.ids.append(token)
        if len(self.ids) == len(self.prompt) + 1:
            self._first_token = time.perf_counter()
        self._has_ended = token in self._end_tokens
        text = "" if self._has_ended else self._detokenizer.append(token, show=self.on_token is not None)
        self._pieces.append(text)
        if self.on_token and (text or self.top_logprobs is not None):
            top = self.top_logprobs
            self.on_token(Token(text, None if top is None else Likelihood.of(token, logits, top)))

    def record(self, log_probability: torch.Tensor) -> None:
        """Keeps the log-probability of the next token, a scalar on the model's device, which nobody waits for here."""
        self._log_probabilities.append(log_probability)

    @property
    def answer_ids(self) -> list[int]:
        """The answer's tokens so far; one that ends it is among them."""
        return self.ids[len(self.prompt) :]

    def log_probabilities(self) -> list[float]:
        """Of the answer's tokens, if it `records`."""
        return as_numbers(self._log_probabilities)

    @property
    def is_complete(self) -> bool:
        return self._has_ended or self._detokenizer.stopped or len(self.ids) >= self.max_length

    def finish(self) -> Answer:
        """The whole answer, after its last token. Raises `UsageError` if the form that it has to have cannot go on."""
        text = self._detokenizer.flush()
        self._pieces.append(text)
        if self.on_token and text:
            self.on_token(Token(text))
        whole = "".join(self._pieces)
        reason: FinishReason = "stop" if self._has_ended or self._detokenizer.stopped else "length"
        return Answer(
            text=whole,
            finish_reason=reason,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached_tokens,
            answer_tokens=len(self.answer_ids),
            first_token_seconds=self._first_token - self._begin,
            total_seconds=time.perf_counter() - self._begin,
            data=self.constraint.data(whole) if self.constraint and reason == "stop" else None,
            confidence=self._confidence(),
        )

    def _confidence(self) -> Confidence | None:
        return confidence_in(self.log_probabilities(), partial(self.text_of, self.answer_ids)) if self.text_of else None


class Follower(Sequence):
    """The same question about other pictures, asked after the first; its answer is the first one with its `sight`."""

    has_begun = True
    first: Answer
    """The answer that it follows."""

    def follow(self, answered: Sequence, answer: Answer) -> None:
        """Takes a complete sequence and its answer; to be called before this one is read."""
        self.first = answer


class Replay(Follower):
    """Says the tokens of the first answer again."""

    records = True

    def __init__(self, number: int, inputs: dict[str, torch.Tensor], detokenizer: Detokenizer) -> None:
        super().__init__(number, inputs, ForcedTokens(()), detokenizer, (), 0, time.perf_counter())

    def follow(self, answered: Sequence, answer: Answer) -> None:
        super().follow(answered, answer)
        self._log_probability = sum(answered.log_probabilities())
        self.sampler = ForcedTokens(answered.answer_ids)
        self.max_length = len(self.prompt) + len(answered.answer_ids)

    def finish(self) -> Answer:
        return replace(self.first, sight=self._log_probability - sum(self.log_probabilities()))
