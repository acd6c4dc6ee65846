"""Layers with made-up weights, as `patch.accelerate` would have them: for measuring how fast they are here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_cli.engine.cpu import onednn_linear
from llava_cli.engine.cpu.dense_linear import DenseGemv
from llava_cli.engine.cpu.jit.compiler import supported_isas
from llava_cli.engine.cpu.linear_choice import LinearBySize
from llava_cli.engine.cpu.onednn_linear import OneDnnInt8Linear
from llava_cli.engine.cpu.projection import Linear
from llava_cli.engine.cpu.quantized_linear import QuantizedLinear, packed_layout

if TYPE_CHECKING:
    import torch

_BITS = {"8bit": 8, "4bit": 4}


def sample_layer(precision: str, dtype: torch.dtype, out_features: int, in_features: int) -> Linear | None:
    """A linear layer of a precision that computes in `dtype`; None where torch's own or bitsandbytes' is used here."""
    import torch

    if precision not in _BITS:
        layer = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(torch.full((out_features, in_features), 0.01, dtype=dtype), False)
        return DenseGemv.for_layer(layer)
    few: Linear | None = None
    if supported_isas():
        layout = packed_layout(out_features, in_features, _BITS[precision])
        few = QuantizedLinear(**{name: torch.ones(shape, dtype=kind) for name, (kind, shape) in layout.items()})
    if not onednn_linear.is_fastest_here():
        return few
    q_weight = torch.ones(out_features, in_features, dtype=torch.int8).t()
    many = OneDnnInt8Linear(q_weight, torch.ones(out_features))
    return LinearBySize(few, many, lambda: None) if few and precision == "4bit" else many
