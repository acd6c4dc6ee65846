"""Linear layers with weights in 4 or 8 bits, multiplied by `kernels.tiles`: one way for few tokens and many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.jit import BLOCK, CODES, TILE_ROWS
from llava_cli.engine.cpu.jit.compiler import Kernel, addresses, compiled, kinds_here, threads_for

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit import Layout

_ROWS = 512
"""At a time are put in order: their numbers stand in memory several times on the way."""
_AT_ONCE = 1280
"""Tokens that are multiplied, for they have to stand in memory in 8 bits: two prompts with a picture."""


def suits(layers: list[Any]) -> bool:
    """Whether these layers can be multiplied so, side by side, on this CPU."""

    def fits(layer: Any) -> bool:
        state = _state(layer)
        whole: bool = not state or state.blocksize % BLOCK == layer.in_features % state.blocksize == 0
        return whole and bool(layer.out_features % TILE_ROWS == 0)

    return bool(kinds_here()) and all(map(fits, layers))


def _state(layer: Any) -> Any:
    """What bitsandbytes has to say of weights in 4 bits; None of others."""
    return getattr(layer.weight, "quant_state", None)


def joined_bias(layers: list[Any]) -> torch.Tensor | None:
    """Their biases side by side; None where none has one."""
    import torch

    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers])


def _zeros(count: int) -> torch.Tensor:
    import torch

    return torch.zeros(count, dtype=torch.float32, device="cpu")


def layout_in_tiles(layers: list[Any]) -> Layout:
    """The types and shapes of what `in_tiles` makes of these layers."""
    return layout_of(sum(layer.out_features for layer in layers), layers[0].in_features, 4 if _state(layers[0]) else 8)


def layout_of(outputs: int, inputs: int, bits: int) -> Layout:
    """The types and shapes of weights in tiles."""
    import torch

    tiles, blocks = outputs // TILE_ROWS, -(-inputs // BLOCK)
    if bits == 8:
        return {
            "weights": (torch.int8, (tiles, blocks, BLOCK // 4, TILE_ROWS, 4)),
            "worth": (torch.float32, (outputs,)),
        }
    return {
        "weights": (torch.uint8, (tiles, blocks, BLOCK // 8, TILE_ROWS, 4)),
        "scales": (torch.float16, (tiles, blocks, TILE_ROWS)),
        "codes": (torch.float32, (CODES,)),
    }


def in_tiles(layers: list[Any]) -> dict[str, torch.Tensor]:
    """What `Tiled` multiplies by: the numbers of bitsandbytes' layers as they are, in another order.

    Of other layers each row is rounded to 8 bits. Columns that a block lacks are 0.
    """
    import torch

    if _state(layers[0]):
        parts = [(_in_bytes(bits), _by_tile(scales)) for bits, scales in _of_4_bits(layers)]
        weights, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"weights": weights, "scales": scales, "codes": _state(layers[0]).code.float()}
    parts = [(_tiled(whole), worth) for whole, worth in _of_8_bits(layers)]
    weights, worth = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"weights": weights, "worth": worth}


def _tiled(numbers: torch.Tensor) -> torch.Tensor:
    """[rows, columns] -> [tiles, blocks, fours of a block, rows of a tile, 4]"""
    rows, columns = numbers.shape
    apart = numbers.view(rows // TILE_ROWS, TILE_ROWS, columns // BLOCK, BLOCK // 4, 4)
    return apart.permute(0, 2, 3, 1, 4).contiguous()


def _in_bytes(bits: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' bytes [rows, columns / 2], each column's 4 bits before the next one's -> those of tiles."""
    import torch

    fours = _tiled(torch.stack((bits >> 4, bits & 15), -1).flatten(1))
    return fours[:, :, ::2] | fours[:, :, 1::2] << 4


def _by_tile(scales: torch.Tensor) -> torch.Tensor:
    """[rows, blocks] -> [tiles, blocks, rows of a tile] in fp16"""
    return scales.view(-1, TILE_ROWS, scales.shape[1]).transpose(1, 2).half()


def _of_4_bits(layers: list[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows at a time: their bytes, and their blocks' scales in fp32."""
    import torch
    from bitsandbytes.functional import dequantize_blockwise

    for layer in layers:
        state, rows = _state(layer), layer.out_features
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2) + state.offset
        scales = scales.float().view(rows, -1).repeat_interleave(state.blocksize // BLOCK, 1)
        both = layer.weight.data.view(torch.uint8).view(rows, -1), scales
        yield from zip(*(torch.split(part, _ROWS) for part in both), strict=True)


def _of_8_bits(layers: list[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows at a time: whole numbers, and what one of each row is worth."""
    import torch
    from torch.nn.functional import pad

    for layer in layers:
        for begin in range(0, layer.out_features, _ROWS):
            rows = layer.weight.data[begin : begin + _ROWS]
            if rows.dtype == torch.int8:
                worth = layer.weight.SCB[begin : begin + _ROWS].float() / 127
            else:
                worth = rows.float().abs().amax(1).clamp_(min=1e-12).div_(127)
                rows = (rows / worth[:, None]).round_().to(torch.int8)
            yield pad(rows, (0, -layer.in_features % BLOCK)), worth


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
        self._bits, self._outputs = 4 if scales is not None else 8, TILE_ROWS * self._tiles
        self.inputs: int = BLOCK * self._blocks
        """Columns that a block lacks, too."""
        levels = self._kind.levels
        if codes is not None:  # from 0 on
            codes = (codes * levels).round_().add_(levels + 1).to(torch.uint8)
            worth = _zeros(self._outputs) + 1 / levels
        bias = _zeros(self._outputs) if bias is None else bias.float()
        given = {"weights": weights, "scales": scales, "codes": codes, "worth": worth, "bias": bias}
        self._given = {name: tensor for name, tensor in given.items() if tensor is not None}
        self._layout: Layout = {
            **layout_of(self._outputs, self.inputs, self._bits),
            **({} if codes is None else {"codes": (torch.uint8, (CODES,))}),
            "worth": (torch.float32, (self._outputs,)),
            "bias": (torch.float32, (self._outputs,)),
        }
        addresses(self._given, self._layout)

    def bound(self, x: torch.Tensor, out: torch.Tensor, room: Room) -> list[Callable[[], object]]:
        """What writes to `out` [..., outputs] what becomes of `x` [..., inputs] at that time, some tokens at a time.

        Both in bf16 or both in fp32, and in one piece. Who shares `room` waits for it.
        """
        import torch

        if x.shape[-1] != self.inputs:
            return [partial(copied, self, x, out)]
        lines, to = x.flatten(end_dim=-2), out.flatten(end_dim=-2)
        parts = zip(torch.split(lines, _AT_ONCE), torch.split(to, _AT_ONCE), strict=True)
        return [self._kernel(part, to, room) for part, to in parts]

    def _kernel(self, x: torch.Tensor, out: torch.Tensor, room: Room) -> Kernel:
        import torch

        from llava_cli.engine.cpu.jit.quantized_gemm import Task, write

        tokens, number = len(x), torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        tensors = {"x": x, "out": out, **self._given, **room.of(tokens, self._blocks)}
        layout: Layout = {
            "x": (number, (tokens, self.inputs)),
            "out": (number, (tokens, self._outputs)),
            **self._layout,
            **{name: (torch.uint8, (size,)) for name, size in room_for(tokens, self._blocks).items()},
        }
        counts = {"tokens": tokens, "tiles": self._tiles, "blocks": self._blocks}
        threads = threads_for(tokens * self.inputs * self._outputs)
        task = Task(**addresses(tensors, layout), **counts, threads=threads)
        return Kernel(compiled(write, self._kind, number == torch.bfloat16, self._bits), task, tensors)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn.functional import pad

        tokens = x.reshape(-1, x.shape[-1])
        given = (tokens if x.dtype == torch.bfloat16 else tokens.float()).contiguous()
        if x.shape[-1] != self.inputs:
            given = pad(given, (0, -x.shape[-1] % BLOCK)).view(-1, self.inputs)
        out = given.new_empty(len(given), self._outputs)
        for kernel in self.bound(given, out, _rooms.room):
            kernel()
        return out.view(*x.shape[:-1], self._outputs).to(x.dtype)


def copied(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, out: torch.Tensor) -> None:
    """Writes to `out` what a product makes of `x`."""
    out.copy_(product(x))


def room_for(tokens: int, blocks: int) -> dict[str, int]:
    """Bytes of what a kernel writes for itself on the way."""
    return {"numbers": tokens * blocks * BLOCK, "sizes": 4 * tokens * blocks, "minus": 4 * tokens * blocks}


class Room:
    """For activations in 8 bits, what they are worth, and what their sums begin with."""

    def __init__(self) -> None:
        self._bytes: torch.Tensor | None = None

    def of(self, tokens: int, blocks: int) -> dict[str, torch.Tensor]:
        import torch

        sizes = room_for(tokens, blocks)
        if self._bytes is None or len(self._bytes) < sum(sizes.values()):
            self._bytes = torch.empty(sum(sizes.values()), dtype=torch.uint8, device="cpu")
        parts = torch.split(self._bytes[: sum(sizes.values())], list(sizes.values()))
        return dict(zip(sizes, parts, strict=True))


class _Rooms(threading.local):
    """One for each thread."""

    def __init__(self) -> None:
        self.room = Room()


_rooms = _Rooms()
