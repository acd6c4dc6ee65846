"""What is between the products of a vision tower's layer, of some patches: norms, and the activation."""

from __future__ import annotations

from functools import reduce

from llvmlite import ir

from llava_cli.engine.cpu.jit import COLUMNS
from llava_cli.engine.cpu.jit.builder import F32, I64, Kind, Value, Writer, many, task

NormTask = task(("x", "more", "weight", "bias", "whole", "out"), ("tokens", "width", "threads", "next"))
"""x, more, whole and out [tokens, width]; weight, bias [width]. whole is x and more, where it adds."""
GeluTask = task(("x",), ("tokens", "width", "threads", "next"))
"""x [tokens, width]."""


def write_norm(kind: Kind, bf16: bool, epsilon: float, adds: bool) -> str:
    """Layer norm of a stream, to which it adds before."""
    return str(_Norm(kind, bf16, epsilon, adds).module)


def write_gelu(kind: Kind, bf16: bool, linear: float, cubic: float) -> str:
    """x times the sigmoid of linear x + cubic x^3, where it stands."""
    return str(_Gelu(kind, bf16, linear, cubic).module)


class _Norm(Writer):
    def __init__(self, kind: Kind, bf16: bool, epsilon: float, adds: bool) -> None:
        super().__init__(NormTask, kind, bf16)
        self._epsilon, self._adds = epsilon, adds
        norm = self._norm()
        with self.function("run"):
            self.run(norm)

    def _norm(self) -> ir.Function:
        with self.function("norm") as function:
            b, lanes, width = self.b, self.kind.lanes, self.count("width")
            vector = ir.VectorType(F32, lanes)
            self._sums = [b.alloca(vector) for _ in range(0, COLUMNS, lanes)]
            names = ("x", "more", "weight", "bias", "whole", "out")
            x, more, weight, bias, whole, out = (self.array(name, self.number) for name in names)
            size = b.sitofp(width, F32)
            with self.shared(1, self.count("tokens")) as (token, _):
                line = b.mul(token, width)
                stream = self.at(whole if self._adds else x, line)

                def added(column: Value) -> Value:
                    numbers = self.floats(self.at(x, line, column), lanes)
                    if self._adds:
                        numbers = self.rounded(b.fadd(numbers, self.floats(self.at(more, line, column), lanes)))
                        self.put(numbers, self.at(stream, column))
                    return numbers

                mean = self.spread(b.fdiv(self._sum(width, added), size), lanes)

                def square(column: Value) -> Value:
                    off = b.fsub(self.floats(self.at(stream, column), lanes), mean)
                    return b.fmul(off, off)

                spread = b.fdiv(self._sum(width, square), size)
                length = self.call("llvm.sqrt.f32", F32, b.fadd(spread, F32(self._epsilon)))
                scale = self.spread(b.fdiv(F32(1.0), length), lanes)
                with self.loop(I64(0), width, lanes) as column:
                    normed = b.fmul(b.fsub(self.floats(self.at(stream, column), lanes), mean), scale)
                    its, more_of_it = (self.floats(self.at(array, column), lanes) for array in (weight, bias))
                    self.put(self.fma(normed, its, more_of_it), self.at(out, line, column))
        return function

    def _sum(self, width: Value, numbers_at: Value) -> Value:
        """Of the numbers at all columns."""
        b, lanes = self.b, self.kind.lanes
        for place in self._sums:
            b.store(many(0.0, F32, lanes), place)
        with self.loop(I64(0), width, COLUMNS) as column:
            for place, begin in zip(self._sums, range(0, COLUMNS, lanes), strict=True):
                b.store(b.fadd(b.load(place), numbers_at(b.add(column, I64(begin)))), place)
        return self.sum(reduce(b.fadd, [b.load(place) for place in self._sums]))


class _Gelu(Writer):
    def __init__(self, kind: Kind, bf16: bool, linear: float, cubic: float) -> None:
        super().__init__(GeluTask, kind, bf16)
        self._linear, self._cubic = linear, cubic
        gelu = self._gelu()
        with self.function("run"):
            self.run(gelu)

    def _gelu(self) -> ir.Function:
        with self.function("gelu") as function:
            b, lanes, width = self.b, self.kind.lanes, self.count("width")
            x = self.array("x", self.number)
            linear, cubic = (many(factor, F32, lanes) for factor in (self._linear, self._cubic))
            with (
                self.shared(1, self.count("tokens")) as (token, _),
                self.loop(I64(0), width, lanes) as column,
            ):
                place = self.at(x, b.mul(token, width), column)
                numbers = self.floats(place, lanes)
                inner = b.fmul(numbers, self.fma(b.fmul(numbers, numbers), cubic, linear))
                self.put(b.fmul(numbers, self.sigmoid(inner)), place)
        return function
