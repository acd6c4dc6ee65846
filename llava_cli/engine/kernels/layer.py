"""What is between the products of a decoder's layer, of some tokens: norms, and the gate."""

from __future__ import annotations

from functools import reduce

from llvmlite import ir

from llava_cli.engine.kernels import COLUMNS
from llava_cli.engine.kernels.writer import F32, I64, Kind, Writer, many, task

NormTask = task(("x", "more", "weight", "out"), ("tokens", "width", "threads", "next"))
"""x, more and out [tokens, width]; `more` is added to x. weight [width]."""
GateTask = task(("x", "out"), ("tokens", "width", "threads", "next"))
"""x [tokens, 2, width], the gate's and then the others; out [tokens, width]."""


def write_norm(kind: Kind, bf16: bool, epsilon: float) -> str:
    """Adds to a stream, and makes its root mean square norm, rounded where transformers rounds it."""
    return str(_Norm(kind, bf16, epsilon).module)


def write_gate(kind: Kind, bf16: bool) -> str:
    """SiLU of the gate's numbers, times the others."""
    return str(_Gate(kind, bf16).module)


class _Norm(Writer):
    def __init__(self, kind: Kind, bf16: bool, epsilon: float) -> None:
        super().__init__(NormTask, kind, bf16)
        self._epsilon = epsilon
        norm = self._norm()
        with self.function("run"):
            self.run(norm)

    def _norm(self) -> ir.Function:
        with self.function("norm") as function:
            b, lanes, width = self.b, self.kind.lanes, self.count("width")
            vector = ir.VectorType(F32, lanes)
            sums = [b.alloca(vector) for _ in range(0, COLUMNS, lanes)]
            x, more, weight, out = (self.array(name, self.number) for name in ("x", "more", "weight", "out"))
            with self.shared(1, self.count("tokens")) as (token, _):
                line = b.mul(token, width)
                for place in sums:
                    b.store(many(0.0, F32, lanes), place)
                with self.loop(I64(0), width, COLUMNS) as column:
                    for place, begin in zip(sums, range(0, COLUMNS, lanes), strict=True):
                        its = self.at(x, line, column, I64(begin))
                        added = self.floats(self.at(more, line, column, I64(begin)), lanes)
                        whole = self.rounded(b.fadd(self.floats(its, lanes), added))
                        self.put(whole, its)
                        b.store(self.fma(whole, whole, b.load(place)), place)
                total = self.sum(reduce(b.fadd, [b.load(place) for place in sums]))
                mean = b.fdiv(total, b.sitofp(width, F32))
                length = self.call("llvm.sqrt.f32", F32, b.fadd(mean, F32(self._epsilon)))
                scale = self.spread(b.fdiv(F32(1.0), length), lanes)
                with self.loop(I64(0), width, lanes) as column:
                    normed = self.rounded(b.fmul(self.floats(self.at(x, line, column), lanes), scale))
                    normed = b.fmul(normed, self.floats(self.at(weight, column), lanes))
                    self.put(normed, self.at(out, line, column))
        return function


class _Gate(Writer):
    def __init__(self, kind: Kind, bf16: bool) -> None:
        super().__init__(GateTask, kind, bf16)
        gate = self._gate()
        with self.function("run"):
            self.run(gate)

    def _gate(self) -> ir.Function:
        with self.function("gate") as function:
            b, lanes, width = self.b, self.kind.lanes, self.count("width")
            x, out = self.array("x", self.number), self.array("out", self.number)
            one = many(1.0, F32, lanes)
            with self.shared(1, self.count("tokens")) as (token, _):
                gates = b.mul(token, b.mul(width, I64(2)))
                with self.loop(I64(0), width, lanes) as column:
                    gate = self.floats(self.at(x, gates, column), lanes)
                    up = self.floats(self.at(x, gates, width, column), lanes)
                    side = self.call(f"llvm.fabs.v{lanes}f32", gate.type, gate)
                    power = self.power(b.fneg(side))
                    positive = b.fcmp_ordered(">=", gate, many(0.0, F32, lanes))
                    share = b.fdiv(b.select(positive, one, power), b.fadd(one, power))
                    silu = self.rounded(b.fmul(gate, share))
                    self.put(b.fmul(silu, up), self.at(out, b.mul(token, width), column))
        return function
