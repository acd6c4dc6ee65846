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
        import torch

        if x.numel() != x.shape[-1]:
            exact: torch.Tensor = self._original_forward(x)
            return exact
        logits = self._approximate(x).float()
        largest = logits.view(-1).topk(min(self.EXACT_LOGITS, logits.numel())).indices
        logits.view(-1)[largest] = torch.mv(self._weight[largest].float(), x.view(-1).float())
        return logits
