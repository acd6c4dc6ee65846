"""Chooses tokens as transformers' `generate` does, through its own logits processors.

Where an answer has a form, tokens that may not come next are out before anything else is done: top-k and top-p choose
among the others, and a processor that would leave none of them does not count.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from llava_cli.settings import Sampling

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.generate.constraint import Constraint

GREEDY_TEMPERATURE = 1e-5
"""Temperatures up to this are greedy: logits divided by less may overflow, and only ties would be drawn at random."""

NO_TOKEN = -1
"""What is drawn where the model's logits are no numbers."""
_DEFAULT_TOP_K = 50
"""What transformers sets for every model; a checkpoint with this value has not asked for it."""


class Sampler:
    """Chooses the tokens of one answer to `prompt` [1, tokens].

    The answer has at most `max_tokens` tokens, and one of `end_tokens` ends it. `constraint` says which may come next.
    """

    def __init__(
        self,
        model: Any,
        sampling: Sampling,
        prompt: torch.Tensor,
        max_tokens: int,
        end_tokens: Collection[int],
        constraint: Constraint | None = None,
    ) -> None:
        self._model, self._constraint = model, constraint
        self._prompt, self._max_tokens, self._seed = prompt, max_tokens, sampling.seed
        self._is_sampled = sampling.temperature > GREEDY_TEMPERATURE
        self._processors = _logits_processors(
            model, sampling if self._is_sampled else None, prompt, max_tokens, end_tokens
        )
        self.restart()

    def restart(self) -> None:
        """Forgets the answer so far; with a seed, the same random numbers come again."""
        import torch

        self._length = self._prompt.shape[1]
        if self._processors:
            self._ids = self._prompt.new_empty(1, self._length + self._max_tokens)
            self._ids[:, : self._length] = self._prompt
        self._generator: torch.Generator | None = None
        if self._is_sampled:
            self._generator = torch.Generator(self._prompt.device)
            if self._seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self._seed)

    @property
    def is_argmax(self) -> bool:
        """Whether the next token is that of the largest logit, whatever came before."""
        return self._generator is None and not self._processors and self._constraint is None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [1, vocabulary] -> the next token id, a scalar on their device."""
        import torch

        with torch.inference_mode():
            scores = logits.float()
            if self._constraint:
                scores = self._masked(self._constraint, scores)
            if self._processors:
                scores = self._processed(scores)
            token = scores.argmax() if self._generator is None else _multinomial(scores.softmax(-1), self._generator)[0]
            if self._processors:
                self._ids[0, self._length] = token
                self._length += 1
            return token

    def _masked(self, constraint: Constraint, logits: torch.Tensor) -> torch.Tensor:
        scores = constraint.mask(logits)
        largest_exactly = getattr(self._model, "largest_logits", None)
        return largest_exactly(scores, logits) if largest_exactly else scores

    def _processed(self, scores: torch.Tensor) -> torch.Tensor:
        import torch

        processed: torch.Tensor = self._processors(self._ids[:, : self._length], scores)
        if self._constraint:  # some processors force a token, or forbid all that are left
            processed = processed.masked_fill(scores == -torch.inf, -torch.inf)
            return processed if processed.isfinite().any() else scores
        return processed


def _multinomial(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An index [rows] by its probability [rows, indices]: the one that `torch.multinomial` draws, in the same way.

    That first looks at the probabilities, for which a GPU is waited for twice. Here it is `NO_TOKEN` where they are no
    numbers.
    """
    import torch

    waiting = torch.empty_like(probabilities).exponential_(generator=generator)
    largest, index = (probabilities / waiting).max(-1)
    return index.masked_fill(largest.isnan(), NO_TOKEN)


class ForcedTokens:
    """Chooses given tokens, whatever the logits are."""

    is_argmax = False

    def __init__(self, tokens: Sequence[int]) -> None:
        import torch

        self._tokens = torch.tensor(tokens)
        self.restart()

    def restart(self) -> None:
        self._next = 0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token id, a scalar on the device of the logits."""
        self._tokens = self._tokens.to(logits.device)
        token = self._tokens[self._next]
        self._next += 1
        return token


def _logits_processors(
    model: Any, sampling: Sampling | None, prompt: torch.Tensor, max_tokens: int, end_tokens: Collection[int]
) -> Any:
    """What the checkpoint's generation config asks for and, where tokens are sampled (`sampling`), what the user does.

    `model.generation_config` is only read. The user's temperature replaces the checkpoint's, and so does a top-p that
    the user has set. transformers' own defaults do not count as asked for.
    """
    import torch

    config, length = SimpleNamespace(**vars(model.generation_config)), prompt.shape[1]
    config.do_sample = sampling is not None
    if sampling:
        config.temperature = float(sampling.temperature)
        config.top_p = config.top_p if "top_p" in sampling.unset else sampling.top_p
        config.top_k = None if config.top_k == _DEFAULT_TOP_K else config.top_k
    config.max_length = length + max_tokens
    if config.min_new_tokens is not None:
        config.min_length = length + config.min_new_tokens
    config._eos_token_tensor = torch.tensor(sorted(end_tokens), device=prompt.device) if end_tokens else None
    return model._get_logits_processor(config, length, encoder_input_ids=prompt, device=prompt.device)
