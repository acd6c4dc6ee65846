"""The positions of a prompt's tokens and of its answer's, as the model's own `generate` has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Positions:
    """Where the tokens of one sequence stand: the prompt's where its model says, and the answer's one after another.

    Most models count the tokens. Those with M-RoPE (arXiv 2409.12191) give a picture's tokens a frame, a row and a
    column, and what follows stands behind the larger of the picture's sides, so that there are fewer positions than
    tokens.
    """

    prompt: torch.Tensor
    """[tokens], or [axes, tokens] with M-RoPE."""
    delta: int
    """The position of each token of the answer, less its number in the sequence: the same on every axis."""

    @classmethod
    def of(cls, model: Any, inputs: dict[str, torch.Tensor]) -> Positions:
        """Asks a model where the tokens of a prompt stand, in the steps in which its `generate` does."""
        import torch

        ids = inputs["input_ids"]
        options = {"attention_mask": torch.ones_like(ids), **inputs}
        counted = model._prepare_position_ids_for_generation(ids, options)
        found = model.prepare_inputs_for_generation(ids, position_ids=counted, is_first_iteration=True)
        prompt = found["position_ids"][..., 0, :]
        return cls(prompt, int(prompt[..., -1].flatten()[-1]) + 1 - ids.shape[1])

    def between(self, begin: int, end: int) -> torch.Tensor:
        """[tokens] or [axes, tokens]: the positions of the sequence's tokens from `begin` to before `end`."""
        import torch

        length = self.prompt.shape[-1]
        answer = torch.arange(max(begin, length), max(end, length), device=self.prompt.device) + self.delta
        return torch.cat([self.prompt[..., begin:end], answer.expand(*self.prompt.shape[:-1], -1)], dim=-1)
