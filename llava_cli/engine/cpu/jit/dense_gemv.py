"""A product of few tokens with weights as a checkpoint has them."""

from __future__ import annotations

from llvmlite import ir

from llava_cli.engine.cpu.jit import COLUMNS, ROWS
from llava_cli.engine.cpu.jit.builder import F32, I64, Kind, Value, Writer, many, task

_CHUNK = 32
"""Rows that a thread takes."""

Task = task(("x", "out", "weights", "bias"), ("tokens", "apart", "rows", "columns", "threads", "next"))
"""x [tokens, columns], out [tokens, rows], whose tokens are `apart`; weights [rows, columns]; bias [rows] in fp32."""


def write(kind: Kind, bf16: bool) -> str:
    return str(_Rows(kind, bf16).module)


class _Rows(Writer):
    def __init__(self, kind: Kind, bf16: bool) -> None:
        super().__init__(Task, kind, bf16)
        self._most = 4 if kind.lanes == 16 else 2
        """Tokens that there are registers for, four rows of each."""
        multiply = self._multiply()
        with self.function("run"):
            self.run(multiply)

    def _multiply(self) -> ir.Function:
        """All tokens with some rows, which stay in a thread's cache."""
        with self.function("multiply") as function:
            b = self.b
            vector = ir.VectorType(F32, self.kind.lanes)
            sums = [[b.alloca(vector) for _ in range(ROWS)] for _ in range(self._most)]
            tokens, columns = self.count("tokens"), self.count("columns")
            groups = self.groups(tokens, [size for size in (4, 2, 1) if size <= self._most])
            with self.shared(_CHUNK, self.count("rows")) as (first, end), self.loop(first, end, ROWS) as row:
                for begin, to, size in groups:
                    with self.loop(begin, to, size) as token:
                        self._rows(row, token, sums[:size], columns)
        return function

    def _rows(self, row: Value, token: Value, sums: list[list[Value]], columns: Value) -> None:
        """Four rows with so many tokens; one alone waits for memory, which is told of the next rows."""
        b, lanes = self.b, self.kind.lanes
        x, out, weights = (self.array(name, self.number) for name in ("x", "out", "weights"))
        for its in sums:
            for place in its:
                b.store(many(0.0, F32, lanes), place)
        lines = [b.mul(b.add(row, I64(i)), columns) for i in range(ROWS)]
        given = [b.mul(b.add(token, I64(i)), columns) for i in range(len(sums))]
        with self.loop(I64(0), columns, COLUMNS) as column:
            if len(sums) == 1:
                for line in lines:  # the next rows'
                    self.prefetch(self.at(weights, line, column, b.mul(columns, I64(ROWS))), COLUMNS * self.bytes)
            for begin in range(0, COLUMNS, lanes):
                read = [self.floats(self.at(weights, line, column, I64(begin)), lanes) for line in lines]
                for start, its in zip(given, sums, strict=True):
                    numbers = self.floats(self.at(x, start, column, I64(begin)), lanes)
                    for weight, place in zip(read, its, strict=True):
                        b.store(self.fma(weight, numbers, b.load(place)), place)
        bias = self.read(self.at(self.array("bias", F32), row), F32, ROWS)
        for i, its in enumerate(sums):
            totals: Value = ir.Constant(ir.VectorType(F32, ROWS), ir.Undefined)
            for number, place in enumerate(its):
                totals = b.insert_element(totals, self.sum(b.load(place)), I64(number))
            to = b.mul(b.add(token, I64(i)), self.count("apart"))
            self.put(b.fadd(totals, bias), self.at(out, to, row))
