"""What is between the products of a decoder's layer, of some tokens: norms, turning heads, and the gate."""

from __future__ import annotations

from functools import reduce

from llvmlite import ir

from llava_cli.engine.cpu.jit import COLUMNS
from llava_cli.engine.cpu.jit.builder import F32, I64, Kind, Value, Writer, many, task

NormTask = task(("x", "more", "weight", "out"), ("tokens", "width", "threads", "next"))
"""x, more and out [tokens, width]; `more` is added to x. weight [width]."""
GateTask = task(("x", "out"), ("tokens", "width", "threads", "next"))
"""x [tokens, 2, width], the gate's and then the others; out [tokens, width]."""

TurnTask = task(
    ("x", "keys", "values", "cos", "sin"),
    ("tokens", "apart", "heads", "key_heads", "width", "room", "begin", "threads", "next"),
)
"""x [tokens, all heads, width], of queries, of keys and of values, in each row as many tokens as it is `apart` from the
next; cos and sin [tokens, width / 2]. Queries are turned where they are; keys, turned, and values go to [rows, key
heads, room, width], from token `begin` on.
"""


def write_norm(kind: Kind, bf16: bool, epsilon: float) -> str:
    """Adds to a stream, and makes its root mean square norm, rounded where transformers rounds it."""
    return str(_Norm(kind, bf16, epsilon).module)


def write_gate(kind: Kind, bf16: bool) -> str:
    """SiLU of the gate's numbers, times the others."""
    return str(_Gate(kind, bf16).module)


def write_turn(kind: Kind, bf16: bool) -> str:
    """Turns queries and keys by their tokens' angles (RoPE), and puts keys and values where they belong."""
    return str(_Turn(kind, bf16).module)


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
            with self.shared(1, self.count("tokens")) as (token, _):
                gates = b.mul(token, b.mul(width, I64(2)))
                with self.loop(I64(0), width, lanes) as column:
                    gate = self.floats(self.at(x, gates, column), lanes)
                    up = self.floats(self.at(x, gates, width, column), lanes)
                    silu = self.rounded(b.fmul(gate, self.sigmoid(gate)))
                    self.put(b.fmul(silu, up), self.at(out, b.mul(token, width), column))
        return function


class _Turn(Writer):
    def __init__(self, kind: Kind, bf16: bool) -> None:
        super().__init__(TurnTask, kind, bf16)
        turn = self._turn()
        with self.function("run"):
            self.run(turn)

    def _turn(self) -> ir.Function:
        with self.function("turn") as function:
            b, lanes, width, apart = self.b, self.kind.lanes, self.count("width"), self.count("apart")
            heads, key_heads = self.count("heads"), self.count("key_heads")
            x, keys, values = (self.array(name, self.number) for name in ("x", "keys", "values"))
            whole = b.mul(b.add(heads, b.mul(key_heads, I64(2))), width)
            with self.shared(1, self.count("tokens")) as (token, _):
                row, number = b.sdiv(token, apart), b.srem(token, apart)
                queries = self.at(x, b.mul(token, whole))
                with self.loop(I64(0), heads) as head:
                    query = self.at(queries, b.mul(head, width))
                    self._turned(query, query, token)
                place = b.mul(b.add(self.count("begin"), number), width)
                with self.loop(I64(0), key_heads) as head:
                    key = self.at(queries, b.mul(b.add(heads, head), width))
                    value = self.at(key, b.mul(key_heads, width))
                    line = b.mul(b.mul(b.add(b.mul(row, key_heads), head), self.count("room")), width)
                    self._turned(key, self.at(keys, line, place), token)
                    with self.loop(I64(0), width, lanes) as start:
                        self.put(self.floats(self.at(value, start), lanes), self.at(values, line, place, start))
        return function

    def _turned(self, head: Value, to: Value, token: Value) -> None:
        """Each number of a head's first half is turned with one of the second."""
        b, lanes = self.b, self.kind.lanes
        half = b.sdiv(self.count("width"), I64(2))
        with self.loop(I64(0), half, lanes) as start:
            cos, sin = (
                self.floats(self.at(self.array(name, self.number), b.mul(token, half), start), lanes)
                for name in ("cos", "sin")
            )
            first, second = (self.floats(self.at(head, begin, start), lanes) for begin in (I64(0), half))
            self.put(b.fsub(b.fmul(first, cos), b.fmul(second, sin)), self.at(to, start))
            self.put(b.fadd(b.fmul(second, cos), b.fmul(first, sin)), self.at(to, half, start))
