"""Linear layers with weights in 4 or 8 bits, packed for and multiplied by `jit.quantized_gemm`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.jit import BLOCK, CODEBOOK_SIZE, TILE_ROWS, Launch
from llava_cli.engine.cpu.jit.compiler import (
    Kernel,
    KernelLaunch,
    Run,
    addresses,
    best_isa,
    supported_isas,
    threads_for,
)

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit import Layout

_PACK_ROWS = 512
"""Rows that are packed at a time: several copies of them are in memory on the way."""
_MAX_TOKENS = 1280
"""Tokens of one launch, whose activations are in memory in 8 bits: two prompts with an image."""


def gemm_kernel(bits: int, bf16: bool) -> Kernel:
    from llava_cli.engine.cpu.jit.quantized_gemm import build

    return Kernel(build, bf16, _self_test, (bits,))


def suits(layers: list[Any]) -> bool:
    """Whether layers can be packed side by side, and this CPU has kernels."""

    def fits(layer: Any) -> bool:
        state = _quant_state(layer)
        whole_blocks: bool = not state or state.blocksize % BLOCK == layer.in_features % state.blocksize == 0
        return whole_blocks and bool(layer.out_features % TILE_ROWS == 0)

    return bool(supported_isas()) and all(map(fits, layers))


def _quant_state(layer: Any) -> Any:
    """bitsandbytes' description of weights in 4 bits; None of others."""
    return getattr(layer.weight, "quant_state", None)


def fused_bias(layers: list[Any]) -> torch.Tensor | None:
    """Biases side by side, 0 for layers that have none; None where no layer has one."""
    import torch

    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers])


def _zeros(size: int) -> torch.Tensor:
    import torch

    return torch.zeros(size, dtype=torch.float32, device="cpu")


def layout_of(layers: list[Any]) -> Layout:
    """The dtypes and shapes of what `pack_weights` makes of these layers."""
    bits = 4 if _quant_state(layers[0]) else 8
    return packed_layout(sum(layer.out_features for layer in layers), layers[0].in_features, bits)


def packed_layout(out_features: int, in_features: int, bits: int) -> Layout:
    """The dtypes and shapes of packed weights."""
    import torch

    tiles, blocks = out_features // TILE_ROWS, -(-in_features // BLOCK)
    if bits == 8:
        return {
            "weights": (torch.int8, (tiles, blocks, BLOCK // 4, TILE_ROWS, 4)),
            "row_scale": (torch.float32, (out_features,)),
        }
    return {
        "weights": (torch.uint8, (tiles, blocks, BLOCK // 8, TILE_ROWS, 4)),
        "scales": (torch.float16, (tiles, blocks, TILE_ROWS)),
        "codebook": (torch.float32, (CODEBOOK_SIZE,)),
    }


def pack_weights(layers: list[Any]) -> dict[str, torch.Tensor]:
    """What `QuantizedLinear` multiplies by: bitsandbytes' numbers unchanged, in another order.

    Rows of layers that are not quantized are rounded to 8 bits. Columns that a last block lacks are 0.
    """
    import torch

    if _quant_state(layers[0]):
        parts = [(_pack_nibbles(packed), _pack_scales(scales)) for packed, scales in _rows_in_4_bits(layers)]
        weights, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"weights": weights, "scales": scales, "codebook": _quant_state(layers[0]).code.float()}
    parts = [(_pack_tiles(q_weight), row_scale) for q_weight, row_scale in _rows_in_8_bits(layers)]
    weights, row_scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"weights": weights, "row_scale": row_scale}


def _pack_tiles(q_weight: torch.Tensor) -> torch.Tensor:
    """[rows, columns] -> [tiles, blocks, fours of columns, rows of a tile, 4]"""
    rows, columns = q_weight.shape
    split = q_weight.view(rows // TILE_ROWS, TILE_ROWS, columns // BLOCK, BLOCK // 4, 4)
    return split.permute(0, 2, 3, 1, 4).contiguous()


def _pack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' bytes [rows, columns / 2], each of two neighboring columns -> those of tiles."""
    import torch

    fours = _pack_tiles(torch.stack((packed >> 4, packed & 15), -1).flatten(1))
    return fours[:, :, ::2] | fours[:, :, 1::2] << 4


def _pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """[rows, blocks] -> [tiles, blocks, rows of a tile] in fp16"""
    return scales.view(-1, TILE_ROWS, scales.shape[1]).transpose(1, 2).half()


def _rows_in_4_bits(layers: list[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows at a time: bytes [rows, columns / 2], and the scales of their blocks in fp32."""
    import torch
    from bitsandbytes.functional import dequantize_blockwise

    for layer in layers:
        state, rows = _quant_state(layer), layer.out_features
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2) + state.offset
        scales = scales.float().view(rows, -1).repeat_interleave(state.blocksize // BLOCK, 1)
        both = layer.weight.data.view(torch.uint8).view(rows, -1), scales
        yield from zip(*(torch.split(part, _PACK_ROWS) for part in both), strict=True)


def _rows_in_8_bits(layers: list[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows at a time: weights in int8 [rows, whole blocks], and row_scale [rows]."""
    import torch
    from torch.nn.functional import pad

    for layer in layers:
        for begin in range(0, layer.out_features, _PACK_ROWS):
            rows = layer.weight.data[begin : begin + _PACK_ROWS]
            if rows.dtype == torch.int8:
                row_scale = layer.weight.SCB[begin : begin + _PACK_ROWS].float() / 127
            else:
                row_scale = rows.float().abs().amax(1).clamp_(min=1e-12).div_(127)
                rows = (rows / row_scale[:, None]).round_().to(torch.int8)
            yield pad(rows, (0, -layer.in_features % BLOCK)), row_scale


class QuantizedLinear:
    """Linear layers side by side: x [..., in_features] -> [..., out_features of all].

    Packed weights in 4 bits come with `scales` [tiles, blocks, TILE_ROWS] and a `codebook` [16] in fp32, weights in 8
    bits with `row_scale` [out_features].
    """

    def __init__(
        self,
        weights: torch.Tensor,
        scales: torch.Tensor | None = None,
        codebook: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        import torch

        self._tiles, self._blocks = weights.shape[:2]
        self._bits, self._out_features = 4 if scales is not None else 8, TILE_ROWS * self._tiles
        self._padded_in_features: int = BLOCK * self._blocks
        bias = _zeros(self._out_features) if bias is None else bias.float()
        layout = packed_layout(self._out_features, self._padded_in_features, self._bits)
        layout["bias"] = (torch.float32, (self._out_features,))
        tensors = {"weights": weights, "scales": scales, "codebook": codebook, "row_scale": row_scale, "bias": bias}
        self._tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        addresses(self._tensors, layout)
        if codebook is not None:
            self._round_codebook(codebook)
            layout["codebook"] = (torch.uint8, (CODEBOOK_SIZE,))
            layout["row_scale"] = layout["bias"]
        self._layout: Layout = layout

    def _round_codebook(self, codebook: torch.Tensor) -> None:
        """For the kernel: levels with the zero point added, and their step as every row's scale."""
        import torch

        from llava_cli.engine.cpu.jit.quantized_gemm import round_codebook

        qmax = best_isa().weight_qmax
        levels, step = round_codebook(codebook, qmax)
        self._tensors["codebook"] = levels.add(qmax + 1).to(torch.uint8)
        self._tensors["row_scale"] = _zeros(self._out_features) + step

    def bind(self, x: torch.Tensor, out: torch.Tensor, workspace: Workspace) -> list[Launch]:
        """What computes x [..., in_features] -> out [..., out_features], both contiguous, in bf16 or both in fp32.

        Launches that share a workspace must not run at the same time.
        """
        import torch

        if x.shape[-1] != self._padded_in_features:
            return [partial(copy_result, self, x, out)]
        tokens, outputs = x.flatten(end_dim=-2), out.flatten(end_dim=-2)
        parts = zip(torch.split(tokens, _MAX_TOKENS), torch.split(outputs, _MAX_TOKENS), strict=True)
        return [self._launch(part, part_out, workspace) for part, part_out in parts]

    def _launch(self, x: torch.Tensor, out: torch.Tensor, workspace: Workspace) -> KernelLaunch:
        import torch

        from llava_cli.engine.cpu.jit.quantized_gemm import KernelArgs

        tokens, dtype = len(x), torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        tensors = {"x": x, "out": out, **self._tensors, **workspace.buffers(tokens, self._blocks)}
        layout: Layout = {
            "x": (dtype, (tokens, self._padded_in_features)),
            "out": (dtype, (tokens, self._out_features)),
            **self._layout,
            **{name: (torch.uint8, (size,)) for name, size in workspace_bytes(tokens, self._blocks).items()},
        }
        threads = threads_for(tokens * self._padded_in_features * self._out_features)
        sizes = {"tokens": tokens, "tiles": self._tiles, "blocks": self._blocks, "threads": threads}
        args = KernelArgs(**addresses(tensors, layout), **sizes)
        return KernelLaunch(gemm_kernel(self._bits, dtype == torch.bfloat16), args, tensors)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn.functional import pad

        tokens = x.reshape(-1, x.shape[-1])
        tokens = (tokens if x.dtype == torch.bfloat16 else tokens.float()).contiguous()
        if x.shape[-1] != self._padded_in_features:
            tokens = pad(tokens, (0, -x.shape[-1] % BLOCK)).view(-1, self._padded_in_features)
        out = tokens.new_empty(len(tokens), self._out_features)
        for launch in self.bind(tokens, out, _workspaces.own):
            launch()
        return out.view(*x.shape[:-1], self._out_features).to(x.dtype)


def copy_result(linear: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, out: torch.Tensor) -> None:
    """Writes what a layer makes of `x` to `out`."""
    out.copy_(linear(x))


def workspace_bytes(tokens: int, blocks: int) -> dict[str, int]:
    """Bytes of what the kernel writes on the way."""
    scales = 4 * tokens * blocks
    return {"q_act": tokens * blocks * BLOCK, "act_scale": scales, "zero_point_correction": scales}


class Workspace:
    """Memory for quantized activations, which grows as needed."""

    def __init__(self) -> None:
        self._bytes: torch.Tensor | None = None

    def buffers(self, tokens: int, blocks: int) -> dict[str, torch.Tensor]:
        import torch

        sizes = workspace_bytes(tokens, blocks)
        total = sum(sizes.values())
        if self._bytes is None or len(self._bytes) < total:
            self._bytes = torch.empty(total, dtype=torch.uint8, device="cpu")
        return dict(zip(sizes, torch.split(self._bytes[:total], list(sizes.values())), strict=True))


class _Workspaces(threading.local):
    """Each thread's own."""

    def __init__(self) -> None:
        self.own = Workspace()


_workspaces = _Workspaces()


def _self_test(kernel: Kernel, run: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    from llava_cli.engine.cpu.jit.quantized_gemm import reference

    (bits,), (tokens, rows, columns) = kernel.constants, (11, 3 * TILE_ROWS, 2 * BLOCK)
    layout, generator = packed_layout(rows, columns, int(bits)), torch.Generator("cpu").manual_seed(0)
    dtype, shape = layout["weights"]
    least, end = (0, 256) if bits == 4 else (-127, 128)
    packed = {"weights": torch.randint(least, end, shape, generator=generator, dtype=dtype, device="cpu")}
    for name in layout.keys() - {"weights"}:
        dtype, shape = layout[name]
        packed[name] = torch.rand(shape, generator=generator, device="cpu").add_(0.5).to(dtype)
    if bits == 4:
        packed["codebook"] = torch.linspace(-1, 1, CODEBOOK_SIZE, device="cpu")
    x, bias = kernel.sample(tokens, columns), kernel.sample(rows).float()
    out = torch.empty(tokens, rows, dtype=x.dtype, device="cpu")
    QuantizedLinear(**packed, bias=bias)._launch(x, out, Workspace()).run_as(run)
    yield out, reference(x, **packed, bias=bias, isa=best_isa())
