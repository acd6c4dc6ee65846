"""A product of one token with weights as a checkpoint has them."""

from __future__ import annotations

from llvmlite import ir

from llava_cli.engine.kernels import COLUMNS, ROWS
from llava_cli.engine.kernels.writer import F32, I64, Kind, Value, Writer, many, task

_CHUNK = 32
"""Rows that a thread takes."""

Task = task(("x", "out", "weights", "bias"), ("rows", "columns", "threads", "next"))
"""x [columns], out [rows], weights [rows, columns]; bias [rows] in fp32."""


def write(kind: Kind, bf16: bool) -> str:
    return str(_Rows(kind, bf16).module)


class _Rows(Writer):
    def __init__(self, kind: Kind, bf16: bool) -> None:
        super().__init__(Task, kind, bf16)
        multiply = self._multiply()
        with self.function("run"):
            self.run(multiply)

    def _multiply(self) -> ir.Function:
        with self.function("multiply") as function:
            b, lanes = self.b, self.kind.lanes
            vector = ir.VectorType(F32, lanes)
            sums = [b.alloca(vector) for _ in range(ROWS)]
            x, out, weights = (self.array(name, self.number) for name in ("x", "out", "weights"))
            bias, columns = self.array("bias", F32), self.count("columns")
            with self.shared(_CHUNK, self.count("rows")) as (first, end), self.loop(first, end, ROWS) as row:
                for place in sums:
                    b.store(many(0.0, F32, lanes), place)
                lines = [b.mul(b.add(row, I64(i)), columns) for i in range(ROWS)]
                with self.loop(I64(0), columns, COLUMNS) as column:
                    for line in lines:  # the next rows'
                        self.prefetch(self.at(weights, line, column, b.mul(columns, I64(ROWS))), COLUMNS * self.bytes)
                    for begin in range(0, COLUMNS, lanes):
                        given = self.floats(self.at(x, column, I64(begin)), lanes)
                        for line, place in zip(lines, sums, strict=True):
                            its = self.floats(self.at(weights, line, column, I64(begin)), lanes)
                            b.store(self.fma(its, given, b.load(place)), place)
                totals: Value = ir.Constant(ir.VectorType(F32, ROWS), ir.Undefined)
                for i, place in enumerate(sums):
                    totals = b.insert_element(totals, self.sum(b.load(place)), I64(i))
                self.put(b.fadd(totals, self.read(self.at(bias, row), F32, ROWS)), self.at(out, row))
        return function
