"""A product with weights in 4 or 8 bits, written for LLVM, which makes machine code of it for the CPU at hand.

Weights are made whole numbers of 8 bits as they are read, in registers, and each token's activations before that, 64
at a time. Products of the two are summed in 32 bits over such a block, and blocks in fp32. With VNNI 64 products are
one instruction, with AVX2 32 are three.

Weights stand in tiles of 16 rows, and a tile in blocks of 64 columns. In a block 4 columns follow each other for each
of the 16 rows, which is what those instructions sum up; in 4 bits a byte has those of 8 columns, the first four's in
its lower half. So a row's sum stays in its lane, and all are scaled once a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, reduce

from llvmlite import ir

from llava_cli.engine.cpu.jit import BLOCK, TILE_ROWS
from llava_cli.engine.cpu.jit.builder import F16, F32, I8, I16, I32, I64, Kind, Value, Writer, many, task

CHUNK = 4
"""Tiles that a thread takes at a time; they stay in its cache for all tokens."""
AHEAD = 4096
"""Bytes ahead of what is read that memory is told of: 25 GB/s instead of 17, where torch's own sum reads 22."""
_ASKING = 8
"""Tokens up to which that is worth its instructions."""
_ALONE = 8
"""Tokens up to which one thread makes whole numbers of their activations: to start the others takes as long."""

_LEAST = 1e-30
"""Size of a block of activations; less is none."""


POINTERS = ("x", "out", "weights", "scales", "codes", "worth", "bias", "numbers", "sizes", "minus")
COUNTS = ("tokens", "tiles", "blocks", "threads", "next")
"""What a task is, 8 bytes each.

x [tokens, inputs] and out [tokens, rows], in bf16 or both in fp32; weights [tiles, blocks, 64 columns of 16 rows];
scales of 4-bit ones [tiles, blocks, rows of a tile] in fp16, and what their 4 bits mean, codes [16] in 8; what one of
a row is worth [rows], and a bias [rows], in fp32. Room for numbers [tokens, blocks, 64] in 8 bits, sizes [tokens,
blocks] in fp32 and minus [tokens, blocks] in 32. Threads to use, and the next token or tile that nobody has taken.
"""


Task = task(POINTERS, COUNTS)


def write(kind: Kind, bf16: bool, bits: int) -> str:
    """The module for weights of so many `bits`."""
    return str(_Tiles(kind, bf16, bits).module)


class _Tiles(Writer):
    def __init__(self, kind: Kind, bf16: bool, bits: int) -> None:
        super().__init__(Task, kind, bf16)
        self._bits = bits
        # AVX2 multiplies what has no sign by what has one: in 8 bits the weights' signs go to the activations.
        self._signed = bits == 8 and not kind.vnni
        self._zero = 0 if self._signed else kind.levels + 1
        rounding, multiplying = self._rounding(), self._multiplying()
        with self.function("run") as run:
            few = self.b.icmp_signed("<=", self.count("tokens"), I64(_ALONE))
            with self.b.if_else(few) as (alone, together):
                with alone:
                    self.store("next", 0)
                    self.b.call(rounding, run.args)
                with together:
                    self.run(rounding)
            self.run(multiplying)

    def _rounding(self) -> ir.Function:
        """Makes whole numbers of activations, each block's largest one 127."""
        with self.function("round") as function:
            b, lanes = self.b, ir.VectorType(F32, 16)
            x, numbers = self.array("x", self.number), self.array("numbers", I8)
            sizes, minus, blocks = self.array("sizes", F32), self.array("minus", I32), self.count("blocks")
            ends = self.groups(self.count("tokens"), self.kind.groups)
            with self.shared(1, self.count("tokens")) as (token, _):
                first, size = token, I64(1)  # of its group
                for begin, end, its in reversed(ends):
                    here = b.icmp_signed("<", token, end)
                    first = b.select(here, b.sub(token, b.srem(b.sub(token, begin), I64(its))), first)
                    size = b.select(here, I64(its), size)
                line = b.add(b.mul(first, blocks), b.sub(token, first))
                with self.loop(I64(0), blocks) as block:
                    place = self.at(x, b.mul(b.add(b.mul(token, blocks), block), I64(BLOCK)))
                    parts = [self.floats(self.at(place, I64(begin)), 16) for begin in range(0, BLOCK, 16)]
                    # Of all of them maximum, and not maxnum: what is no number makes none of all.
                    sides = [self.call("llvm.fabs.v16f32", lanes, part) for part in parts]
                    largest = reduce(partial(self.call, "llvm.maximum.v16f32", lanes), sides)
                    largest = self.call("llvm.vector.reduce.fmaximum.v16f32", F32, largest)
                    some = b.select(b.fcmp_ordered(">", largest, F32(_LEAST)), largest, F32(_LEAST))
                    worth = self.spread(b.fdiv(F32(127.0), some), 16)
                    whole = [self.call("llvm.rint.v16f32", lanes, b.fmul(part, worth)) for part in parts]
                    whole = [b.fptosi(part, ir.VectorType(I32, 16)) for part in whole]
                    to = b.add(line, b.mul(block, size))
                    for begin, part in zip(range(0, BLOCK, 16), whole, strict=True):
                        eight = b.trunc(part, ir.VectorType(I8, 16))
                        self.write(eight, self.at(numbers, b.mul(to, I64(BLOCK)), I64(begin)))
                    b.store(b.fdiv(largest, F32(127.0)), self.at(sizes, to))
                    total = self.call("llvm.vector.reduce.add.v16i32", I32, reduce(b.add, whole))
                    b.store(b.mul(total, I32(-self._zero)), self.at(minus, to))
        return function

    def _multiplying(self) -> ir.Function:
        """All tokens with one chunk of tiles after the other."""
        with self.function("multiply_tiles") as function:
            b = self.b
            sums = [b.alloca(ir.VectorType(F32, self.kind.lanes)) for _ in range(self.kind.groups[0])]
            names = {"out": self.number, "weights": I8, "scales": F16, "codes": I8}
            names |= {"worth": F32, "bias": F32, "numbers": I8, "sizes": F32, "minus": I32}
            self._arrays = {name: self.array(name, kind) for name, kind in names.items()}
            self._blocks, self._rows = self.count("blocks"), b.mul(self.count("tiles"), I64(TILE_ROWS))
            ends = self.groups(self.count("tokens"), self.kind.groups)
            with self.shared(CHUNK, self.count("tiles")) as (first, end):
                for begin, to, size in ends:
                    with self.loop(begin, to, size) as token, self.loop(first, end) as tile:
                        for half in range(TILE_ROWS // self.kind.lanes):
                            self._tile(tile, half, token, sums[:size])
        return function

    def _tile(self, tile: Value, half: int, token: Value, sums: list[Value]) -> None:
        """So many tokens, from `token` on, with as many of a tile's rows as there are lanes."""
        b, lanes, its = self.b, self.kind.lanes, self._arrays
        kind, size = ir.VectorType(F32, lanes), self._bits * BLOCK * TILE_ROWS // 8
        row = b.add(b.mul(tile, I64(TILE_ROWS)), I64(half * lanes))
        line = b.mul(token, self._blocks)
        for place in sums:
            b.store(many(0.0, F32, lanes), place)
        with self.loop(I64(0), self._blocks) as block:
            at = b.add(b.mul(tile, self._blocks), block)
            weights = self.at(its["weights"], b.mul(at, I64(size)))
            if len(sums) <= _ASKING and not half:
                self.prefetch(weights, size, AHEAD)
            group = b.add(line, b.mul(block, I64(len(sums))))
            numbers = self.at(its["numbers"], b.mul(group, I64(BLOCK)))
            begins = [b.load(self.at(its["minus"], group, I64(i))) for i in range(len(sums))]
            found = [self.spread(begin, lanes) for begin in begins]
            for column, whole in self._whole(weights, half):
                for i in range(len(found)):
                    place = b.bitcast(self.at(numbers, I64(BLOCK * i + column)), I32.as_pointer())
                    four = b.load(place, align=4)
                    found[i] = self._dot(found[i], whole, self.spread(four, lanes))
            scale = None
            if self._bits == 4:
                place = self.at(its["scales"], b.add(b.mul(at, I64(TILE_ROWS)), I64(half * lanes)))
                scale = b.fpext(self.read(place, F16, lanes), kind)
            for i, (whole, place) in enumerate(zip(found, sums, strict=True)):
                worth = self.spread(b.load(self.at(its["sizes"], group, I64(i))), lanes)
                if scale is not None:
                    worth = b.fmul(worth, scale)
                b.store(self.fma(b.sitofp(whole, kind), worth, b.load(place)), place)
        worth, bias = (self.read(self.at(its[name], row), F32, lanes) for name in ("worth", "bias"))
        for i, place in enumerate(sums):
            out = self.at(its["out"], b.mul(b.add(token, I64(i)), self._rows), row)
            self.put(self.fma(b.load(place), worth, bias), out)

    def _whole(self, weights: Value, half: int) -> Iterator[tuple[int, Value]]:
        """A block's columns, four at a time: the number of the first, and the weights of all rows in 8 bits."""
        b, size = self.b, 4 * self.kind.lanes
        starts = range(half * size, self._bits * BLOCK * TILE_ROWS // 8, 4 * TILE_ROWS)
        if self._bits == 8:
            for number, start in enumerate(starts):
                whole = self.read(self.at(weights, I64(start)), I8, size)
                yield 4 * number, whole if self._signed else b.xor(whole, many(-128, I8, size))
            return
        shuffle = "llvm.x86.avx512.pshuf.b.512" if size == 64 else "llvm.x86.avx2.pshuf.b"
        codes = self.read(self._arrays["codes"], I8, 16)
        every = ir.Constant(ir.VectorType(I32, size), [i % 16 for i in range(size)])
        codes = b.shuffle_vector(codes, ir.Constant(codes.type, ir.Undefined), every)
        for number, start in enumerate(starts):
            both = self.read(self.at(weights, I64(start)), I8, size)
            upper = b.lshr(self.as_(both, I16, size // 2), many(4, I16, size // 2))
            for part, four in enumerate((both, self.as_(upper, I8, size))):
                yield 8 * number + 4 * part, self.call(shuffle, codes.type, codes, b.and_(four, many(15, I8, size)))

    def _dot(self, found: Value, whole: Value, numbers: Value) -> Value:
        """What was found, and in each lane the sum of four products more."""
        b, lanes = self.b, self.kind.lanes
        if self.kind.vnni:
            name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
            return self.call(name, found.type, found, self.as_(whole, I32, lanes), numbers)
        numbers = self.as_(numbers, I8, 4 * lanes)
        if self._signed:
            numbers = self.call("llvm.x86.avx2.psign.b", whole.type, numbers, whole)
            whole = self.call("llvm.abs.v32i8", whole.type, whole, ir.Constant(ir.IntType(1), 0))
        pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 2 * lanes), whole, numbers)
        fours = self.call("llvm.x86.avx2.pmadd.wd", found.type, pairs, many(1, I16, 2 * lanes))
        return b.add(found, fours)
