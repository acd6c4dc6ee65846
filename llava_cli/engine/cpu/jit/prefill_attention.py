"""Attention of a prompt's tokens, or of a picture's patches, to each other.

Some queries at a time, so that their scores stay in the processor's cache; what torch has for it keeps them all, or is
made for other CPUs. Keys are turned over once for each head, for then a register has scores of as many keys as it has
lanes, and nothing is summed across it. All is computed in fp32.
"""

from __future__ import annotations

import itertools

from llvmlite import ir

from llava_cli.engine.cpu.jit import QUERIES
from llava_cli.engine.cpu.jit.builder import F32, I8, I32, I64, LEAST, Kind, Value, Writer, many, task

Task = task(
    ("query", "out", "keys", "values", "mask", "room"),
    (
        *("heads", "each", "together", "items", "queries", "tokens", "padded", "causal"),
        *("query_row", "query_head", "query_token", "key_row", "key_head", "key_token", "mask_row", "mask_query"),
        *("threads", "next", "slot"),
    ),
)
"""query [rows, heads, queries, width] and keys and values [rows, key heads, tokens, width] are wherever their strides
say, counted in numbers, and both of the latter alike; `each` query heads share one of keys. out [rows, queries, heads,
width] in one piece. mask in bytes, 0 where nothing is seen, has room for `padded` tokens, a multiple of any register's
lanes. `causal` is 1 where queries are the last tokens and see none that come after them.

An item is as many heads of a row as are taken `together`, which share their keys. In room in fp32 each thread has keys
[width, padded], scores [QUERIES, padded] and queries [QUERIES, width].
"""


def write(kind: Kind, bf16: bool, width: int, scaling: float) -> str:
    return str(_Prompts(kind, bf16, width, scaling).module)


class _Prompts(Writer):
    def __init__(self, kind: Kind, bf16: bool, width: int, scaling: float) -> None:
        super().__init__(Task, kind, bf16)
        self._width, self._scaling, self._starts = width, scaling, range(0, width, kind.lanes)
        self._vector = ir.VectorType(F32, kind.lanes)
        self._most, self._blocks = (QUERIES, (3, 1)) if kind.lanes == 16 else (QUERIES // 2, (2, 1))
        """Queries at a time, and registers of keys that they are multiplied by, or of values that are summed."""
        attend = self._attend()
        with self.function("run"):
            self.store("slot", 0)
            self.run(attend)

    def _attend(self) -> ir.Function:
        with self.function("attend") as function:
            b, width = self.b, I64(self._width)
            self._sums = [[b.alloca(self._vector) for _ in range(self._blocks[0])] for _ in range(self._most)]
            self._best, self._total = b.alloca(self._vector), b.alloca(self._vector)
            self._worth = b.gep(b.alloca(ir.ArrayType(F32, QUERIES)), [I32(0), I32(0)])
            self._tokens, self._padded = self.count("tokens"), self.count("padded")
            size = b.add(b.mul(self._padded, I64(self._width + QUERIES)), I64(QUERIES * self._width))
            slot = b.atomic_rmw("add", self._field("slot"), I64(1), "monotonic")
            self._turned = self.at(self.array("room", F32), b.mul(slot, size))
            self._scores = self.at(self._turned, b.mul(self._padded, width))
            self._scaled = self.at(self._scores, b.mul(self._padded, I64(QUERIES)))
            heads, together, queries = self.count("heads"), self.count("together"), self.count("queries")
            parts = b.sdiv(heads, together)
            with self.shared(1, self.count("items")) as (item, _):
                row, head = b.sdiv(item, parts), b.mul(b.srem(item, parts), together)
                key_head = b.sdiv(head, self.count("each"))
                at = self._place(row, "key_row", key_head, "key_head")
                self._keys = self.at(self.array("keys", self.number), at)
                self._values = self.at(self.array("values", self.number), at)
                self._turn()
                with self.loop(head, b.add(head, together)) as its:
                    query = self.at(self.array("query", self.number), self._place(row, "query_row", its, "query_head"))
                    for begin, end, size in self.groups(queries, (self._most, 1)):
                        with self.loop(begin, end, size) as number:
                            mask = self.at(self.array("mask", I8), self._place(row, "mask_row", number, "mask_query"))
                            self._of_queries(query, number, mask, size)
                            first = b.mul(b.add(b.mul(b.add(b.mul(row, queries), number), heads), its), width)
                            out = self.at(self.array("out", self.number), first)
                            self._sum(number, out, b.mul(heads, width), size)
        return function

    def _place(self, one: Value, stride: str, other: Value, its: str) -> Value:
        return self.b.add(self.b.mul(one, self.count(stride)), self.b.mul(other, self.count(its)))

    def _turn(self) -> None:
        """Keys [tokens, width] -> [width, tokens]."""
        b, lanes = self.b, self.kind.lanes
        with self.loop(I64(0), self._tokens) as token:
            key = self.at(self._keys, b.mul(token, self.count("key_token")))
            for start in self._starts:
                numbers = self.floats(self.at(key, I64(start)), lanes)
                for i in range(lanes):
                    line = b.mul(self._padded, I64(start + i))
                    b.store(b.extract_element(numbers, I32(i)), self.at(self._turned, line, token))

    def _limit(self, number: Value) -> Value:
        """How many tokens a query sees: all, or those up to itself."""
        b = self.b
        before = b.add(b.sub(self._tokens, self.count("queries")), b.add(number, I64(1)))
        return b.select(b.icmp_signed("==", self.count("causal"), I64(1)), before, self._tokens)

    def _of_queries(self, query: Value, first: Value, mask: Value, count: int) -> None:
        """The shares of so many queries, and their totals."""
        b, lanes, width = self.b, self.kind.lanes, self._width
        for i in range(count):
            its = self.at(query, b.mul(b.add(first, I64(i)), self.count("query_token")))
            for start in self._starts:
                numbers = b.fmul(self.floats(self.at(its, I64(start)), lanes), many(self._scaling, F32, lanes))
                self.write(numbers, self.at(self._scaled, I64(i * width + start)))
        last = self._limit(b.add(first, I64(count - 1)))
        registers = b.sdiv(b.add(last, I64(lanes - 1)), I64(lanes))
        for begin, end, size in self.groups(registers, self._blocks):
            with self.loop(begin, end, size) as register:
                self._score(first, b.mul(register, I64(lanes)), mask, count, size)
        with self.loop(I64(0), I64(count)) as number:
            scores = self.at(self._scores, b.mul(self._padded, number))
            self.share(scores, I64(0), b.mul(registers, I64(lanes)), self._best, self._total)
            b.store(b.fdiv(F32(1.0), self.sum(b.load(self._total))), self.at(self._worth, number))

    def _score(self, first: Value, token: Value, mask: Value, count: int, size: int) -> None:
        """Scores of so many queries with so many registers of keys, from `token` on."""
        b, lanes = self.b, self.kind.lanes
        sums = [places[:size] for places in self._sums[:count]]
        for place in itertools.chain(*sums):
            b.store(many(0.0, F32, lanes), place)
        with self.loop(I64(0), I64(self._width)) as column:
            line = self.at(self._turned, b.mul(column, self._padded), token)
            keys = [self.read(self.at(line, I64(j * lanes)), F32, lanes) for j in range(size)]
            for i, its in enumerate(sums):
                asked = self.spread(b.load(self.at(self._scaled, column, I64(i * self._width))), lanes)
                for key, place in zip(keys, its, strict=True):
                    b.store(self.fma(asked, key, b.load(place)), place)
        numbers = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        for i, its in enumerate(sums):
            limit = self.spread(b.trunc(self._limit(b.add(first, I64(i))), I32), lanes)
            line = b.mul(self.count("mask_query"), I64(i))
            for j, place in enumerate(its):
                at = b.add(token, I64(j * lanes))
                before = b.icmp_signed("<", b.add(numbers, self.spread(b.trunc(at, I32), lanes)), limit)
                shown = b.icmp_unsigned("!=", self.read(self.at(mask, line, at), I8, lanes), many(0, I8, lanes))
                score = b.select(b.and_(before, shown), b.load(place), many(LEAST, F32, lanes))
                self.write(score, self.at(self._scores, b.mul(self._padded, I64(i)), at))

    def _sum(self, first: Value, out: Value, apart: Value, count: int) -> None:
        """Values times their shares, of so many queries."""
        b, lanes = self.b, self.kind.lanes
        last = self._limit(b.add(first, I64(count - 1)))
        worth = [self.spread(b.load(self.at(self._worth, I64(i))), lanes) for i in range(count)]
        starts = list(self._starts)
        while starts:
            size = next(size for size in self._blocks if size <= len(starts))
            some, starts = starts[:size], starts[size:]
            sums = [places[:size] for places in self._sums[:count]]
            for place in itertools.chain(*sums):
                b.store(many(0.0, F32, lanes), place)
            with self.loop(I64(0), last) as token:
                value = self.at(self._values, b.mul(token, self.count("key_token")))
                numbers = [self.floats(self.at(value, I64(start)), lanes) for start in some]
                for i, its in enumerate(sums):
                    share = self.spread(b.load(self.at(self._scores, b.mul(self._padded, I64(i)), token)), lanes)
                    for number, place in zip(numbers, its, strict=True):
                        b.store(self.fma(share, number, b.load(place)), place)
            for i, its in enumerate(sums):
                for start, place in zip(some, its, strict=True):
                    found = b.fmul(b.load(place), worth[i])
                    self.put(found, self.at(out, b.mul(apart, I64(i)), I64(start)))
