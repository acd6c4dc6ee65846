"""The output head for one token: all logits from weights with fewer bits, the largest ones exactly."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu import quantized_linear
from llava_cli.engine.cpu.jit import BLOCK
from llava_cli.engine.cpu.quantized_linear import QuantizedLinear, pack_weights, packed_layout

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.packed_weights import PackedWeightStore

_ROWS_AT_ONCE = 4096
"""Rows that are quantized at a time: several copies of them are in memory on the way."""


class LmHead:
    """A head in 4 bits, a quarter to read (1B: 1.6 ms instead of 6.7), or in 8 where the layers have as many.

    The largest logits are computed again from the checkpoint's weights; the others are as exact as the layers are.
    """

    EXACT_LOGITS = 64
    MIN_WEIGHTS = 1 << 22
    """A smaller head is read in full sooner than its largest logits are found."""

    def __init__(self, head: torch.nn.Linear, approximate: QuantizedLinear) -> None:
        self._original_forward, self._weight, self._approximate = head.forward, head.weight.data, approximate

    @classmethod
    def for_head(cls, head: Any, store: PackedWeightStore, in_8_bits: bool) -> LmHead | None:
        """None where the head is of another kind, too small, or this CPU has no kernel for it."""
        import torch

        if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.numel() < cls.MIN_WEIGHTS:
            return None
        if not quantized_linear.suits([head]) or head.in_features % BLOCK:
            return None
        bits = 8 if in_8_bits else 4
        pack = partial(pack_weights, [head]) if in_8_bits else partial(_pack_in_4_bits, head.weight.data)
        layout = packed_layout(head.out_features, head.in_features, bits)
        return cls(head, QuantizedLinear(**store.load_or_pack(f"head-{bits}", layout, pack)))

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


def _pack_in_4_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    layers = []
    for rows in torch.split(weight, _ROWS_AT_ONCE):
        layer: Any = Linear4bit(weight.shape[1], len(rows), bias=False, device="meta")
        params: Any = Params4bit(rows, requires_grad=False, quant_type="nf4", compress_statistics=False, module=layer)
        layer.weight = params.to("cpu")
        layers.append(layer)
    return pack_weights(layers)
