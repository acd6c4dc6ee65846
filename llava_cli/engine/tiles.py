"""Linear layers with weights in 4 or 8 bits, multiplied by `kernels.tiles`: one way for few tokens and many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from ctypes import byref
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine.kernels.compiled import compiled, kinds_here

if TYPE_CHECKING:
    import torch


ROWS, BLOCK = 16, 64
"""Of a tile, and the columns of a block of it."""
_AT_ONCE = 512
"""Rows that are put in order: their numbers stand in memory several times on the way."""
_room = threading.local()
"""For the whole numbers of a thread's inputs."""


def suits(layers: list[Any]) -> bool:
    """Whether these layers can be multiplied so, side by side, on this CPU."""

    def fits(layer: Any) -> bool:
        block: int = getattr(getattr(layer.weight, "quant_state", None), "blocksize", BLOCK)
        return layer.out_features % ROWS == layer.in_features % BLOCK == 0 and block == BLOCK

    return bool(kinds_here()) and all(map(fits, layers))


def joined_bias(layers: list[Any]) -> torch.Tensor | None:
    """Their biases side by side; None where none has one."""
    import torch

    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([torch.zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers])


def in_tiles(layers: list[Any]) -> dict[str, torch.Tensor]:
    """What `Tiled` multiplies by: the numbers of bitsandbytes' layers as they are, in another order.

    Of other layers each row is rounded to 8 bits.
    """
    import torch

    if layers[0].weight.dtype == torch.uint8:
        parts = [(_in_bytes(bits), _by_tile(scales)) for bits, scales in _of_4_bits(layers)]
        weights, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"weights": weights, "scales": scales, "codes": layers[0].weight.quant_state.code.float()}
    parts = [(_tiled(whole), worth) for whole, worth in _of_8_bits(layers)]
    weights, worth = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"weights": weights, "worth": worth}


def _tiled(numbers: torch.Tensor) -> torch.Tensor:
    """[rows, columns] -> [tiles, blocks, fours of a block, rows of a tile, 4]"""
    rows, columns = numbers.shape
    apart = numbers.view(rows // ROWS, ROWS, columns // BLOCK, BLOCK // 4, 4)
    return apart.permute(0, 2, 3, 1, 4).contiguous()


def _in_bytes(bits: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' bytes [rows, columns / 2], each column's 4 bits before the next one's -> those of tiles."""
    import torch

    fours = _tiled(torch.stack((bits >> 4, bits & 15), -1).flatten(1))
    return fours[:, :, ::2] | fours[:, :, 1::2] << 4


def _by_tile(scales: torch.Tensor) -> torch.Tensor:
    """[rows, blocks] -> [tiles, blocks, rows of a tile] in fp16"""
    return scales.view(-1, ROWS, scales.shape[1]).transpose(1, 2).half()


def _of_4_bits(layers: list[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows at a time: their bytes, and their blocks' scales in fp32."""
    import torch
    from bitsandbytes.functional import dequantize_blockwise

    for layer in layers:
        state, rows = layer.weight.quant_state, layer.out_features
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2) + state.offset
        both = layer.weight.data.view(rows, -1), scales.float().view(rows, -1)
        yield from zip(*(torch.split(part, _AT_ONCE) for part in both), strict=True)


def _of_8_bits(layers: list[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows at a time: whole numbers, and what one of each row is worth."""
    import torch

    for layer in layers:
        for begin in range(0, layer.out_features, _AT_ONCE):
            rows = layer.weight.data[begin : begin + _AT_ONCE]
            if rows.dtype == torch.int8:
                yield rows, layer.weight.SCB[begin : begin + _AT_ONCE].float() / 127
            else:
                worth = rows.float().abs().amax(1).clamp_(min=1e-12).div_(127)
                yield (rows / worth[:, None]).round_().to(torch.int8), worth


class Tiled:
    """Linear layers side by side: x [..., inputs] -> [..., outputs of all].

    Of weights in 4 bits `scales` are what a code of 1 is worth in each block of a row, and `codes` [16] what 4 bits
    mean; of those in 8, `worth` [outputs] is what one of a row is worth.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        scales: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        worth: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        import torch

        self._kind = kinds_here()[0]
        self._tiles, self._blocks = weights.shape[:2]
        self._outputs, self._bits = ROWS * self._tiles, 4 if weights.dtype == torch.uint8 else 8
        levels = self._kind.levels
        if codes is not None:  # from 0 on
            codes = (codes * levels).round_().add_(levels + 1).to(torch.uint8)
            worth = torch.full((self._outputs,), 1 / levels)
        self._given = {
            "weights": weights,
            "scales": scales,
            "codes": codes,
            "worth": worth,
            "bias": torch.zeros(self._outputs) if bias is None else bias.float(),
        }

    def bound(self, x: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
        """Writes to `out` what becomes of `x` at the time that it is called.

        Both in bf16 or both in fp32, and in one piece. Not for two threads at a time.
        """
        return self._call(x, out, _Room())

    def _call(self, x: torch.Tensor, out: torch.Tensor, room: _Room) -> Callable[[], object]:
        import torch

        from llava_cli.engine.kernels.tiles import Task, write

        tokens = x.numel() // (BLOCK * self._blocks)
        tensors = {"x": x, "out": out, **self._given, **room.of(tokens, self._blocks)}
        counts = {"tokens": tokens, "tiles": self._tiles, "blocks": self._blocks, "threads": torch.get_num_threads()}
        task = Task(**{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}, **counts)
        task.tensors = tensors  # as long as it is told where they are
        return partial(compiled(write, self._kind, x.dtype == torch.bfloat16, self._bits), byref(task))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        given = x.contiguous() if x.dtype == torch.bfloat16 else x.float().contiguous()
        out = given.new_empty(*x.shape[:-1], self._outputs)
        room = vars(_room).setdefault("room", _Room())
        self._call(given, out, room)()
        return out.to(x.dtype)


class _Room:
    """For activations in 8 bits, what they are worth, and what their sums begin with."""

    def __init__(self) -> None:
        self._bytes: torch.Tensor | None = None

    def of(self, tokens: int, blocks: int) -> dict[str, torch.Tensor]:
        import torch

        sizes = {"numbers": tokens * blocks * BLOCK, "sizes": 4 * tokens * blocks, "minus": 4 * tokens * blocks}
        if self._bytes is None or len(self._bytes) < sum(sizes.values()):
            with torch.inference_mode(False):  # for who computes otherwise, too
                self._bytes = torch.empty(sum(sizes.values()), dtype=torch.uint8)
        parts = torch.split(self._bytes[: sum(sizes.values())], list(sizes.values()))
        return dict(zip(sizes, parts, strict=True))
