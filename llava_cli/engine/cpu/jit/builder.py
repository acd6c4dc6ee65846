"""What kernels are written with: functions for LLVM that get one task, and share it between threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, NONE = ir.HalfType(), ir.FloatType(), ir.VoidType()
LEAST = -3e38
"""The score of what is not seen."""
Value = Any
"""Of LLVM: what an instruction makes."""


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


def task(pointers: Sequence[str], counts: Sequence[str]) -> type[ctypes.Structure]:
    """What a kernel is given a reference to: where things are, and how many there are."""
    fields = [(name, ctypes.c_void_p) for name in pointers] + [(name, ctypes.c_int64) for name in counts]
    return type("Task", (ctypes.Structure,), {"_fields_": fields})


def many(value: Any, kind: Any, lanes: int) -> Value:
    """A constant in each lane."""
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


class Writer:
    """Of a module whose `run` does a task; one for several threads counts `threads` and the `next` that is to be done.

    Numbers that it is given, and gives, are in bf16 or in fp32; it computes in fp32.
    """

    def __init__(self, task: type[ctypes.Structure], kind: Kind, bf16: bool) -> None:
        self.module, self.kind, self.bf16 = ir.Module("kernel"), kind, bf16
        self.number, self.bytes = (I16, 2) if bf16 else (F32, 4)
        self._names = [name for name, *_ in task._fields_]
        fields = [I8.as_pointer() if kind is ctypes.c_void_p else I64 for _, kind, *_ in task._fields_]
        self._task_type = ir.LiteralStructType(fields).as_pointer()

    def run(self, function: ir.Function) -> None:
        """Writes that all threads do this, with nothing taken of what they share."""
        work = ir.FunctionType(NONE, [self._task_type]).as_pointer()
        start = ir.FunctionType(NONE, [work, self._task_type, I32, I32])
        in_threads = self.module.globals.get("GOMP_parallel") or ir.Function(self.module, start, "GOMP_parallel")
        b, threads = self.b, self.count("threads")
        self.store("next", 0)
        with b.if_else(b.icmp_signed("==", threads, I64(1))) as (alone, together):
            with alone:
                b.call(function, [self._task])
            with together:
                b.call(in_threads, [function, self._task, b.trunc(threads, I32), I32(0)])

    @contextmanager
    def function(self, name: str) -> Iterator[ir.Function]:
        """One that is given a task."""
        function = ir.Function(self.module, ir.FunctionType(NONE, [self._task_type]), name)
        self.b, self._task = ir.IRBuilder(function.append_basic_block()), function.args[0]
        yield function
        self.b.ret_void()

    def _field(self, name: str) -> Value:
        return self.b.gep(self._task, [I32(0), I32(self._names.index(name))], inbounds=True)

    def count(self, name: str) -> Value:
        return self.b.load(self._field(name))

    def array(self, name: str, kind: Any) -> Value:
        return self.b.bitcast(self.b.load(self._field(name)), kind.as_pointer())

    def store(self, name: str, count: int) -> None:
        self.b.store(I64(count), self._field(name))

    @contextmanager
    def loop(self, begin: Value, end: Value, step: int = 1) -> Iterator[Value]:
        """From `begin` to before `end`."""
        b, before = self.b, self.b.block
        head, body, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        number = b.phi(I64)
        number.add_incoming(begin, before)
        b.cbranch(b.icmp_signed("<", number, end), body, after)
        b.position_at_end(body)
        yield number
        number.add_incoming(b.add(number, I64(step)), b.block)
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def shared(self, size: int, end: Value) -> Iterator[tuple[Value, Value]]:
        """Of so many the next few, from and to, that no thread has taken, until there are none."""
        b = self.b
        head, body, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        begin = b.atomic_rmw("add", self._field("next"), I64(size), "monotonic")
        b.cbranch(b.icmp_signed("<", begin, end), body, after)
        b.position_at_end(body)
        yield begin, self._least(b.add(begin, I64(size)), end)
        b.branch(head)
        b.position_at_end(after)

    def groups(self, end: Value, sizes: Sequence[int]) -> list[tuple[Value, Value, int]]:
        """All before `end` in groups, of the first size as long as there are so many: from, to, and size."""
        b, begin, groups = self.b, I64(0), []
        for size in sizes:
            to = b.sub(end, b.srem(b.sub(end, begin), I64(size)))
            groups.append((begin, to, size))
            begin = to
        return groups

    def _least(self, x: Value, y: Value) -> Value:
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def at(self, array: Value, *steps: Value) -> Value:
        """The place in an array that is the sum of steps away."""
        place = steps[0]
        for step in steps[1:]:
            place = self.b.add(place, step)
        return self.b.gep(array, [place])

    def read(self, place: Value, kind: Any, lanes: int) -> Value:
        vector = ir.VectorType(kind, lanes)
        return self.b.load(self.b.bitcast(place, vector.as_pointer()), align=1)

    def write(self, vector: Value, place: Value) -> None:
        self.b.store(vector, self.b.bitcast(place, vector.type.as_pointer()), align=1)

    def spread(self, value: Value, lanes: int) -> Value:
        """A vector that has it in each lane."""
        vector, nothing = ir.VectorType(value.type, lanes), ir.VectorType(I32, lanes)
        first = self.b.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
        return self.b.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(nothing, None))

    def call(self, name: str, kind: Any, *given: Value) -> Value:
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(kind, [value.type for value in given]), name)
        return self.b.call(function, given)

    def as_(self, vector: Value, kind: Any, lanes: int) -> Value:
        return self.b.bitcast(vector, ir.VectorType(kind, lanes))

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z"""
        return self.b.fadd(self.b.fmul(x, y, flags=("contract",)), z, flags=("contract",))

    def sum(self, vector: Value) -> Value:
        """Of all lanes, in fp32."""
        lanes = vector.type.count
        name = f"llvm.vector.reduce.fadd.v{lanes}f32"
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(F32, [F32, vector.type]), name)
        return self.b.call(function, [F32(-0.0), vector], fastmath=("reassoc",))

    def power(self, x: Value) -> Value:
        """e to the power of x, which is 0 or less; to 1e-7 of it (Cephes' expf)."""
        b, lanes = self.b, x.type.count
        x = self.call(f"llvm.maximum.v{lanes}f32", x.type, x, many(-87.0, F32, lanes))
        twos = self.call(f"llvm.rint.v{lanes}f32", x.type, b.fmul(x, many(1.4426950408889634, F32, lanes)))
        rest = self.fma(twos, many(-0.693359375, F32, lanes), x)
        rest = self.fma(twos, many(2.12194440e-4, F32, lanes), rest)
        terms = [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5, 1.0, 1.0]
        found = reduce(
            lambda sum_, term: self.fma(sum_, rest, many(term, F32, lanes)), terms[1:], many(terms[0], F32, lanes)
        )
        whole = b.add(b.fptosi(twos, ir.VectorType(I32, lanes)), many(127, I32, lanes))
        return b.fmul(found, self.as_(b.shl(whole, many(23, I32, lanes)), F32, lanes))

    def sigmoid(self, x: Value) -> Value:
        b, lanes = self.b, x.type.count
        one = many(1.0, F32, lanes)
        power = self.power(b.fneg(self.call(f"llvm.fabs.v{lanes}f32", x.type, x)))
        positive = b.fcmp_ordered(">=", x, many(0.0, F32, lanes))
        return b.fdiv(b.select(positive, one, power), b.fadd(one, power))

    def share(self, scores: Value, first: Value, end: Value, best: Value, total: Value) -> None:
        """Makes shares of scores: e to the power of each, less the largest; what they sum up to stays in `total`.

        A register at a time, in whose last one scores behind the `end` are `LEAST`; `best`, `total` have room for one.
        """
        b, lanes = self.b, self.kind.lanes
        vector, name = ir.VectorType(F32, lanes), f"llvm.maximum.v{lanes}f32"
        b.store(many(LEAST, F32, lanes), best)
        b.store(many(0.0, F32, lanes), total)
        with self.loop(first, end, lanes) as token:
            its = self.read(self.at(scores, token), F32, lanes)
            b.store(self.call(name, vector, b.load(best), its), best)
        largest = self.call(f"llvm.vector.reduce.fmaximum.v{lanes}f32", F32, b.load(best))
        largest = self.spread(largest, lanes)
        with self.loop(first, end, lanes) as token:
            place = self.at(scores, token)
            share = self.power(b.fsub(self.read(place, F32, lanes), largest))
            self.write(share, place)
            b.store(b.fadd(b.load(total), share), total)

    def prefetch(self, place: Value, size: int, ahead: int = 0) -> None:
        """Tells memory of what will be read: bytes, from so many ahead of a place on."""
        place = self.b.bitcast(place, I8.as_pointer())
        for begin in range(ahead, ahead + size, 64):
            self.call("llvm.prefetch.p0", NONE, self.at(place, I64(begin)), I32(0), I32(3), I32(1))

    def floats(self, place: Value, lanes: int) -> Value:
        """Numbers as they are given, in fp32."""
        return self._widened(self.read(place, self.number, lanes))

    def rounded(self, numbers: Value) -> Value:
        """Numbers in fp32 to what they are where they are given; in bf16 what is between two goes to the even one."""
        return self._widened(self._narrowed(numbers))

    def put(self, numbers: Value, place: Value) -> None:
        """Numbers in fp32, rounded, to where they are wanted."""
        self.write(self._narrowed(numbers), place)

    def _widened(self, numbers: Value) -> Value:
        if not self.bf16:
            return numbers
        lanes = numbers.type.count
        halves = self.b.zext(numbers, ir.VectorType(I32, lanes))
        return self.as_(self.b.shl(halves, many(16, I32, lanes)), F32, lanes)

    def _narrowed(self, numbers: Value) -> Value:
        if not self.bf16:
            return numbers
        b, lanes = self.b, numbers.type.count
        whole = self.as_(numbers, I32, lanes)
        odd = b.and_(b.lshr(whole, many(16, I32, lanes)), many(1, I32, lanes))
        whole = b.add(whole, b.add(odd, many(0x7FFF, I32, lanes)))
        return b.trunc(b.lshr(whole, many(16, I32, lanes)), ir.VectorType(I16, lanes))
