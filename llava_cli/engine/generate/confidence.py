"""How probable a model found the tokens of an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llava_cli.engine.base import Confidence

if TYPE_CHECKING:
    import torch

LEAST_LOG_PROBABILITY = -1e4
"""What is less, or no number at all, since a model's numbers overflow; sums of it stay finite."""


def token_log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """logits [rows, vocabulary], tokens [rows] -> the log-probability of each row's token [rows], in fp32.

    With quantized weights, the CPU's output head computes only the largest 64 logits of a lone row exactly, the others
    in 8 bits. With a real decoder (SmolLM2-135M) that changes a log-probability by 0.003 on average and by 0.17 at
    most, less than it changes where logits are rounded to bf16.
    """
    logits, tokens = logits.float(), tokens.clamp(min=0)  # a GPU is lost over `NO_TOKEN`, which is told of next
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def as_numbers(log_probabilities: Sequence[torch.Tensor]) -> list[float]:
    """Scalars on a device as finite numbers."""
    import torch

    return finite(torch.stack(list(log_probabilities)))


def finite(log_probabilities: torch.Tensor) -> list[float]:
    """[n] on a device -> finite numbers."""
    least = LEAST_LOG_PROBABILITY
    return list(log_probabilities.nan_to_num(nan=least, neginf=least).tolist())


def confidence_in(log_probabilities: Sequence[float], text_of: Callable[[int], str]) -> Confidence:
    """Of an answer's tokens, whose texts `text_of` gives by their numbers, counted from 0."""
    lowest = min(range(len(log_probabilities)), key=log_probabilities.__getitem__)
    mean = sum(log_probabilities) / len(log_probabilities)
    return Confidence(math.exp(mean), math.exp(log_probabilities[lowest]), text_of(lowest))
