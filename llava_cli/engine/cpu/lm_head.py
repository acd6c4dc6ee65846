"""The output head for one token, with fewer bits a weight, and exact where it counts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu import quantized_linear
from llava_cli.engine.cpu.jit import BLOCK
from llava_cli.engine.cpu.quantized_linear import Tiled, in_tiles, layout_of

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.packed_weights import Arranged

_ROWS = 4096
"""Of its weights are quantised at a time: they stand in memory several times on the way."""


class Head:
    """In 4 bits a quarter to read (1B 6.7 -> 1.6 ms), or in 8 where the layers have as many.

    What that finds likeliest is computed once more as it should be; the others are as exact as the layers are.
    """

    LIKELIEST = 64
    LARGE = 1 << 22
    """Weights; of fewer all are read sooner than it is found out which matter."""

    def __init__(self, head: torch.nn.Linear, roughly: Tiled) -> None:
        self._plain, self._weight, self._roughly = head.forward, head.weight.data, roughly

    @classmethod
    def of(cls, head: Any, arranged: Arranged, in_8_bits: bool) -> Head | None:
        """None where the head is of another kind, or there is no product for it."""
        import torch

        if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.numel() < cls.LARGE:
            return None
        if not quantized_linear.suits([head]) or head.in_features % BLOCK:
            return None
        make = partial(in_tiles, [head]) if in_8_bits else partial(_in_4_bits, head.weight.data)
        layout = layout_of(head.out_features, head.in_features, 8 if in_8_bits else 4)
        return cls(head, Tiled(**arranged(f"head-{8 if in_8_bits else 4}", layout, make)))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden size] -> logits [..., vocabulary], those of one token in fp32."""
        import torch

        if x.numel() != x.shape[-1]:
            plain: torch.Tensor = self._plain(x)
            return plain
        logits = self._roughly(x).float()
        likeliest = logits.view(-1).topk(min(self.LIKELIEST, logits.numel())).indices
        logits.view(-1)[likeliest] = torch.mv(self._weight[likeliest].float(), x.view(-1).float())
        return logits


def _in_4_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    layers = []
    for part in torch.split(weight, _ROWS):
        layer: Any = Linear4bit(weight.shape[1], len(part), bias=False, device="meta")
        weights: Any = Params4bit(part, requires_grad=False, quant_type="nf4", compress_statistics=False, module=layer)
        layer.weight = weights.to("cpu")
        layers.append(layer)
    return in_tiles(layers)
