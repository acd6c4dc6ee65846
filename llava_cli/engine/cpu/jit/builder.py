"""What kernels are written with: LLVM IR for functions that take one struct of arguments and share work among threads.

A kernel's module has a `KernelArgs` struct, a `build(isa, bf16, ...)` that returns the text of an LLVM module whose
`run(args)` is the kernel, and a `reference()` that computes the same in plain torch. Tensors are in bf16 or in fp32;
arithmetic is in fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, VOID = ir.HalfType(), ir.FloatType(), ir.VoidType()
MASKED_SCORE = -3e38
"""The score of a key that the mask hides."""
Value = Any
"""An LLVM value: what an instruction returns."""


@dataclass(frozen=True)
class IsaTier:
    """An instruction set that kernels are compiled for."""

    name: str
    required_features: tuple[str, ...]
    """The CPU features it takes, by Linux's names."""
    lanes: int
    """32-bit elements in a vector register."""
    token_block_sizes: tuple[int, ...]
    """Tokens that a quantized product computes at once, the largest first: as many as there are registers for."""
    vnni: bool
    weight_qmax: int
    """The largest level that a codebook of 4-bit weights is rounded to."""

    @property
    def act_pair_qmax(self) -> int | None:
        """What the magnitudes of two neighboring activations may add up to, rounding included, beside 4-bit weights.

        Without VNNI the products of two neighbors are added in 16 bits, of weights up to twice `weight_qmax` and one.
        """
        return None if self.vnni else (2**15 - 1) // (2 * self.weight_qmax + 1) - 1


ISA_TIERS = (
    IsaTier("avx512vnni", ("avx512f", "avx512bw", "avx512vl", "avx512_vnni"), 16, (10, 8, 4, 2, 1), True, 127),
    IsaTier("avxvnni", ("avx2", "fma", "f16c", "avx_vnni"), 8, (8, 4, 2, 1), True, 127),
    IsaTier("avx2", ("avx2", "fma", "f16c"), 8, (8, 4, 2, 1), False, 112),
)
"""The best first."""


def args_struct(pointers: Sequence[str], ints: Sequence[str]) -> type[ctypes.Structure]:
    """The struct that a kernel's only argument points to: addresses of tensors, then 64-bit integers."""
    fields = [(name, ctypes.c_void_p) for name in pointers] + [(name, ctypes.c_int64) for name in ints]
    return type("KernelArgs", (ctypes.Structure,), {"_fields_": fields})


def splat_const(value: Any, element: Any, lanes: int) -> Value:
    """A constant vector with `value` in each lane."""
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


class KernelBuilder:
    """Writes one LLVM module. Kernels that run on several threads have the arguments `threads` and `next`.

    `next` is the work counter of `dynamic_loop`. `bf16` is the type of the tensors; without it they are fp32.
    """

    def __init__(self, args: type[ctypes.Structure], isa: IsaTier, bf16: bool) -> None:
        self.module, self.isa, self.lanes, self.bf16 = ir.Module("kernel"), isa, isa.lanes, bf16
        self.element, self.itemsize = (I16, 2) if bf16 else (F32, 4)
        self.vector = ir.VectorType(F32, isa.lanes)
        """One register."""
        self._arg_names = [name for name, *_ in args._fields_]
        fields = [I8.as_pointer() if ctype is ctypes.c_void_p else I64 for _, ctype, *_ in args._fields_]
        self._args_type = ir.LiteralStructType(fields).as_pointer()

    # ---------------------------------------------------------------- functions, arguments, loops

    @contextmanager
    def function(self, name: str) -> Iterator[ir.Function]:
        """A function of the module that takes the arguments; what is emitted within is its body."""
        function = ir.Function(self.module, ir.FunctionType(VOID, [self._args_type]), name)
        self.b, self._args = ir.IRBuilder(function.append_basic_block()), function.args[0]
        yield function
        self.b.ret_void()

    def run_parallel(self, function: ir.Function) -> None:
        """Calls `function` in all `threads`, torch's own OpenMP threads, with the work counter at 0."""
        body = ir.FunctionType(VOID, [self._args_type]).as_pointer()
        parallel = ir.FunctionType(VOID, [body, self._args_type, I32, I32])
        start = self.module.globals.get("GOMP_parallel") or ir.Function(self.module, parallel, "GOMP_parallel")
        b, threads = self.b, self.int_arg("threads")
        self.set_arg("next", 0)
        with b.if_else(b.icmp_signed("==", threads, I64(1))) as (one_thread, several):
            with one_thread:
                b.call(function, [self._args])
            with several:
                b.call(start, [function, self._args, b.trunc(threads, I32), I32(0)])

    def _field(self, name: str) -> Value:
        return self.b.gep(self._args, [I32(0), I32(self._arg_names.index(name))], inbounds=True)

    def int_arg(self, name: str) -> Value:
        return self.b.load(self._field(name))

    def array_arg(self, name: str, element: Any = None) -> Value:
        """The address of a tensor of this element type; by default that of the kernel's tensors."""
        return self.b.bitcast(self.b.load(self._field(name)), (element or self.element).as_pointer())

    def set_arg(self, name: str, value: int) -> None:
        self.b.store(I64(value), self._field(name))

    def fetch_add(self, name: str, value: int) -> Value:
        """Atomically adds to an integer argument; what it was before."""
        return self.b.atomic_rmw("add", self._field(name), I64(value), "monotonic")

    @contextmanager
    def loop(self, begin: Value, end: Value, step: int = 1) -> Iterator[Value]:
        """for i in range(begin, end, step)"""
        b, before = self.b, self.b.block
        head, body, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(begin, before)
        b.cbranch(b.icmp_signed("<", index, end), body, after)
        b.position_at_end(body)
        yield index
        index.add_incoming(b.add(index, I64(step)), b.block)
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def dynamic_loop(self, size: int, end: Value) -> Iterator[tuple[Value, Value]]:
        """Dynamic work loop: atomically claims `size` items of [0, end) at a time and yields (begin, end)."""
        b = self.b
        head, body, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        begin = self.fetch_add("next", size)
        b.cbranch(b.icmp_signed("<", begin, end), body, after)
        b.position_at_end(body)
        stop = b.add(begin, I64(size))
        yield begin, b.select(b.icmp_signed("<", stop, end), stop, end)
        b.branch(head)
        b.position_at_end(after)

    def blocks(self, end: Value, sizes: Sequence[int]) -> list[tuple[Value, Value, int]]:
        """Splits [0, end) into ranges (begin, end, size) of whole blocks: of the first size as many as fit, then on."""
        b, begin, ranges = self.b, I64(0), []
        for size in sizes:
            stop = b.sub(end, b.srem(b.sub(end, begin), I64(size)))
            ranges.append((begin, stop, size))
            begin = stop
        return ranges

    # ---------------------------------------------------------------- memory

    def at(self, array: Value, *offsets: Value) -> Value:
        """The address of array[sum(offsets)]."""
        index = offsets[0]
        for offset in offsets[1:]:
            index = self.b.add(index, offset)
        return self.b.gep(array, [index])

    def load(self, pointer: Value, element: Any, lanes: int) -> Value:
        """A vector of `lanes` elements, from any address."""
        vector = ir.VectorType(element, lanes)
        return self.b.load(self.b.bitcast(pointer, vector.as_pointer()), align=1)

    def store(self, vector: Value, pointer: Value) -> None:
        self.b.store(vector, self.b.bitcast(pointer, vector.type.as_pointer()), align=1)

    def load_fp32(self, pointer: Value, lanes: int | None = None) -> Value:
        """Elements of one of the kernel's tensors, in fp32; by default a register full."""
        return self._to_fp32(self.load(pointer, self.element, lanes or self.lanes))

    def store_rounded(self, x: Value, pointer: Value) -> None:
        """Rounds fp32 to the type of the kernel's tensors and stores it."""
        self.store(self._from_fp32(x), pointer)

    def round_to_element(self, x: Value) -> Value:
        """fp32, as it would be after having been stored."""
        return self._to_fp32(self._from_fp32(x))

    def _to_fp32(self, x: Value) -> Value:
        if not self.bf16:
            return x
        lanes = x.type.count
        bits = self.b.zext(x, ir.VectorType(I32, lanes))
        return self.bitcast(self.b.shl(bits, splat_const(16, I32, lanes)), F32, lanes)

    def _from_fp32(self, x: Value) -> Value:
        """To bf16: to the nearest, ties to even."""
        if not self.bf16:
            return x
        b, lanes = self.b, x.type.count
        bits = self.bitcast(x, I32, lanes)
        odd = b.and_(b.lshr(bits, splat_const(16, I32, lanes)), splat_const(1, I32, lanes))
        bits = b.add(bits, b.add(odd, splat_const(0x7FFF, I32, lanes)))
        return b.trunc(b.lshr(bits, splat_const(16, I32, lanes)), ir.VectorType(I16, lanes))

    def prefetch(self, pointer: Value, size: int, distance: int = 0) -> None:
        """Asks for the `size` bytes that begin `distance` bytes behind an address."""
        pointer = self.b.bitcast(pointer, I8.as_pointer())
        for offset in range(distance, distance + size, 64):
            self.call("llvm.prefetch.p0", VOID, self.at(pointer, I64(offset)), I32(0), I32(3), I32(1))

    # ---------------------------------------------------------------- arithmetic

    def call(self, name: str, result: Any, *args: Value) -> Value:
        """Calls an intrinsic of LLVM's."""
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [arg.type for arg in args]), name)
        return self.b.call(function, args)

    def broadcast(self, value: Value, lanes: int | None = None) -> Value:
        """A vector with `value` in each lane."""
        lanes = lanes or self.lanes
        vector, lane_0 = ir.VectorType(value.type, lanes), ir.VectorType(I32, lanes)
        first = self.b.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
        return self.b.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(lane_0, None))

    def bitcast(self, vector: Value, element: Any, lanes: int) -> Value:
        return self.b.bitcast(vector, ir.VectorType(element, lanes))

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z"""
        return self.b.fadd(self.b.fmul(x, y, flags=("contract",)), z, flags=("contract",))

    def accumulators(self, count: int) -> list[Value]:
        """Vectors of fp32 on the stack, which LLVM keeps in registers."""
        return [self.b.alloca(self.vector) for _ in range(count)]

    def clear(self, accumulators: Iterable[Value]) -> None:
        for accumulator in accumulators:
            self.b.store(splat_const(0.0, F32, self.lanes), accumulator)

    def accumulate(self, accumulator: Value, x: Value, y: Value) -> None:
        """accumulator += x * y"""
        self.b.store(self.fma(x, y, self.b.load(accumulator)), accumulator)

    def sum(self, vector: Value) -> Value:
        """The sum of an fp32 vector's lanes, in any order."""
        lanes = vector.type.count
        name = f"llvm.vector.reduce.fadd.v{lanes}f32"
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(F32, [F32, vector.type]), name)
        return self.b.call(function, [F32(-0.0), vector], fastmath=("reassoc",))

    def exp(self, x: Value) -> Value:
        """e**x for x <= 0, with a relative error of 1e-7: expf of the Cephes library (Moshier, 1989).

        x = n ln 2 + r with a whole n and |r| <= ln(2) / 2; e**r is a polynomial, and 2**n is made from its bits.
        """
        b, lanes = self.b, x.type.count
        x = self.call(f"llvm.maximum.v{lanes}f32", x.type, x, splat_const(-87.0, F32, lanes))
        n = self.call(f"llvm.rint.v{lanes}f32", x.type, b.fmul(x, splat_const(1.4426950408889634, F32, lanes)))
        r = self.fma(n, splat_const(-0.693359375, F32, lanes), x)
        r = self.fma(n, splat_const(2.12194440e-4, F32, lanes), r)
        terms = [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5, 1.0, 1.0]
        polynomial = reduce(
            lambda sum_, term: self.fma(sum_, r, splat_const(term, F32, lanes)),
            terms[1:],
            splat_const(terms[0], F32, lanes),
        )
        exponent = b.add(b.fptosi(n, ir.VectorType(I32, lanes)), splat_const(127, I32, lanes))
        return b.fmul(polynomial, self.bitcast(b.shl(exponent, splat_const(23, I32, lanes)), F32, lanes))

    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + e**-x), by way of e**-|x|, which cannot overflow."""
        b, lanes = self.b, x.type.count
        one = splat_const(1.0, F32, lanes)
        exp = self.exp(b.fneg(self.call(f"llvm.fabs.v{lanes}f32", x.type, x)))
        positive = b.fcmp_ordered(">=", x, splat_const(0.0, F32, lanes))
        return b.fdiv(b.select(positive, one, exp), b.fadd(one, exp))

    def softmax_numerators(self, scores: Value, begin: Value, end: Value, largest: Value, total: Value) -> None:
        """Replaces scores[begin:end] by e**(score - largest score), and leaves the sum's lanes in `total`.

        Whole registers are read and written, so the caller fills those of the last one behind `end` with
        `MASKED_SCORE`. `largest` and `total` are accumulators.
        """
        b, lanes = self.b, self.lanes
        maximum = f"llvm.maximum.v{lanes}f32"
        b.store(splat_const(MASKED_SCORE, F32, lanes), largest)
        b.store(splat_const(0.0, F32, lanes), total)
        with self.loop(begin, end, lanes) as token:
            part = self.load(self.at(scores, token), F32, lanes)
            b.store(self.call(maximum, self.vector, b.load(largest), part), largest)
        largest_score = self.call(f"llvm.vector.reduce.fmaximum.v{lanes}f32", F32, b.load(largest))
        largest_score = self.broadcast(largest_score)
        with self.loop(begin, end, lanes) as token:
            place = self.at(scores, token)
            numerator = self.exp(b.fsub(self.load(place, F32, lanes), largest_score))
            self.store(numerator, place)
            b.store(b.fadd(b.load(total), numerator), total)
