"""Matrix product of quantized weights and activations that are quantized on the fly.

    out[t, r] = bias[r] + row_scale[r] * sum over blocks b of
                act_scale[t, b] * scales[r, b] * sum over columns c of b of q_act[t, c] * q_weight[r, c]

for x [tokens, columns] and weights [rows, columns] in blocks of 64 columns. The inner sum is exact, in int32.

- Weights in 4 bits are codes of a codebook of 16 values, times the block's largest magnitude `scales`: NF4 and FP4 of
  bitsandbytes (QLoRA, Dettmers et al. 2023). Here q_weight are `round_codebook`'s levels, and row_scale is their step.
- Weights in 8 bits have one scale a row: absmax / 127 (LLM.int8(), Dettmers et al. 2022). There are no `scales`.
- Activations get 8 bits a block, as in ggml's Q8_0: act_scale = max |x| / 127, q_act = round(x / act_scale).
  Beside weights in 4 bits AVX2 takes a larger act_scale where two neighbors are so large that their products' sum would
  not fit in 16 bits (`act_pair_qmax`). That rounds activations a little more, and spares weights from 7 bits.

The dot product instructions multiply unsigned bytes by signed ones. With VNNI (`vpdpbusd`, 64 products in 512 bits) the
weights are the unsigned ones: q_weight plus a zero point, for which `zero_point_correction`, -zero_point times the sum
of q_act, makes up. Without VNNI (`vpmaddubsw` and `vpmaddwd`, 32 products in three instructions) so are weights in 4
bits, while those in 8 bits give their signs to the activations.

Packed weights are [tiles of 16 rows, blocks of 64 columns, fours of columns, rows of the tile, 4]: what one instruction
adds up for a row stays in its lane. In 4 bits a byte has a column of one four in its lower half, and the same column
of the next four in its upper half.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, reduce
from typing import TYPE_CHECKING

from llvmlite import ir

from llava_cli.engine.cpu.jit import BLOCK, TILE_ROWS
from llava_cli.engine.cpu.jit.builder import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    IsaTier,
    KernelBuilder,
    Value,
    args_struct,
    splat_const,
)

if TYPE_CHECKING:
    import torch

_TILES_AT_ONCE = 4
"""Tiles that a thread claims at a time; they stay in its cache for all tokens."""
_PREFETCH_BYTES = 4096
"""How far ahead weights are prefetched: 25 GB/s instead of 17, where torch's own sum reads 22."""
_PREFETCH_MAX_TOKENS = 8
"""Of more tokens at once, prefetching costs more than it saves."""
_ONE_THREAD_MAX_TOKENS = 8
"""Tokens whose activations are quantized by one thread: starting the others takes as long."""
_MIN_ABSMAX = 1e-30
"""A block of activations below this is quantized to zeros."""

KernelArgs = args_struct(
    (
        *("x", "out", "weights", "scales", "codebook", "row_scale", "bias"),
        *("q_act", "act_scale", "zero_point_correction"),
    ),
    ("tokens", "tiles", "blocks", "threads", "next"),
)
"""x [tokens, columns] and out [tokens, rows], both in bf16 or both in fp32.

weights, packed, in uint8 (two codes of 4 bits each) or int8; scales [tiles, blocks, TILE_ROWS] in fp16; codebook [16]
in uint8, with the zero point weight_qmax + 1 added; row_scale and bias [rows] in fp32.

Workspace: q_act [tokens, blocks, 64] in int8, act_scale [tokens, blocks] in fp32, zero_point_correction [tokens,
blocks] in int32. In all three the tokens that are multiplied at once stand together, block by block.
"""


def build(isa: IsaTier, bf16: bool, bits: int) -> str:
    """LLVM assembly, for weights of 4 or 8 `bits`."""
    return str(_QuantizedGemm(isa, bf16, bits).module)


class _QuantizedGemm(KernelBuilder):
    def __init__(self, isa: IsaTier, bf16: bool, bits: int) -> None:
        super().__init__(KernelArgs, isa, bf16)
        self._bits = bits
        self._signs_to_activations = bits == 8 and not isa.vnni
        self._act_pair_qmax = isa.act_pair_qmax if bits == 4 else None
        self._zero_point = 0 if self._signs_to_activations else isa.weight_qmax + 1
        quantize, multiply = self._quantize_activations(), self._multiply()
        with self.function("run") as run:
            few = self.b.icmp_signed("<=", self.int_arg("tokens"), I64(_ONE_THREAD_MAX_TOKENS))
            with self.b.if_else(few) as (one_thread, several):
                with one_thread:
                    self.set_arg("next", 0)
                    self.b.call(quantize, run.args)
                with several:
                    self.run_parallel(quantize)
            self.run_parallel(multiply)

    def _quantize_activations(self) -> ir.Function:
        with self.function("quantize_activations") as function:
            b, vector = self.b, ir.VectorType(F32, 16)
            x, q_act = self.array_arg("x"), self.array_arg("q_act", I8)
            act_scale, correction = self.array_arg("act_scale", F32), self.array_arg("zero_point_correction", I32)
            blocks = self.int_arg("blocks")
            token_blocks = self.blocks(self.int_arg("tokens"), self.isa.token_block_sizes)
            with self.dynamic_loop(1, self.int_arg("tokens")) as (token, _):
                first, size = token, I64(1)  # of the token block that this token is in
                for begin, end, block_size in reversed(token_blocks):
                    within = b.icmp_signed("<", token, end)
                    first = b.select(within, b.sub(token, b.srem(b.sub(token, begin), I64(block_size))), first)
                    size = b.select(within, I64(block_size), size)
                line = b.add(b.mul(first, blocks), b.sub(token, first))
                with self.loop(I64(0), blocks) as block:
                    source = self.at(x, b.mul(b.add(b.mul(token, blocks), block), I64(BLOCK)))
                    parts = [self.load_fp32(self.at(source, I64(column)), 16) for column in range(0, BLOCK, 16)]
                    # maximum, and not maxnum: a NaN makes the whole block NaN.
                    magnitudes = [self._act_magnitudes(part) for part in parts]
                    absmax = reduce(partial(self.call, "llvm.maximum.v16f32", vector), magnitudes)
                    absmax = self.call("llvm.vector.reduce.fmaximum.v16f32", F32, absmax)
                    divisor = b.select(b.fcmp_ordered(">", absmax, F32(_MIN_ABSMAX)), absmax, F32(_MIN_ABSMAX))
                    inverse = self.broadcast(b.fdiv(F32(127.0), divisor), 16)
                    rounded = [self.call("llvm.rint.v16f32", vector, b.fmul(part, inverse)) for part in parts]
                    integers = [b.fptosi(part, ir.VectorType(I32, 16)) for part in rounded]
                    target = b.add(line, b.mul(block, size))
                    for column, part in zip(range(0, BLOCK, 16), integers, strict=True):
                        as_bytes = b.trunc(part, ir.VectorType(I8, 16))
                        self.store(as_bytes, self.at(q_act, b.mul(target, I64(BLOCK)), I64(column)))
                    b.store(b.fdiv(absmax, F32(127.0)), self.at(act_scale, target))
                    total = self.call("llvm.vector.reduce.add.v16i32", I32, reduce(b.add, integers))
                    b.store(b.mul(total, I32(-self._zero_point)), self.at(correction, target))
        return function

    def _act_magnitudes(self, x: Value) -> Value:
        """|x|, or more where a pair of neighbors asks for a larger scale; 16 lanes."""
        b, vector = self.b, x.type
        magnitudes = self.call("llvm.fabs.v16f32", vector, x)
        if not self._act_pair_qmax:
            return magnitudes
        neighbors = ir.Constant(ir.VectorType(I32, 16), [lane ^ 1 for lane in range(16)])
        pairs = b.fadd(magnitudes, b.shuffle_vector(magnitudes, ir.Constant(vector, ir.Undefined), neighbors))
        scaled = b.fmul(pairs, splat_const(127 / self._act_pair_qmax, F32, 16))
        return self.call("llvm.maximum.v16f32", vector, magnitudes, scaled)

    def _multiply(self) -> ir.Function:
        """Each thread multiplies all tokens by the tiles that it claims."""
        with self.function("multiply") as function:
            b = self.b
            sums = self.accumulators(self.isa.token_block_sizes[0])
            elements = {"out": self.element, "weights": I8, "scales": F16, "codebook": I8}
            elements |= {"row_scale": F32, "bias": F32, "q_act": I8, "act_scale": F32, "zero_point_correction": I32}
            self._arrays = {name: self.array_arg(name, element) for name, element in elements.items()}
            self._blocks, self._rows = self.int_arg("blocks"), b.mul(self.int_arg("tiles"), I64(TILE_ROWS))
            token_blocks = self.blocks(self.int_arg("tokens"), self.isa.token_block_sizes)
            with self.dynamic_loop(_TILES_AT_ONCE, self.int_arg("tiles")) as (first, end):
                for begin, stop, size in token_blocks:
                    with self.loop(begin, stop, size) as token, self.loop(first, end) as tile:
                        for half in range(TILE_ROWS // self.lanes):
                            self._multiply_tile(tile, half, token, sums[:size])
        return function

    def _multiply_tile(self, tile: Value, half: int, token: Value, sums: list[Value]) -> None:
        """As many rows of a tile as a register has lanes, by len(sums) tokens from `token` on."""
        b, lanes, arrays = self.b, self.lanes, self._arrays
        tile_bytes = self._bits * BLOCK * TILE_ROWS // 8
        row = b.add(b.mul(tile, I64(TILE_ROWS)), I64(half * lanes))
        line = b.mul(token, self._blocks)
        self.clear(sums)
        with self.loop(I64(0), self._blocks) as block:
            index = b.add(b.mul(tile, self._blocks), block)
            weights = self.at(arrays["weights"], b.mul(index, I64(tile_bytes)))
            if len(sums) <= _PREFETCH_MAX_TOKENS and not half:
                self.prefetch(weights, tile_bytes, _PREFETCH_BYTES)
            first = b.add(line, b.mul(block, I64(len(sums))))
            q_act = self.at(arrays["q_act"], b.mul(first, I64(BLOCK)))
            starts = [b.load(self.at(arrays["zero_point_correction"], first, I64(i))) for i in range(len(sums))]
            dots = [self.broadcast(start) for start in starts]
            for column, q_weight in self._weight_columns(weights, half):
                for i in range(len(dots)):
                    pointer = b.bitcast(self.at(q_act, I64(BLOCK * i + column)), I32.as_pointer())
                    four_bytes = b.load(pointer, align=4)
                    dots[i] = self._dot4(dots[i], q_weight, self.broadcast(four_bytes))
            weight_scale = None
            if self._bits == 4:
                pointer = self.at(arrays["scales"], b.add(b.mul(index, I64(TILE_ROWS)), I64(half * lanes)))
                weight_scale = b.fpext(self.load(pointer, F16, lanes), self.vector)
            for i, (dot, accumulator) in enumerate(zip(dots, sums, strict=True)):
                scale = self.broadcast(b.load(self.at(arrays["act_scale"], first, I64(i))))
                if weight_scale is not None:
                    scale = b.fmul(scale, weight_scale)
                self.accumulate(accumulator, b.sitofp(dot, self.vector), scale)
        row_scale, bias = (self.load(self.at(arrays[name], row), F32, lanes) for name in ("row_scale", "bias"))
        for i, accumulator in enumerate(sums):
            out = self.at(arrays["out"], b.mul(b.add(token, I64(i)), self._rows), row)
            self.store_rounded(self.fma(b.load(accumulator), row_scale, bias), out)

    def _weight_columns(self, weights: Value, half: int) -> Iterator[tuple[int, Value]]:
        """A block's weights, four columns at a time: the first column's index, and bytes [rows, 4]."""
        b, size = self.b, 4 * self.lanes
        starts = range(half * size, self._bits * BLOCK * TILE_ROWS // 8, 4 * TILE_ROWS)
        if self._bits == 8:
            for i, start in enumerate(starts):
                q_weight = self.load(self.at(weights, I64(start)), I8, size)
                # Flipping the sign bit adds the zero point, 128.
                yield 4 * i, q_weight if self._signs_to_activations else b.xor(q_weight, splat_const(-128, I8, size))
            return
        shuffle = "llvm.x86.avx512.pshuf.b.512" if size == 64 else "llvm.x86.avx2.pshuf.b"
        codebook = self.load(self._arrays["codebook"], I8, 16)
        repeated = ir.Constant(ir.VectorType(I32, size), [i % 16 for i in range(size)])
        codebook = b.shuffle_vector(codebook, ir.Constant(codebook.type, ir.Undefined), repeated)
        for i, start in enumerate(starts):
            lower = self.load(self.at(weights, I64(start)), I8, size)
            upper = b.lshr(self.bitcast(lower, I16, size // 2), splat_const(4, I16, size // 2))
            for part, codes in enumerate((lower, self.bitcast(upper, I8, size))):
                codes = b.and_(codes, splat_const(15, I8, size))
                yield 8 * i + 4 * part, self.call(shuffle, codebook.type, codebook, codes)

    def _dot4(self, dot: Value, q_weight: Value, q_act: Value) -> Value:
        """Adds to each int32 lane the products of its four bytes."""
        b, lanes = self.b, self.lanes
        if self.isa.vnni:
            name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
            return self.call(name, dot.type, dot, self.bitcast(q_weight, I32, lanes), q_act)
        q_act = self.bitcast(q_act, I8, 4 * lanes)
        if self._signs_to_activations:
            q_act = self.call("llvm.x86.avx2.psign.b", q_weight.type, q_act, q_weight)
            q_weight = self.call("llvm.abs.v32i8", q_weight.type, q_weight, ir.Constant(ir.IntType(1), 0))
        pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 2 * lanes), q_weight, q_act)
        fours = self.call("llvm.x86.avx2.pmadd.wd", dot.type, pairs, splat_const(1, I16, 2 * lanes))
        return b.add(dot, fours)


def round_codebook(codebook: torch.Tensor, qmax: int) -> tuple[torch.Tensor, float]:
    """Whole numbers [16] of at most `qmax` and the step between them: the closest to a codebook in fp32.

    Of all steps the one whose errors are the least, with their mean counted four times: it does not cancel out over a
    block of inputs that have a mean. With qmax as the largest code's level NF4 would be off by a third more.
    """
    import torch

    scales = torch.arange(0.75 * qmax, qmax + 0.49, 0.01)[:, None] / codebook.abs().max().clamp(min=1e-30)
    levels = (codebook * scales).round()
    steps = (codebook * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True).clamp(min=1)
    errors = levels * steps - codebook
    best = int((errors.square().mean(1) + 4 * errors.mean(1).square()).argmin())
    return levels[best], float(steps[best])


def reference(
    x: torch.Tensor,
    weights: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    codebook: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    isa: IsaTier,
) -> torch.Tensor:
    """The same in plain torch, with packed weights: x [tokens, columns] -> [tokens, rows].

    In 4 bits `codebook` [16] is in fp32. Codebook and activations are rounded as they are for kernels of `isa`.
    """
    import torch

    tokens, (tiles, blocks) = len(x), weights.shape[:2]
    if codebook is not None and scales is not None:
        levels, step = round_codebook(codebook, isa.weight_qmax)
        values = levels * step
        codes = torch.stack((weights & 15, weights >> 4), 3).flatten(2, 3)
        weight = values[codes.long()] * scales.float()[:, :, None, :, None]
    else:
        weight = weights.float()
    weight = weight.permute(0, 3, 1, 2, 4).reshape(tiles * TILE_ROWS, blocks * BLOCK)
    act = x.float().view(tokens, blocks, BLOCK)
    act_scale = act.abs().amax(-1, keepdim=True).clamp(min=_MIN_ABSMAX) / 127
    if codebook is not None and isa.act_pair_qmax:
        pairs = act.abs().view(tokens, blocks, -1, 2).sum(-1)
        act_scale = act_scale.maximum(pairs.amax(-1, keepdim=True) / isa.act_pair_qmax)
    out = ((act / act_scale).round() * act_scale).view(tokens, -1) @ weight.mT
    out = out if row_scale is None else out * row_scale
    return (out if bias is None else out + bias.float()).to(x.dtype)
