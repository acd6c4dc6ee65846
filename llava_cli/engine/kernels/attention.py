"""Attention of one token of each row to those before it: a step of an answer.

Keys and values are read once, in the order in which they stand, as fast as memory gives them; what torch has for it
reads them at half of that on a CPU without AMX. All is computed in fp32.
"""

from __future__ import annotations

from functools import reduce

from llvmlite import ir

from llava_cli.engine.kernels import SPARE
from llava_cli.engine.kernels.writer import F32, I8, I32, I64, Kind, Value, Writer, many, task

_AHEAD = 8192
"""Bytes ahead of what is read that memory is told of."""
_TOKENS = 4
"""Whose scores are computed together."""
_SUMS = 8
"""Registers for sums of values, at a time."""
_LEAST = -3e38

Task = task(
    ("query", "out", "keys", "values", "mask", "scaled", "scores"),
    ("items", "heads", "each", "room", "tokens", "threads", "next"),
)
"""query, out [rows, heads, each, width], of `each` query heads that share one of keys; keys, values [rows, heads, room,
width], of whose room the first `tokens` count; mask [rows, tokens] in bytes, 0 where nothing is seen. Room in fp32 for
the query, scaled, and scores [rows, heads, each, tokens + SPARE]. There are as many items as rows times heads.
"""


def write(kind: Kind, bf16: bool, width: int, scaling: float) -> str:
    return str(_Attention(kind, bf16, width, scaling).module)


class _Attention(Writer):
    def __init__(self, kind: Kind, bf16: bool, width: int, scaling: float) -> None:
        super().__init__(Task, kind, bf16)
        self._width, self._scaling, self._starts = width, scaling, range(0, width, kind.lanes)
        attend = self._attend()
        with self.function("run"):
            self.run(attend)

    def _attend(self) -> ir.Function:
        with self.function("attend") as function:
            b, lanes, width = self.b, self.kind.lanes, I64(self._width)
            self._vector = ir.VectorType(F32, lanes)
            self._best, self._total = b.alloca(self._vector), b.alloca(self._vector)
            self._sums = [b.alloca(self._vector) for _ in self._starts[:_SUMS]]
            query, out, keys, values = (self.array(name, self.number) for name in ("query", "out", "keys", "values"))
            mask, scaled, scores = self.array("mask", I8), self.array("scaled", F32), self.array("scores", F32)
            each, tokens = self.count("each"), self.count("tokens")
            long = b.add(tokens, I64(SPARE))
            with self.shared(1, self.count("items")) as (item, _):
                its_mask = self.at(mask, b.mul(b.sdiv(item, self.count("heads")), tokens))
                first = self._first_seen(its_mask, tokens)
                before = b.mul(b.mul(item, self.count("room")), width)
                its_keys, its_values = self.at(keys, before), self.at(values, before)
                heads = b.mul(item, each)
                with self.loop(I64(0), each) as head:
                    place = b.mul(b.add(heads, head), width)
                    for start in self._starts:
                        numbers = self.floats(self.at(query, place, I64(start)), lanes)
                        numbers = b.fmul(numbers, many(self._scaling, F32, lanes))
                        self.write(numbers, self.at(scaled, place, I64(start)))
                begin = first
                for size in (_TOKENS, 1):
                    end = b.sub(tokens, b.srem(b.sub(tokens, begin), I64(size)))
                    with self.loop(begin, end, size) as token:
                        self.prefetch(self.at(its_keys, b.mul(token, width)), size * self._width * self.bytes, _AHEAD)
                        with self.loop(I64(0), each) as head:
                            number = b.add(heads, head)
                            line = self.at(scores, b.mul(number, long), token)
                            asked = self.at(scaled, b.mul(number, width))
                            self._score(
                                asked, self.at(its_keys, b.mul(token, width)), self.at(its_mask, token), line, size
                            )
                    begin = end
                with self.loop(I64(0), each) as head:
                    number = b.add(heads, head)
                    line = self.at(scores, b.mul(number, long))
                    self._share(line, first, tokens)
                    self._sum(line, its_values, first, tokens, self.at(out, b.mul(number, width)))
        return function

    def _first_seen(self, mask: Value, tokens: Value) -> Value:
        """The first token that is seen, behind padding."""
        b, before = self.b, self.b.block
        head, body, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        number = b.phi(I64)
        number.add_incoming(I64(0), before)
        b.cbranch(b.icmp_signed("<", b.add(number, I64(1)), tokens), body, after)
        b.position_at_end(body)
        number.add_incoming(b.add(number, I64(1)), body)
        b.cbranch(b.icmp_signed("==", b.load(self.at(mask, number)), I8(0)), head, after)
        b.position_at_end(after)
        return number

    def _score(self, asked: Value, keys: Value, mask: Value, scores: Value, count: int) -> None:
        """A scaled query times the keys of so many tokens."""
        b, lanes = self.b, self.kind.lanes
        sums = [many(0.0, F32, lanes)] * count
        for start in self._starts:
            numbers = self.read(self.at(asked, I64(start)), F32, lanes)
            for i in range(count):
                key = self.floats(self.at(keys, I64(i * self._width + start)), lanes)
                sums[i] = self.fma(key, numbers, sums[i])
        for i, products in enumerate(sums):
            hidden = b.icmp_signed("==", b.load(self.at(mask, I64(i))), I8(0))
            b.store(b.select(hidden, F32(_LEAST), self.sum(products)), self.at(scores, I64(i)))

    def _share(self, scores: Value, first: Value, tokens: Value) -> None:
        """Makes shares of scores: e to the power of each, over the sum of all, which is kept for later."""
        b, lanes = self.b, self.kind.lanes
        least, name = many(_LEAST, F32, lanes), f"llvm.maximum.v{lanes}f32"
        for start in range(0, SPARE, lanes):
            self.write(least, self.at(scores, tokens, I64(start)))
        b.store(least, self._best)
        b.store(many(0.0, F32, lanes), self._total)
        with self.loop(first, tokens, lanes) as token:
            its = self.read(self.at(scores, token), F32, lanes)
            b.store(self.call(name, self._vector, b.load(self._best), its), self._best)
        best = self.call(f"llvm.vector.reduce.fmaximum.v{lanes}f32", F32, b.load(self._best))
        best = self.spread(best, lanes)
        with self.loop(first, tokens, lanes) as token:
            place = self.at(scores, token)
            share = self._power(b.fsub(self.read(place, F32, lanes), best))
            self.write(share, place)
            b.store(b.fadd(b.load(self._total), share), self._total)

    def _power(self, x: Value) -> Value:
        """e to the power of x, which is 0 or less; to 1e-7 of it (Cephes' expf)."""
        b, lanes = self.b, self.kind.lanes
        x = self.call(f"llvm.maximum.v{lanes}f32", self._vector, x, many(-87.0, F32, lanes))
        twos = self.call(f"llvm.rint.v{lanes}f32", self._vector, b.fmul(x, many(1.4426950408889634, F32, lanes)))
        rest = self.fma(twos, many(-0.693359375, F32, lanes), x)
        rest = self.fma(twos, many(2.12194440e-4, F32, lanes), rest)
        terms = [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5, 1.0, 1.0]
        found = reduce(
            lambda sum_, term: self.fma(sum_, rest, many(term, F32, lanes)), terms[1:], many(terms[0], F32, lanes)
        )
        whole = b.add(b.fptosi(twos, ir.VectorType(I32, lanes)), many(127, I32, lanes))
        return b.fmul(found, self.as_(b.shl(whole, many(23, I32, lanes)), F32, lanes))

    def _sum(self, shares: Value, values: Value, first: Value, tokens: Value, out: Value) -> None:
        """Values times their shares."""
        b, lanes = self.b, self.kind.lanes
        worth = self.spread(b.fdiv(F32(1.0), self.sum(b.load(self._total))), lanes)
        for part in range(0, len(self._starts), _SUMS):
            starts = self._starts[part : part + _SUMS]
            for place in self._sums:
                b.store(many(0.0, F32, lanes), place)
            with self.loop(first, tokens) as token:
                share = self.spread(b.load(self.at(shares, token)), lanes)
                line = self.at(values, b.mul(token, I64(self._width)))
                self.prefetch(self.at(line, I64(starts[0])), len(starts) * lanes * self.bytes, _AHEAD)
                for start, place in zip(starts, self._sums, strict=False):
                    its = self.floats(self.at(line, I64(start)), lanes)
                    b.store(self.fma(its, share, b.load(place)), place)
            for start, place in zip(starts, self._sums, strict=False):
                self.put(b.fmul(b.load(place), worth), self.at(out, I64(start)))
