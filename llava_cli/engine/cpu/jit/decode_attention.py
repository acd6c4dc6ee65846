"""Attention of one token of each row to those before it: a step of an answer.

Keys and values are read once, in the order in which they stand, as fast as memory gives them; what torch has for it
reads them at half of that on a CPU without AMX. All is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

from llvmlite import ir

from llava_cli.engine.cpu.jit import SPARE
from llava_cli.engine.cpu.jit.builder import F32, I8, I64, LEAST, Kind, Value, Writer, many, task

_AHEAD = 8192
"""Bytes ahead of what is read that memory is told of."""
_TOKENS = 4
"""Whose scores are computed together."""
_SUMS = 8
"""Registers for sums of values, at a time."""

Task = task(
    ("query", "out", "keys", "values", "mask", "scaled", "scores", "cos", "sin"),
    ("items", "heads", "each", "room", "tokens", "threads", "next"),
)
"""query, out [rows, heads, each, width], of `each` query heads that share one of keys; keys, values [rows, heads, room,
width], of whose room the first `tokens` count; mask [rows, tokens] in bytes, 0 where nothing is seen. Room in fp32 for
the query, scaled, and scores [rows, heads, each, tokens + SPARE]. There are as many items as rows times heads.

Where it turns, query is what comes of a product, [rows, all heads, width]: those of queries, of keys and of values.
Each of the first two is turned by its row's angles, cos and sin [rows, width / 2], and keys and values are put where
the last ones belong.
"""


def write(kind: Kind, bf16: bool, width: int, scaling: float, turns: bool = False) -> str:
    return str(_Attention(kind, bf16, width, scaling, turns).module)


class _Attention(Writer):
    def __init__(self, kind: Kind, bf16: bool, width: int, scaling: float, turns: bool) -> None:
        super().__init__(Task, kind, bf16)
        self._width, self._scaling, self._turns = width, scaling, turns
        self._starts = range(0, width, kind.lanes)
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
            each, tokens, heads = self.count("each"), self.count("tokens"), self.count("heads")
            long, queries = b.add(tokens, I64(SPARE)), b.mul(heads, each)
            whole = b.add(queries, b.mul(heads, I64(2 * self._turns)))  # heads of a row
            with self.shared(1, self.count("items")) as (item, _):
                row, head = b.sdiv(item, heads), b.srem(item, heads)
                its_mask = self.at(mask, b.mul(row, tokens))
                first = self._first_seen(its_mask, tokens)
                before = b.mul(b.mul(item, self.count("room")), width)
                its_keys, its_values = self.at(keys, before), self.at(values, before)
                sources = self.at(query, b.mul(b.mul(row, whole), width))
                if self._turns:
                    last = b.mul(b.sub(tokens, I64(1)), width)
                    key = self.at(sources, b.mul(b.add(queries, head), width))
                    for start, numbers in self._turned(key, row):
                        self.put(numbers, self.at(its_keys, last, I64(start)))
                    value = self.at(key, b.mul(heads, width))
                    for start in self._starts:
                        self.put(self.floats(self.at(value, I64(start)), lanes), self.at(its_values, last, I64(start)))
                first_query, numbers_of = b.mul(item, each), self._turned if self._turns else self._given
                with self.loop(I64(0), each) as number:
                    asked = self.at(sources, b.mul(b.add(b.mul(head, each), number), width))
                    to = self.at(scaled, b.mul(b.add(first_query, number), width))
                    for start, numbers in numbers_of(asked, row):
                        self.write(b.fmul(numbers, many(self._scaling, F32, lanes)), self.at(to, I64(start)))
                begin = first
                for size in (_TOKENS, 1):
                    end = b.sub(tokens, b.srem(b.sub(tokens, begin), I64(size)))
                    with self.loop(begin, end, size) as token:
                        self.prefetch(self.at(its_keys, b.mul(token, width)), size * self._width * self.bytes, _AHEAD)
                        with self.loop(first_query, b.add(first_query, each)) as number:
                            line = self.at(scores, b.mul(number, long), token)
                            asked = self.at(scaled, b.mul(number, width))
                            self._score(
                                asked, self.at(its_keys, b.mul(token, width)), self.at(its_mask, token), line, size
                            )
                    begin = end
                with self.loop(first_query, b.add(first_query, each)) as number:
                    line = self.at(scores, b.mul(number, long))
                    for start in range(0, SPARE, lanes):
                        self.write(many(LEAST, F32, lanes), self.at(line, tokens, I64(start)))
                    self.share(line, first, tokens, self._best, self._total)
                    self._sum(line, its_values, first, tokens, self.at(out, b.mul(number, width)))
        return function

    def _given(self, line: Value, row: Value) -> Iterator[tuple[int, Value]]:
        """A head's numbers, and where they begin."""
        for start in self._starts:
            yield start, self.floats(self.at(line, I64(start)), self.kind.lanes)

    def _turned(self, line: Value, row: Value) -> Iterator[tuple[int, Value]]:
        """The same, each of the first half turned with one of the second."""
        b, lanes, half = self.b, self.kind.lanes, self._width // 2
        angles = b.mul(row, I64(half))
        for start in range(0, half, lanes):
            cos, sin = (
                self.floats(self.at(self.array(name, self.number), angles, I64(start)), lanes)
                for name in ("cos", "sin")
            )
            first, second = (self.floats(self.at(line, I64(start + begin)), lanes) for begin in (0, half))
            yield start, b.fsub(b.fmul(first, cos), b.fmul(second, sin))
            yield half + start, b.fadd(b.fmul(second, cos), b.fmul(first, sin))

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
            b.store(b.select(hidden, F32(LEAST), self.sum(products)), self.at(scores, I64(i)))

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
