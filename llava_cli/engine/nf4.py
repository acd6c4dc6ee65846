"""4-bit layers for few tokens: bitsandbytes' own kernel on a CPU, without the Python around it.

That takes 30 to 50 µs a layer and token, 7 ms of a 1B's token: a dispatch through torch to a Python function, which
looks into a tensor to learn the kind of 4 bits. The numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64, c_void_p
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_KERNEL = "gemv_4bit_inference_cpu_nf4_bf16"


def each(layers: list[Any], x: torch.Tensor) -> torch.Tensor:
    """What several layers make of one input, side by side."""
    import torch

    return torch.cat([layer(x) for layer in layers], -1) if len(layers) > 1 else layers[0](x)


def joined_bias(layers: list[Any]) -> torch.Tensor | None:
    """Their biases side by side; None where none has one."""
    import torch

    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([torch.zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers])


def is_arranged(layer: Any) -> bool:
    """Whether bitsandbytes has put a layer's weights in its kernel's order."""
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def in_kernel_order(layers: list[Any]) -> dict[str, torch.Tensor]:
    """What `Kernel` multiplies by: weights [outputs of all layers, inputs / 2] and scales [blocks of a row, outputs].

    Empty where there is no kernel for these layers.
    """
    import torch
    from bitsandbytes.cextension import lib

    if not hasattr(lib, _KERNEL):
        return {}
    for layer in layers:
        # A layer's first call arranges its weights for the processor, 14 s at 7B.
        layer(torch.zeros(1, layer.in_features, dtype=torch.bfloat16))
        state = layer.weight.quant_state
        if not is_arranged(layer) or state.quant_type != "nf4" or state.nested:
            return {}
        if {state.absmax.dtype, layer.compute_dtype} != {torch.bfloat16}:
            return {}
    return {
        "weights": torch.cat([layer.weight.data for layer in layers]),
        "scales": torch.cat([layer.weight.quant_state.absmax for layer in layers], 1),
    }


def in_turn(calls: list[Callable[[], object]]) -> None:
    """One call after the other."""
    for call in calls:
        call()


class Kernel:
    """Products with weights in kernel order: x [..., inputs] -> [..., outputs]."""

    def __init__(self, weights: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        import torch
        from bitsandbytes.cextension import lib

        self._kernel, self._bias = getattr(lib, _KERNEL), None if bias is None else bias.to(torch.bfloat16)
        self._tensors = weights, scales  # held here, for the kernel is only told where they are
        self._outputs, self._inputs = len(weights), 2 * weights.shape[1]
        n, k = c_int64(self._outputs), c_int64(self._inputs)
        self._before = n, k
        self._places = c_void_p(weights.data_ptr()), c_void_p(scales.data_ptr())
        self._after = c_int64(self._inputs // len(scales)), k, n

    def bound(self, x: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
        """Writes to `out` what becomes of `x` at the time that it is called; both in bf16 and in one piece."""
        tokens, begin, end = c_int64(x.numel() // self._inputs), c_void_p(x.data_ptr()), c_void_p(out.data_ptr())
        multiply = partial(self._kernel, tokens, *self._before, begin, *self._places, end, *self._after)
        return multiply if self._bias is None else partial(in_turn, [multiply, partial(out.add_, self._bias)])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        given = x.to(torch.bfloat16).contiguous()
        out = given.new_empty(*x.shape[:-1], self._outputs)
        self.bound(given, out)()
        return out.to(x.dtype)
