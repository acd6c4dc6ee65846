"""Matrix product of a few tokens with weights in bf16 or fp32, as a checkpoint has them.

    out[t, r] = bias[r] + sum over columns c of x[t, c] * weight[r, c]

for x [tokens, columns] and weight [rows, columns]. With few tokens the time is that of reading the weights, so they are
read once, four rows at a time, and prefetched. Sums are in fp32, and a token's do not depend on the tokens beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llvmlite import ir

from llava_cli.engine.cpu.jit import GEMV_ROWS, VECTOR_COLUMNS
from llava_cli.engine.cpu.jit.builder import F32, I64, IsaTier, KernelBuilder, Value, args_struct

if TYPE_CHECKING:
    import torch

_ROWS_AT_ONCE = 32
"""Rows that a thread claims at a time; they stay in its cache for all tokens."""

KernelArgs = args_struct(("x", "out", "weight", "bias"), ("tokens", "out_stride", "rows", "columns", "threads", "next"))
"""x [tokens, columns] and weight [rows, columns] of one type, bias [rows] in fp32; out [tokens, rows], whose tokens are
`out_stride` elements apart."""


def build(isa: IsaTier, bf16: bool) -> str:
    """LLVM assembly."""
    return str(_DenseGemv(isa, bf16).module)


class _DenseGemv(KernelBuilder):
    def __init__(self, isa: IsaTier, bf16: bool) -> None:
        super().__init__(KernelArgs, isa, bf16)
        self._max_tokens = 4 if isa.lanes == 16 else 2
        """Tokens at once, for which there are registers with four rows each."""
        multiply = self._multiply()
        with self.function("run"):
            self.run_parallel(multiply)

    def _multiply(self) -> ir.Function:
        """Each thread multiplies all tokens by the rows that it claims."""
        with self.function("multiply") as function:
            sums = [self.accumulators(GEMV_ROWS) for _ in range(self._max_tokens)]
            tokens, columns = self.int_arg("tokens"), self.int_arg("columns")
            token_blocks = self.blocks(tokens, [size for size in (4, 2, 1) if size <= self._max_tokens])
            with (
                self.dynamic_loop(_ROWS_AT_ONCE, self.int_arg("rows")) as (first, end),
                self.loop(first, end, GEMV_ROWS) as row,
            ):
                for begin, stop, size in token_blocks:
                    with self.loop(begin, stop, size) as token:
                        self._multiply_rows(row, token, sums[:size], columns)
        return function

    def _multiply_rows(self, row: Value, token: Value, sums: list[list[Value]], columns: Value) -> None:
        """Four rows by len(sums) tokens; a single token waits for memory, so the next rows are prefetched."""
        b, lanes = self.b, self.lanes
        x, out, weight = (self.array_arg(name) for name in ("x", "out", "weight"))
        for of_token in sums:
            self.clear(of_token)
        weight_lines = [b.mul(b.add(row, I64(i)), columns) for i in range(GEMV_ROWS)]
        x_lines = [b.mul(b.add(token, I64(i)), columns) for i in range(len(sums))]
        with self.loop(I64(0), columns, VECTOR_COLUMNS) as column:
            if len(sums) == 1:
                for line in weight_lines:
                    next_rows = self.at(weight, line, column, b.mul(columns, I64(GEMV_ROWS)))
                    self.prefetch(next_rows, VECTOR_COLUMNS * self.itemsize)
            for start in range(0, VECTOR_COLUMNS, lanes):
                weights = [self.load_fp32(self.at(weight, line, column, I64(start))) for line in weight_lines]
                for line, of_token in zip(x_lines, sums, strict=True):
                    activations = self.load_fp32(self.at(x, line, column, I64(start)))
                    for row_weights, accumulator in zip(weights, of_token, strict=True):
                        self.accumulate(accumulator, row_weights, activations)
        bias = self.load(self.at(self.array_arg("bias", F32), row), F32, GEMV_ROWS)
        for i, of_token in enumerate(sums):
            totals: Value = ir.Constant(ir.VectorType(F32, GEMV_ROWS), ir.Undefined)
            for lane, accumulator in enumerate(of_token):
                totals = b.insert_element(totals, self.sum(b.load(accumulator)), I64(lane))
            target = b.mul(b.add(token, I64(i)), self.int_arg("out_stride"))
            self.store_rounded(b.fadd(totals, bias), self.at(out, target, row))


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain torch: [tokens, rows]."""
    out = x.float() @ weight.float().mT
    return (out if bias is None else out + bias.float()).to(x.dtype)
