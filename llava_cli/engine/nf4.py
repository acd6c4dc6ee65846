"""4-bit layers for few tokens: bitsandbytes' own kernel on a CPU, without the Python around it.

That takes 30 to 50 µs a layer and token, 7 ms of a 1B's token: a dispatch through torch to a Python function, which
looks into a tensor to learn the kind of 4 bits. The numbers are the same to the bit.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def kernel_of(layer: Any) -> Kernel | None:
    """A bitsandbytes layer's forward pass by its kernel alone; None where it has another kind of weights."""
    import torch
    from bitsandbytes.cextension import lib

    # The first call arranges the weights for the processor, 14 s at 7B: now, and not in the first answer.
    layer(torch.zeros(1, layer.in_features, dtype=torch.bfloat16))
    state, kernel = layer.weight.quant_state, getattr(lib, "gemv_4bit_inference_cpu_nf4_bf16", None)
    arranged = getattr(state, "packing_format_for_cpu", False) and state.quant_type == "nf4" and not state.nested
    if kernel is None or not arranged or {state.absmax.dtype, layer.compute_dtype} != {torch.bfloat16}:
        return None
    return Kernel(layer, kernel)


class Kernel:
    """A layer's forward pass: x [..., inputs] in bf16 -> [..., outputs]."""

    def __init__(self, layer: Any, kernel: Any) -> None:
        self._layer, self._kernel, self._plain = layer, kernel, layer.forward
        state = layer.weight.quant_state
        self._outputs, self._inputs = state.shape
        # Held here, for the kernel is only told where they are.
        self._weight, self._scales = layer.weight.data, state.absmax
        n, k = c_int64(self._outputs), c_int64(self._inputs)
        self._before = n, k
        self._weights = c_void_p(self._weight.data_ptr()), c_void_p(self._scales.data_ptr())
        self._after = c_int64(state.blocksize), k, n

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        if x.dtype != torch.bfloat16:
            plain: torch.Tensor = self._plain(x)
            return plain
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self._outputs)
        tokens, begin, end = c_int64(x.numel() // self._inputs), c_void_p(x.data_ptr()), c_void_p(out.data_ptr())
        self._kernel(tokens, *self._before, begin, *self._weights, end, *self._after)
        return out if self._layer.bias is None else out + self._layer.bias
