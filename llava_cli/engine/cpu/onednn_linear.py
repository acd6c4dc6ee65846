"""Linear layers in 8 bits by oneDNN's integer product, which torch has as `_int_mm`.

    out[t, r] = bias[r] + act_scale[t] * scale[r] * sum over columns c of q_act[t, c] * q_weight[c, r]

with act_scale = max |x[t]| / 127 and q_act = round(x / act_scale). With AMX it reaches 2.2 TOP/s, twice as much as the
compiled kernel; without AMX it is the best where nothing can be compiled. Weights in 8 bits are used as they are. For
weights in 4 bits it needs a copy in 8, one more byte a weight, which serves many tokens only and is left out where
memory is short. The error is 1.2 % of a result's norm, where that of nf4 weights is 9 %.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.jit.compiler import supported_isas
from llava_cli.hardware.memory import free_memory

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit import Layout

MIN_TOKENS = 32
"""For fewer tokens weights in 4 bits are faster, being half as much to read."""
_ROWS_AT_ONCE = 32
"""Rows that stay in the processor's cache."""
_TOKENS_AT_ONCE = 640
"""A prompt with an image. With half as many the weights would be read twice, which is 5 % slower."""
_MEMORY_SHARE = 0.5
"""How much of the free memory copies of weights may take."""
_sums = threading.local()
"""Each thread's memory for sums in int32, as large as its widest product so far: allocating it takes a tenth of the
time of a product."""


def is_fastest_here() -> bool:
    """Whether this CPU has nothing faster."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_vnni_supported() and not supported_isas()


def fits_in_memory(layers: Iterable[Any]) -> bool:
    """Whether there is memory for copies of these layers' weights in 8 bits."""
    size: int = sum(layer.in_features * layer.out_features for layer in layers)
    return size <= free_memory("cpu") * _MEMORY_SHARE


def int8_layout(layers: list[Any]) -> Layout:
    """The dtypes and shapes of what `quantize_to_int8` makes of these layers."""
    import torch

    out_features = sum(layer.out_features for layer in layers)
    return {"q_weight": (torch.int8, (layers[0].in_features, out_features)), "scale": (torch.float32, (out_features,))}


def quantize_to_int8(layers: list[Any]) -> dict[str, torch.Tensor]:
    """What `OneDnnInt8Linear` multiplies by, with one scale a row: q_weight [in_features, out_features], scale."""
    import torch

    out_features = sum(layer.out_features for layer in layers)
    q_weight = torch.empty(layers[0].in_features, out_features, dtype=torch.int8)
    scale = torch.empty(out_features)
    begin = 0
    for rows in dequantized_rows(layers):
        end = begin + len(rows)
        scale[begin:end] = row_scale = rows.abs().amax(1).clamp_(min=1e-12).div_(127)
        q_weight[:, begin:end] = (rows / row_scale[:, None]).round_().to(torch.int8).t()
        begin = end
    return {"q_weight": q_weight, "scale": scale}


def fuse_int8(layers: list[Any]) -> dict[str, torch.Tensor]:
    """What `OneDnnInt8Linear` multiplies by: weights of layers in 8 bits side by side, which the layers share."""
    import torch

    q_weight, scale = (torch.cat([getattr(layer.weight, name) for layer in layers]) for name in ("data", "SCB"))
    for layer, part in zip(layers, torch.split(q_weight, [layer.out_features for layer in layers]), strict=True):
        layer.weight.data = layer.weight.CB = part
    return {"q_weight": q_weight.t(), "scale": scale.float().div_(127)}


def dequantized_rows(layers: list[Any]) -> Iterator[torch.Tensor]:
    """Weights [some rows, in_features] in fp32, a few rows at a time, of layers in 4, 8, 16 or 32 bits."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    for layer in layers:
        weight = layer.weight
        if weight.dtype == torch.int8:
            parts = zip(torch.split(weight.data, _ROWS_AT_ONCE), torch.split(weight.SCB, _ROWS_AT_ONCE), strict=True)
            yield from (rows * absmax[:, None].div(127) for rows, absmax in parts)
        else:
            state = getattr(weight, "quant_state", None)
            full: torch.Tensor = dequantize_4bit(weight.data, state) if state else weight.data
            yield from (rows.float() for rows in torch.split(full, _ROWS_AT_ONCE))


class OneDnnInt8Linear:
    """Linear layers side by side: x [..., in_features] -> [..., out_features of all].

    `q_weight` [in_features, out_features] is in int8, `scale` [out_features] in fp32.
    """

    def __init__(self, q_weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._q_weight, self._scale, self._bias = q_weight, scale, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        tokens = x.reshape(-1, x.shape[-1])
        # In fp32, because bf16 would round some quotients up to 128.
        act_scale = tokens.abs().amax(-1, keepdim=True).float().clamp_(min=1e-6).div_(127)
        q_act = torch.div(tokens, act_scale).round_().to(torch.int8)
        out = x.new_empty(len(tokens), len(self._scale))
        for begin in range(0, len(out), _TOKENS_AT_ONCE):
            part = slice(begin, begin + _TOKENS_AT_ONCE)
            self._multiply(q_act[part], act_scale[part], out[part])
        out = out.view(*x.shape[:-1], -1)
        return out if self._bias is None else out.add_(self._bias)

    def _multiply(self, q_act: torch.Tensor, act_scale: torch.Tensor, out: torch.Tensor) -> None:
        import torch

        size = _TOKENS_AT_ONCE * len(self._scale)
        memory = getattr(_sums, "memory", None)
        if memory is None or memory.numel() < size:
            with torch.inference_mode(False):  # so that code outside of it can use the tensor, too
                memory = _sums.memory = torch.empty(size, dtype=torch.int32)
        sums = torch._int_mm(q_act, self._q_weight, out=memory[: out.numel()].view(out.shape))
        for begin in range(0, len(out), _ROWS_AT_ONCE):
            part = slice(begin, begin + _ROWS_AT_ONCE)
            out[part] = torch.mul(sums[part], self._scale).mul_(act_scale[part])
