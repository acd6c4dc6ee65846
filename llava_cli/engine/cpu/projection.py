"""Linear layers that share an input (queries, keys and values; gate and up), computed into buffers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.dense_linear import DenseGemv
from llava_cli.engine.cpu.jit import MAX_DECODE_ROWS, Launch
from llava_cli.engine.cpu.quantized_linear import Workspace, copy_result

if TYPE_CHECKING:
    import torch

Linear = Callable[["torch.Tensor"], "torch.Tensor"]
"""[..., in_features] -> [..., out_features]"""
FuseLinear = Callable[[list[Any]], "Linear | None"]
"""Layers that share an input -> one function for their outputs side by side; None where they are better off alone."""


class Projection:
    """Layers that share an input: one fused function, or each by itself."""

    def __init__(self, layers: list[Any], fuse: FuseLinear) -> None:
        self.out_features: list[int] = [layer.out_features for layer in layers]
        self.fused_linear = fuse(layers)
        self._layers = layers
        self._small_batch_impls = [None if self.fused_linear else DenseGemv.for_layer(layer) for layer in layers]

    def bind(self, x: torch.Tensor, out: torch.Tensor, workspace: Workspace) -> list[Launch]:
        """What computes x [rows, tokens, in_features] -> out [rows, tokens, all out_features]; both contiguous."""
        import torch

        if linear := self.fused_linear:
            return linear.bind(x, out, workspace) if hasattr(linear, "bind") else [partial(copy_result, linear, x, out)]
        parts = torch.split(out.flatten(0, 1), self.out_features, -1)
        layers = zip(self._layers, self._small_batch_impls, parts, strict=True)
        return [_bind_layer(layer, small_batch_impl, x.flatten(0, 1), part) for layer, small_batch_impl, part in layers]


def _bind_layer(layer: Any, small_batch_impl: DenseGemv | None, x: torch.Tensor, out: torch.Tensor) -> Launch:
    """x [tokens, in_features] -> out [tokens, out_features], which may have a stride."""
    import torch

    dense = type(layer) is torch.nn.Linear and layer.weight.dtype == x.dtype
    if dense and small_batch_impl and len(x) <= MAX_DECODE_ROWS:
        return small_batch_impl.bind(x, out)
    if not dense or not (x.dtype == torch.float32 or out.is_contiguous()):  # with strides torch is slow in bf16
        return partial(copy_result, layer, x, out)
    weight = layer.weight.data.t()
    if layer.bias is None:
        return partial(torch.mm, x, weight, out=out)
    return partial(torch.addmm, layer.bias.data, x, weight, out=out)
