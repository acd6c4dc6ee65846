"""The token loop: prefill what is new of the prompt, then one forward pass a token over the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llava_cli.engine.prefix import PrefixCache
from llava_cli.settings import Sampling

if TYPE_CHECKING:
    import torch


def decode(prefix: PrefixCache, inputs: dict[str, torch.Tensor], sampling: Sampling, most: int) -> Iterator[int]:
    """Yields at most `most` token ids; the model's end-of-sequence token is the last where it comes.

    `inputs` is one prompt as its processor makes it: `input_ids` [1, tokens], `pixel_values`, … on
    the model's device. Greedy decoding gives the tokens of transformers' `generate(do_sample=False)`.
    """
    import torch

    choose, ends = Chooser(prefix.model, sampling), end_tokens(prefix.model)
    reader = object()  # this answer, for the prefix to know it by
    ids, logits = inputs["input_ids"], prefix.prefill(inputs, reader)
    for number in range(1, most + 1):
        token = choose(ids, logits)
        yield (last := int(token))
        if last in ends or number == most:
            return
        ids = torch.cat([ids, token.view(1, 1).to(ids.device)], dim=1)
        logits = prefix.step(last, reader)


def end_tokens(model: Any) -> frozenset[int]:
    """The ids that end an answer: the generation config's, else the decoder's own."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])


class Chooser:
    """Picks the next token through transformers' logits processors."""

    def __init__(self, model: Any, sampling: Sampling) -> None:
        import torch
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopPLogitsWarper,
        )

        self._processors = LogitsProcessorList()
        # Some checkpoints ask for a repetition penalty, and `generate` would apply it.
        if (penalty := model.generation_config.repetition_penalty or 1.0) != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        self._random: torch.Generator | None = None
        if sampling.temperature > 0:
            if sampling.temperature != 1.0:
                self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(sampling.top_p))
            self._random = torch.Generator(model.device)
            if sampling.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether it takes the likeliest token, whatever came before."""
        return self._random is None and not self._processors

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """ids [1, tokens so far], logits [1, vocabulary] -> the next token id, a scalar."""
        import torch

        with torch.inference_mode():
            scores: torch.Tensor = self._processors(ids, logits.float())  # type: ignore[arg-type]
            if self._random is None:
                return scores.argmax()
            return torch.multinomial(scores.softmax(-1), 1, generator=self._random)[0, 0]
