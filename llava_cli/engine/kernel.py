"""A product with weights in 4 or 8 bits, written for LLVM, which makes machine code of it for the CPU at hand.

Weights are made whole numbers of 8 bits as they are read, in registers, and each token's activations before that, 64
at a time. Products of the two are summed in 32 bits over such a block, and blocks in fp32. With VNNI 64 products are
one instruction, with AVX2 32 are three.

Weights stand in tiles of 16 rows, and a tile in blocks of 64 columns. In a block 4 columns follow each other for each
of the 16 rows, which is what those instructions sum up; in 4 bits a byte has those of 8 columns, the first four's in
its lower half. So a row's sum stays in its lane, and all are scaled once a block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

from llvmlite import ir

BLOCK = 64
"""Columns that have one scale of 4-bit weights, and one size of a token's activations."""
ROWS = 16
"""Of a tile."""
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


@dataclass(frozen=True)
class Kind:
    """Of instructions: what a CPU must have for them, and what suits them."""

    name: str
    needs: tuple[str, ...]
    """In LLVM's names."""
    lanes: int
    """Numbers of 32 bits in a register."""
    groups: tuple[int, ...]
    """Tokens that are multiplied at once: as many as there are registers for, while so many are left."""
    vnni: bool
    levels: int
    """What a 4-bit weight of 1 becomes. AVX2 sums two products in 16 bits, and with 7 bits of a weight they fit."""


KINDS = (
    Kind("avx512vnni", ("avx512f", "avx512bw", "avx512vl", "avx512vnni"), 16, (10, 8, 4, 2, 1), True, 127),
    Kind("avxvnni", ("avx2", "fma", "f16c", "avxvnni"), 8, (8, 4, 2, 1), True, 127),
    Kind("avx2", ("avx2", "fma", "f16c"), 8, (8, 4, 2, 1), False, 63),
)
"""The best first."""

POINTERS = ("x", "out", "weights", "scales", "codes", "worth", "bias", "numbers", "sizes", "minus")
COUNTS = ("tokens", "tiles", "blocks", "threads", "next")
"""What a task is, 8 bytes each.

x [tokens, inputs] and out [tokens, rows], in bf16 or both in fp32; weights [tiles, blocks, 64 columns of 16 rows];
scales of 4-bit ones [tiles, blocks, rows of a tile] in fp16, and what their 4 bits mean, codes [16] in 8; what one of
a row is worth [rows], and a bias [rows], in fp32. Room for numbers [tokens, blocks, 64] in 8 bits, sizes [tokens,
blocks] in fp32 and minus [tokens, blocks] in 32. Threads to use, and the next token or tile that nobody has taken.
"""


class Task(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in POINTERS) + tuple((name, ctypes.c_int64) for name in COUNTS)


_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F16, _F32, _NONE = ir.HalfType(), ir.FloatType(), ir.VoidType()
Value = Any


def written(bits: int, bf16: bool, kind: Kind) -> str:
    """The module whose `multiply` does a task, of weights of so many `bits`."""
    return str(_Writer(bits, bf16, kind).module)


def _many(value: Any, kind: Any, lanes: int) -> Value:
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


class _Writer:
    def __init__(self, bits: int, bf16: bool, kind: Kind) -> None:
        self.module, self._bits, self._bf16, self._kind = ir.Module("products"), bits, bf16, kind
        # AVX2 multiplies what has no sign by what has one: in 8 bits the weights' signs go to the activations.
        self._signed = bits == 8 and not kind.vnni
        self._zero = 0 if self._signed else kind.levels + 1
        fields = [_I8.as_pointer()] * len(POINTERS) + [_I64] * len(COUNTS)
        self._task_type = ir.LiteralStructType(fields).as_pointer()
        rounding, multiplying = self._rounding(), self._multiplying()
        with self._function("multiply") as multiply:
            b, work = self.b, ir.FunctionType(_NONE, [self._task_type]).as_pointer()
            start = ir.FunctionType(_NONE, [work, self._task_type, _I32, _I32])
            in_threads = ir.Function(self.module, start, "GOMP_parallel")
            threads = b.trunc(self._count("threads"), _I32)
            self._set_next()
            with b.if_else(b.icmp_signed("<=", self._count("tokens"), _I64(_ALONE))) as (alone, together):
                with alone:
                    b.call(rounding, multiply.args)
                with together:
                    b.call(in_threads, [rounding, *multiply.args, threads, _I32(0)])
            self._set_next()
            b.call(in_threads, [multiplying, *multiply.args, threads, _I32(0)])

    # What the code is made of.

    @contextmanager
    def _function(self, name: str) -> Iterator[ir.Function]:
        """One that is given a task."""
        function = ir.Function(self.module, ir.FunctionType(_NONE, [self._task_type]), name)
        self.b, self._task = ir.IRBuilder(function.append_basic_block()), function.args[0]
        yield function
        self.b.ret_void()

    def _field(self, name: str) -> Value:
        number = (*POINTERS, *COUNTS).index(name)
        return self.b.gep(self._task, [_I32(0), _I32(number)], inbounds=True)

    def _count(self, name: str) -> Value:
        return self.b.load(self._field(name))

    def _array(self, name: str, kind: Any) -> Value:
        return self.b.bitcast(self.b.load(self._field(name)), kind.as_pointer())

    def _set_next(self) -> None:
        self.b.store(_I64(0), self._field("next"))

    @contextmanager
    def _loop(self, begin: Value, end: Value, step: int = 1) -> Iterator[Value]:
        """From `begin` to before `end`."""
        b, before = self.b, self.b.block
        head, body, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        number = b.phi(_I64)
        number.add_incoming(begin, before)
        b.cbranch(b.icmp_signed("<", number, end), body, after)
        b.position_at_end(body)
        yield number
        number.add_incoming(b.add(number, _I64(step)), b.block)
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def _shared(self, size: int, end: Value) -> Iterator[tuple[Value, Value]]:
        """Of so many the next few, from and to, that no thread has taken, until there are none."""
        b = self.b
        head, body, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        begin = b.atomic_rmw("add", self._field("next"), _I64(size), "monotonic")
        b.cbranch(b.icmp_signed("<", begin, end), body, after)
        b.position_at_end(body)
        yield begin, self._least(b.add(begin, _I64(size)), end)
        b.branch(head)
        b.position_at_end(after)

    def _least(self, x: Value, y: Value) -> Value:
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def _at(self, array: Value, *steps: Value) -> Value:
        """The place in an array that is the sum of steps away."""
        place = steps[0]
        for step in steps[1:]:
            place = self.b.add(place, step)
        return self.b.gep(array, [place], inbounds=True)

    def _read(self, place: Value, kind: Any, lanes: int) -> Value:
        vector = ir.VectorType(kind, lanes)
        return self.b.load(self.b.bitcast(place, vector.as_pointer()), align=1)

    def _write(self, vector: Value, place: Value) -> None:
        self.b.store(vector, self.b.bitcast(place, vector.type.as_pointer()), align=1)

    def _spread(self, value: Value, lanes: int) -> Value:
        """A vector that has it in each lane."""
        vector, nothing = ir.VectorType(value.type, lanes), ir.VectorType(_I32, lanes)
        first = self.b.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
        return self.b.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(nothing, None))

    def _call(self, name: str, kind: Any, *given: Value) -> Value:
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(kind, [value.type for value in given]), name)
        return self.b.call(function, given)

    def _as(self, vector: Value, kind: Any, lanes: int) -> Value:
        return self.b.bitcast(vector, ir.VectorType(kind, lanes))

    # What it does.

    def _rounding(self) -> ir.Function:
        """Makes whole numbers of activations, each block's largest one 127."""
        with self._function("round") as function:
            b, lanes = self.b, ir.VectorType(_F32, 16)
            x, numbers = self._array("x", _I16 if self._bf16 else _F32), self._array("numbers", _I8)
            sizes, minus, blocks = self._array("sizes", _F32), self._array("minus", _I32), self._count("blocks")
            ends = self._ends()
            with self._shared(1, self._count("tokens")) as (token, _):
                first, size = token, _I64(1)  # of its group
                for begin, end, its in reversed(ends):
                    here = b.icmp_signed("<", token, end)
                    first = b.select(here, b.sub(token, b.srem(b.sub(token, begin), _I64(its))), first)
                    size = b.select(here, _I64(its), size)
                line = b.add(b.mul(first, blocks), b.sub(token, first))
                with self._loop(_I64(0), blocks) as block:
                    place = self._at(x, b.mul(b.add(b.mul(token, blocks), block), _I64(BLOCK)))
                    parts = [self._floats(self._at(place, _I64(begin)), 16) for begin in range(0, BLOCK, 16)]
                    # Of all of them maximum, and not maxnum: what is no number makes none of all.
                    sides = [self._call("llvm.fabs.v16f32", lanes, part) for part in parts]
                    largest = reduce(partial(self._call, "llvm.maximum.v16f32", lanes), sides)
                    largest = self._call("llvm.vector.reduce.fmaximum.v16f32", _F32, largest)
                    some = b.select(b.fcmp_ordered(">", largest, _F32(_LEAST)), largest, _F32(_LEAST))
                    worth = self._spread(b.fdiv(_F32(127.0), some), 16)
                    whole = [self._call("llvm.rint.v16f32", lanes, b.fmul(part, worth)) for part in parts]
                    whole = [b.fptosi(part, ir.VectorType(_I32, 16)) for part in whole]
                    to = b.add(line, b.mul(block, size))
                    for begin, part in zip(range(0, BLOCK, 16), whole, strict=True):
                        eight = b.trunc(part, ir.VectorType(_I8, 16))
                        self._write(eight, self._at(numbers, b.mul(to, _I64(BLOCK)), _I64(begin)))
                    b.store(b.fdiv(largest, _F32(127.0)), self._at(sizes, to))
                    total = self._call("llvm.vector.reduce.add.v16i32", _I32, reduce(b.add, whole))
                    b.store(b.mul(total, _I32(-self._zero)), self._at(minus, to))
        return function

    def _floats(self, place: Value, lanes: int) -> Value:
        if not self._bf16:
            return self._read(place, _F32, lanes)
        halves = self.b.zext(self._read(place, _I16, lanes), ir.VectorType(_I32, lanes))
        return self._as(self.b.shl(halves, _many(16, _I32, lanes)), _F32, lanes)

    def _put(self, numbers: Value, place: Value) -> None:
        """Numbers in fp32 to where they are wanted; in bf16 what is between two goes to the even one."""
        if self._bf16:
            b, lanes = self.b, numbers.type.count
            whole = self._as(numbers, _I32, lanes)
            odd = b.and_(b.lshr(whole, _many(16, _I32, lanes)), _many(1, _I32, lanes))
            whole = b.add(whole, b.add(odd, _many(0x7FFF, _I32, lanes)))
            numbers = b.trunc(b.lshr(whole, _many(16, _I32, lanes)), ir.VectorType(_I16, lanes))
        self._write(numbers, place)

    def _multiplying(self) -> ir.Function:
        """All tokens with one chunk of tiles after the other."""
        with self._function("multiply_tiles") as function:
            b = self.b
            sums = [b.alloca(ir.VectorType(_F32, self._kind.lanes)) for _ in range(self._kind.groups[0])]
            names = {"x": _I8, "out": _I16 if self._bf16 else _F32, "weights": _I8, "scales": _F16, "codes": _I8}
            names |= {"worth": _F32, "bias": _F32, "numbers": _I8, "sizes": _F32, "minus": _I32}
            self._arrays = {name: self._array(name, kind) for name, kind in names.items()}
            self._blocks, self._rows = self._count("blocks"), b.mul(self._count("tiles"), _I64(ROWS))
            ends = self._ends()
            with self._shared(CHUNK, self._count("tiles")) as (first, end):
                for begin, to, size in ends:
                    with self._loop(begin, to, size) as token, self._loop(first, end) as tile:
                        for half in range(ROWS // self._kind.lanes):
                            self._tile(tile, half, token, sums[:size])
        return function

    def _ends(self) -> list[tuple[Value, Value, int]]:
        """From which token on, and up to which one, tokens are multiplied in groups of a size."""
        b, tokens, begin, ends = self.b, self._count("tokens"), _I64(0), []
        for size in self._kind.groups:
            end = b.sub(tokens, b.srem(b.sub(tokens, begin), _I64(size)))
            ends.append((begin, end, size))
            begin = end
        return ends

    def _tile(self, tile: Value, half: int, token: Value, sums: list[Value]) -> None:
        """So many tokens, from `token` on, with as many of a tile's rows as there are lanes."""
        b, lanes, its = self.b, self._kind.lanes, self._arrays
        kind, size = ir.VectorType(_F32, lanes), self._bits * BLOCK * ROWS // 8
        row = b.add(b.mul(tile, _I64(ROWS)), _I64(half * lanes))
        line = b.mul(token, self._blocks)
        for place in sums:
            b.store(_many(0.0, _F32, lanes), place)
        with self._loop(_I64(0), self._blocks) as block:
            at = b.add(b.mul(tile, self._blocks), block)
            weights = self._at(its["weights"], b.mul(at, _I64(size)))
            if len(sums) <= _ASKING and not half:
                for begin in range(0, size, 64):
                    soon = self._at(weights, _I64(AHEAD + begin))
                    self._call("llvm.prefetch.p0", _NONE, soon, _I32(0), _I32(3), _I32(1))
            group = b.add(line, b.mul(block, _I64(len(sums))))
            numbers = self._at(its["numbers"], b.mul(group, _I64(BLOCK)))
            begins = [b.load(self._at(its["minus"], group, _I64(i))) for i in range(len(sums))]
            found = [self._spread(begin, lanes) for begin in begins]
            for column, whole in self._whole(weights, half):
                for i in range(len(found)):
                    place = b.bitcast(self._at(numbers, _I64(BLOCK * i + column)), _I32.as_pointer())
                    four = b.load(place, align=4)
                    found[i] = self._dot(found[i], whole, self._spread(four, lanes))
            scale = None
            if self._bits == 4:
                place = self._at(its["scales"], b.add(b.mul(at, _I64(ROWS)), _I64(half * lanes)))
                scale = b.fpext(self._read(place, _F16, lanes), kind)
            for i, (whole, place) in enumerate(zip(found, sums, strict=True)):
                worth = self._spread(b.load(self._at(its["sizes"], group, _I64(i))), lanes)
                if scale is not None:
                    worth = b.fmul(worth, scale)
                more = b.fmul(b.sitofp(whole, kind), worth, flags=("contract",))
                b.store(b.fadd(b.load(place), more, flags=("contract",)), place)
        worth, bias = (self._read(self._at(its[name], row), _F32, lanes) for name in ("worth", "bias"))
        for i, place in enumerate(sums):
            out = self._at(its["out"], b.mul(b.add(token, _I64(i)), self._rows), row)
            self._put(b.fadd(b.fmul(b.load(place), worth, flags=("contract",)), bias, flags=("contract",)), out)

    def _whole(self, weights: Value, half: int) -> Iterator[tuple[int, Value]]:
        """A block's columns, four at a time: the number of the first, and the weights of all rows in 8 bits."""
        b, size = self.b, 4 * self._kind.lanes
        starts = range(half * size, self._bits * BLOCK * ROWS // 8, 4 * ROWS)
        if self._bits == 8:
            for number, start in enumerate(starts):
                whole = self._read(self._at(weights, _I64(start)), _I8, size)
                yield 4 * number, whole if self._signed else b.xor(whole, _many(-128, _I8, size))
            return
        shuffle = "llvm.x86.avx512.pshuf.b.512" if size == 64 else "llvm.x86.avx2.pshuf.b"
        codes = self._read(self._arrays["codes"], _I8, 16)
        every = ir.Constant(ir.VectorType(_I32, size), [i % 16 for i in range(size)])
        codes = b.shuffle_vector(codes, ir.Constant(codes.type, ir.Undefined), every)
        for number, start in enumerate(starts):
            both = self._read(self._at(weights, _I64(start)), _I8, size)
            upper = b.lshr(self._as(both, _I16, size // 2), _many(4, _I16, size // 2))
            for part, four in enumerate((both, self._as(upper, _I8, size))):
                yield 8 * number + 4 * part, self._call(shuffle, codes.type, codes, b.and_(four, _many(15, _I8, size)))

    def _dot(self, found: Value, whole: Value, numbers: Value) -> Value:
        """What was found, and in each lane the sum of four products more."""
        b, lanes = self.b, self._kind.lanes
        if self._kind.vnni:
            name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
            return self._call(name, found.type, found, self._as(whole, _I32, lanes), numbers)
        numbers = self._as(numbers, _I8, 4 * lanes)
        if self._signed:
            numbers = self._call("llvm.x86.avx2.psign.b", whole.type, numbers, whole)
            whole = self._call("llvm.abs.v32i8", whole.type, whole, ir.Constant(ir.IntType(1), 0))
        pairs = self._call("llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(_I16, 2 * lanes), whole, numbers)
        fours = self._call("llvm.x86.avx2.pmadd.wd", found.type, pairs, _many(1, _I16, 2 * lanes))
        return b.add(found, fours)
