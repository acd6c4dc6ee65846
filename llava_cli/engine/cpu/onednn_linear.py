"""Products in 8 bits by oneDNN: of many tokens for weights that have 4 bits, and of all for those that have 8.

With AMX they come at 2.2 TOP/s, twice as fast as those that are compiled; without it they are what there is where
nothing can be compiled. For weights in 4 bits there are copies in 8, a byte a weight more, which are left where memory
is short; activations are in 8 bits per token. The error is 1.2 % of a product's norm, where that of nf4 weights is 9 %.
Weights that have 8 bits are multiplied as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.jit.compiler import kinds_here
from llava_cli.hardware.memory import free_memory

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit import Layout

TOKENS = 32
"""From so many on. Fewer are faster in 4 bits, whose weights are half as much to read."""
_ROWS = 32
"""At a time stay in the processor's cache."""
_AT_ONCE = 640
"""Tokens that are multiplied: a prompt with a picture. Half as many would read the weights twice: 5 % slower."""
_room = threading.local()
"""For a thread's sums, of its widest product so far: new memory for each one takes a tenth of its time."""
_SHARE = 0.5  # of the memory that is free may go


def suits_here() -> bool:
    """Whether they are the fastest that this CPU has."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_vnni_supported() and not kinds_here()


def has_room(layers: Iterable[Any]) -> bool:
    """Whether this machine has the memory for 8-bit copies of these layers' weights."""
    size: int = sum(layer.in_features * layer.out_features for layer in layers)
    return size <= free_memory("cpu") * _SHARE


def layout_of_whole_numbers(layers: list[Any]) -> Layout:
    """The types and shapes of what `whole_numbers` makes of these layers."""
    import torch

    outputs = sum(layer.out_features for layer in layers)
    return {"whole": (torch.int8, (layers[0].in_features, outputs)), "scale": (torch.float32, (outputs,))}


def whole_numbers(layers: list[Any]) -> dict[str, torch.Tensor]:
    """What `Products` multiplies by: weights [inputs, outputs of all layers] and what one is worth [outputs]."""
    import torch

    outputs = sum(layer.out_features for layer in layers)
    whole, scale = torch.empty(layers[0].in_features, outputs, dtype=torch.int8), torch.empty(outputs)
    begin = 0
    for rows in weights_of(layers):
        end = begin + len(rows)
        scale[begin:end] = its = rows.abs().amax(1).clamp_(min=1e-12).div_(127)
        whole[:, begin:end] = (rows / its[:, None]).round_().to(torch.int8).t()
        begin = end
    return {"whole": whole, "scale": scale}


def as_they_are(layers: list[Any]) -> dict[str, torch.Tensor]:
    """What `Products` multiplies by, of layers that have 8 bits: their own weights, side by side, and not twice."""
    import torch

    whole, scale = (torch.cat([getattr(layer.weight, name) for layer in layers]) for name in ("data", "SCB"))
    for layer, its in zip(layers, torch.split(whole, [layer.out_features for layer in layers]), strict=True):
        layer.weight.data = layer.weight.CB = its
    return {"whole": whole.t(), "scale": scale.float().div_(127)}


def weights_of(layers: list[Any]) -> Iterator[torch.Tensor]:
    """A few rows at a time, the weights [outputs, inputs] in fp32, be they numbers or bitsandbytes' 4 or 8 bits."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    for layer in layers:
        weight = layer.weight
        if weight.dtype == torch.int8:
            parts = zip(torch.split(weight.data, _ROWS), torch.split(weight.SCB, _ROWS), strict=True)
            yield from (rows * its[:, None].div(127) for rows, its in parts)
        else:
            state = getattr(weight, "quant_state", None)
            numbers: torch.Tensor = dequantize_4bit(weight.data, state) if state else weight.data
            yield from (rows.float() for rows in torch.split(numbers, _ROWS))


class Products:
    """Linear layers side by side: x [..., inputs] -> [..., outputs of all layers].

    `whole` [inputs, outputs] are the weights in int8, `scale` [outputs] is what one of each column is worth.
    """

    def __init__(self, whole: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._whole, self._scale, self._bias = whole, scale, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        tokens = x.reshape(-1, x.shape[-1])
        # In fp32, for bf16 would round some of them up to 128.
        size = tokens.abs().amax(-1, keepdim=True).float().clamp_(min=1e-6).div_(127)
        whole = torch.div(tokens, size).round_().to(torch.int8)  # and not in place: what is given stays as it is
        out = x.new_empty(len(tokens), len(self._scale))
        for begin in range(0, len(out), _AT_ONCE):
            some = slice(begin, begin + _AT_ONCE)
            self._multiply(whole[some], size[some], out[some])
        out = out.view(*x.shape[:-1], -1)
        return out if self._bias is None else out.add_(self._bias)

    def _multiply(self, numbers: torch.Tensor, size: torch.Tensor, out: torch.Tensor) -> None:
        import torch

        room = getattr(_room, "sums", None)
        if room is None or room.numel() < _AT_ONCE * len(self._scale):
            with torch.inference_mode(False):  # for who computes otherwise, too
                room = _room.sums = torch.empty(_AT_ONCE * len(self._scale), dtype=torch.int32)
        sums = torch._int_mm(numbers, self._whole, out=room[: out.numel()].view(out.shape))
        for begin in range(0, len(out), _ROWS):
            some = slice(begin, begin + _ROWS)
            out[some] = torch.mul(sums[some], self._scale).mul_(size[some])
