"""Linear layers with random weights, in 16 bits and as bitsandbytes quantizes them."""

from __future__ import annotations

from typing import Any

import torch


def four_bits(
    outputs: int, bias: bool, weight: torch.Tensor | None = None, double: bool = False, **options: Any
) -> Any:
    """A layer of 128 inputs with random weights."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options = {"compress_statistics": double, "quant_type": "nf4"} | options
    layer: Any = Linear4bit(128, outputs, bias=bias, compute_dtype=torch.bfloat16).eval()
    weight = torch.randn(outputs, 128, dtype=torch.bfloat16) if weight is None else weight
    layer.weight = Params4bit(weight, requires_grad=False, module=layer, **options).to("cpu")  # type: ignore[arg-type]
    return layer


def eight_bits(outputs: int, bias: bool, weight: torch.Tensor | None = None) -> Any:
    """A layer of 128 inputs with random weights."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer: Any = Linear8bitLt(128, outputs, bias=bias, has_fp16_weights=False).eval()
    layer.weight = Int8Params(torch.randn(outputs, 128) if weight is None else weight, requires_grad=False).to("cpu")
    return layer


def sixteen_bits(outputs: int, bias: bool) -> Any:
    return torch.nn.Linear(128, outputs, bias, dtype=torch.bfloat16)


class AttentionModule(torch.nn.Module):
    """What transformers hands to an attention function."""

    def __init__(self, causal: bool, groups: int = 1) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = causal, groups
