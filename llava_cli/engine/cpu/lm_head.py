"""The output head for one token: all logits from weights in 8 bits, the largest ones exactly."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu import quantized_linear
from llava_cli.engine.cpu.jit import BLOCK
from llava_cli.engine.cpu.quantized_linear import QuantizedLinear, layout_of, pack_weights

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.packed_weights import PackedWeightStore


class LmHead:
    """A head in 8 bits, half to read of one in bf16; the largest logits are computed again from the original weights.

    In 4 bits it would be a quarter to read, but the many small logits sum up: with a real decoder (SmolLM2-135M) that
    alone raises perplexity by 2.5 %, and by 0.05 % in 8 bits.
    """

    EXACT_LOGITS = 64
    MIN_WEIGHTS = 1 << 22
    """A smaller head is read in full sooner than its largest logits are found."""

    def __init__(self, head: torch.nn.Linear, approximate: QuantizedLinear) -> None:
        self._original_forward, self._weight, self._approximate = head.forward, head.weight.data, approximate
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        """The latest hidden state [hidden_size] in fp32, and the logits that were made of it."""

    @classmethod
    def for_head(cls, head: Any, store: PackedWeightStore) -> LmHead | None:
        """None where the head is of another kind, too small, or this CPU has no kernel for it."""
        import torch

        if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.numel() < cls.MIN_WEIGHTS:
            return None
        if not quantized_linear.suits([head]) or head.in_features % BLOCK:
            return None
        packed = store.load_or_pack("head-8", layout_of([head]), partial(pack_weights, [head]))
        return cls(head, QuantizedLinear(**packed))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> logits [..., vocabulary], in fp32 for one token."""
        if x.numel() != x.shape[-1]:
            exact: torch.Tensor = self._original_forward(x)
            return exact
        logits, hidden_state = self._approximate(x).float(), x.view(-1).float()
        self._last = hidden_state, logits
        self._compute_largest(logits.view(-1), hidden_state)
        return logits

    def largest_logits(self, masked: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Computes the largest of `masked` again as well, a copy of `logits` with others at -inf, both [1, vocabulary].

        Where `logits` are not the latest that this head has approximated, they are left as they are.
        """
        if self._last and self._last[1].data_ptr() == logits.data_ptr():
            self._compute_largest(masked.view(-1), self._last[0])
        return masked

    def _compute_largest(self, logits: torch.Tensor, hidden_state: torch.Tensor) -> None:
        """Replaces the largest of logits [vocabulary] by what the original weights make of it; -inf stays."""
        import torch

        values, largest = logits.topk(min(self.EXACT_LOGITS, logits.numel()))
        exact = torch.mv(self._weight[largest].float(), hidden_state)
        logits[largest] = torch.where(values > -torch.inf, exact, values)
