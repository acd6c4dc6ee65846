"""What stands between the matrix products of a decoder's layer: norm, rotary embedding, gated activation.

    add_rms_norm:  residual[t] += residual_delta[t]
                   normed[t] = weight * residual[t] / sqrt(mean(residual[t]**2) + epsilon)
    rope:          (a, b) -> (a * cos - b * sin, b * cos + a * sin) for each element a of a head's first half and b of
                   its second; queries in place, keys and values into the cache
    swiglu:        out[t] = silu(gate[t]) * up[t], with silu(x) = x * sigmoid(x)

RMSNorm is Zhang and Sennrich 2019, RoPE Su et al. 2021 in the layout of transformers' `rotate_half`, SwiGLU Shazeer
2020. bf16 is rounded where transformers rounds it. An item of work is a token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING

from llvmlite import ir

from llava_cli.engine.cpu.jit import VECTOR_COLUMNS
from llava_cli.engine.cpu.jit.builder import F32, I64, IsaTier, KernelBuilder, Value, args_struct
from llava_cli.engine.cpu.jit.compiler import Kernel, KernelLaunch, Misfit, Run, addresses, threads_for

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit import Layout

_OPERATIONS_PER_ELEMENT = 8
"""About; decides how many threads are worth starting."""

NormArgs = args_struct(("residual", "residual_delta", "weight", "normed"), ("tokens", "hidden_size", "threads", "next"))
SwigluArgs = args_struct(("gate_up", "out"), ("tokens", "ffn_size", "threads", "next"))
RopeArgs = args_struct(
    ("qkv", "keys", "values", "cos", "sin"),
    ("tokens", "row_tokens", "heads", "kv_heads", "head_dim", "capacity", "cached", "threads", "next"),
)


def build_add_rms_norm(isa: IsaTier, bf16: bool, epsilon: float) -> str:
    """LLVM assembly."""
    return str(_AddRmsNorm(isa, bf16, epsilon).module)


def build_swiglu(isa: IsaTier, bf16: bool) -> str:
    """LLVM assembly."""
    return str(_Swiglu(isa, bf16).module)


def build_rope(isa: IsaTier, bf16: bool) -> str:
    """LLVM assembly."""
    return str(_Rope(isa, bf16).module)


class _AddRmsNorm(KernelBuilder):
    def __init__(self, isa: IsaTier, bf16: bool, epsilon: float) -> None:
        super().__init__(NormArgs, isa, bf16)
        self._epsilon = epsilon
        norm = self._norm()
        with self.function("run"):
            self.run_parallel(norm)

    def _norm(self) -> ir.Function:
        with self.function("norm") as function:
            b, hidden_size = self.b, self.int_arg("hidden_size")
            sums = self.accumulators(VECTOR_COLUMNS // self.lanes)
            names = ("residual", "residual_delta", "weight", "normed")
            residual, residual_delta, weight, normed = (self.array_arg(name) for name in names)
            with self.dynamic_loop(1, self.int_arg("tokens")) as (token, _):
                line = b.mul(token, hidden_size)
                self.clear(sums)
                with self.loop(I64(0), hidden_size, VECTOR_COLUMNS) as column:
                    for accumulator, start in zip(sums, range(0, VECTOR_COLUMNS, self.lanes), strict=True):
                        place = self.at(residual, line, column, I64(start))
                        delta = self.load_fp32(self.at(residual_delta, line, column, I64(start)))
                        x = self.round_to_element(b.fadd(self.load_fp32(place), delta))
                        self.store_rounded(x, place)
                        self.accumulate(accumulator, x, x)
                total = self.sum(reduce(b.fadd, [b.load(accumulator) for accumulator in sums]))
                mean_square = b.fdiv(total, b.sitofp(hidden_size, F32))
                root = self.call("llvm.sqrt.f32", F32, b.fadd(mean_square, F32(self._epsilon)))
                scale = self.broadcast(b.fdiv(F32(1.0), root))
                with self.loop(I64(0), hidden_size, self.lanes) as column:
                    x = self.round_to_element(b.fmul(self.load_fp32(self.at(residual, line, column)), scale))
                    x = b.fmul(x, self.load_fp32(self.at(weight, column)))
                    self.store_rounded(x, self.at(normed, line, column))
        return function


class _Swiglu(KernelBuilder):
    def __init__(self, isa: IsaTier, bf16: bool) -> None:
        super().__init__(SwigluArgs, isa, bf16)
        swiglu = self._swiglu()
        with self.function("run"):
            self.run_parallel(swiglu)

    def _swiglu(self) -> ir.Function:
        with self.function("swiglu") as function:
            b, ffn_size = self.b, self.int_arg("ffn_size")
            gate_up, out = self.array_arg("gate_up"), self.array_arg("out")
            with self.dynamic_loop(1, self.int_arg("tokens")) as (token, _):
                line = b.mul(token, b.mul(ffn_size, I64(2)))
                with self.loop(I64(0), ffn_size, self.lanes) as column:
                    gate = self.load_fp32(self.at(gate_up, line, column))
                    up = self.load_fp32(self.at(gate_up, line, ffn_size, column))
                    silu = self.round_to_element(b.fmul(gate, self.sigmoid(gate)))
                    self.store_rounded(b.fmul(silu, up), self.at(out, b.mul(token, ffn_size), column))
        return function


class _Rope(KernelBuilder):
    def __init__(self, isa: IsaTier, bf16: bool) -> None:
        super().__init__(RopeArgs, isa, bf16)
        rope = self._rope()
        with self.function("run"):
            self.run_parallel(rope)

    def _rope(self) -> ir.Function:
        with self.function("rope") as function:
            b = self.b
            head_dim, row_tokens = self.int_arg("head_dim"), self.int_arg("row_tokens")
            heads, kv_heads = self.int_arg("heads"), self.int_arg("kv_heads")
            qkv, keys, values = (self.array_arg(name) for name in ("qkv", "keys", "values"))
            qkv_stride = b.mul(b.add(heads, b.mul(kv_heads, I64(2))), head_dim)
            with self.dynamic_loop(1, self.int_arg("tokens")) as (token, _):
                row, index = b.sdiv(token, row_tokens), b.srem(token, row_tokens)
                queries = self.at(qkv, b.mul(token, qkv_stride))
                with self.loop(I64(0), heads) as head:
                    query = self.at(queries, b.mul(head, head_dim))
                    self._apply_rope(query, query, token)
                position = b.mul(b.add(self.int_arg("cached"), index), head_dim)
                with self.loop(I64(0), kv_heads) as head:
                    key = self.at(queries, b.mul(b.add(heads, head), head_dim))
                    value = self.at(key, b.mul(kv_heads, head_dim))
                    line = b.mul(b.mul(b.add(b.mul(row, kv_heads), head), self.int_arg("capacity")), head_dim)
                    self._apply_rope(key, self.at(keys, line, position), token)
                    with self.loop(I64(0), head_dim, self.lanes) as start:
                        part = self.load_fp32(self.at(value, start))
                        self.store_rounded(part, self.at(values, line, position, start))
        return function

    def _apply_rope(self, head: Value, target: Value, token: Value) -> None:
        b = self.b
        half = b.sdiv(self.int_arg("head_dim"), I64(2))
        with self.loop(I64(0), half, self.lanes) as start:
            cos, sin = (
                self.load_fp32(self.at(self.array_arg(name), b.mul(token, half), start)) for name in ("cos", "sin")
            )
            first, second = (self.load_fp32(self.at(head, offset, start)) for offset in (I64(0), half))
            self.store_rounded(b.fsub(b.fmul(first, cos), b.fmul(second, sin)), self.at(target, start))
            self.store_rounded(b.fadd(b.fmul(second, cos), b.fmul(first, sin)), self.at(target, half, start))


def norm_kernel(bf16: bool, epsilon: float) -> Kernel:
    return Kernel(build_add_rms_norm, bf16, _test_norm, (epsilon,))


def swiglu_kernel(bf16: bool) -> Kernel:
    return Kernel(build_swiglu, bf16, _test_swiglu)


def rope_kernel(bf16: bool) -> Kernel:
    return Kernel(build_rope, bf16, _test_rope)


def add_rms_norm(
    residual: torch.Tensor, residual_delta: torch.Tensor, weight: torch.Tensor, normed: torch.Tensor, epsilon: float
) -> KernelLaunch:
    """Adds residual_delta to residual, in place, and writes its norm to `normed`; all [tokens, hidden_size]."""
    tokens, hidden_size = residual.shape
    tensors = {"residual": residual, "residual_delta": residual_delta, "weight": weight, "normed": normed}
    layout: Layout = dict.fromkeys(tensors, (residual.dtype, (tokens, hidden_size)))
    layout["weight"] = (residual.dtype, (hidden_size,))
    args = NormArgs(**addresses(tensors, layout), tokens=tokens, hidden_size=hidden_size)
    return _launch(norm_kernel(_is_bf16(residual), epsilon), args, tensors)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> KernelLaunch:
    """gate_up [tokens, 2 * ffn_size], first the gate -> out [tokens, ffn_size]."""
    tokens, ffn_size = out.shape
    tensors = {"gate_up": gate_up, "out": out}
    layout: Layout = {"gate_up": (out.dtype, (tokens, 2 * ffn_size)), "out": (out.dtype, (tokens, ffn_size))}
    args = SwigluArgs(**addresses(tensors, layout), tokens=tokens, ffn_size=ffn_size)
    return _launch(swiglu_kernel(_is_bf16(out)), args, tensors)


def apply_rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: int,
    rows: int,
    cached: int,
) -> KernelLaunch:
    """Rotates queries in place, and writes rotated keys and values into the cache from token `cached` on.

    qkv [rows * row_tokens, (heads + 2 * kv_heads) * head_dim]; cos, sin [rows * row_tokens, head_dim / 2]; keys, values
    [rows or more, kv_heads, capacity, head_dim]. Raises `Misfit` where the cache has no room for them.
    """
    tokens, (cache_rows, kv_heads, capacity, head_dim) = len(qkv), keys.shape
    if cache_rows < rows or cached + tokens // rows > capacity:
        raise Misfit(f"a cache of {cache_rows} rows of {capacity} tokens for {rows} of {cached + tokens // rows}")
    tensors = {"qkv": qkv, "keys": keys, "values": values, "cos": cos, "sin": sin}
    layout: Layout = {
        "qkv": (qkv.dtype, (tokens, (heads + 2 * kv_heads) * head_dim)),
        **dict.fromkeys(("keys", "values"), (qkv.dtype, (cache_rows, kv_heads, capacity, head_dim))),
        **dict.fromkeys(("cos", "sin"), (qkv.dtype, (tokens, head_dim // 2))),
    }
    sizes = {"tokens": tokens, "row_tokens": tokens // rows, "capacity": capacity, "cached": cached}
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return _launch(rope_kernel(_is_bf16(qkv)), RopeArgs(**addresses(tensors, layout), **sizes, **shape), tensors)


def _launch(kernel: Kernel, args: ctypes.Structure, tensors: dict[str, torch.Tensor]) -> KernelLaunch:
    args.threads = threads_for(_OPERATIONS_PER_ELEMENT * next(iter(tensors.values())).numel())
    return KernelLaunch(kernel, args, tensors)


def _is_bf16(tensor: torch.Tensor) -> bool:
    import torch

    return tensor.dtype == torch.bfloat16


def reference_add_rms_norm(
    residual: torch.Tensor, residual_delta: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch: residual and its norm, both [tokens, hidden_size]."""
    import torch

    residual = residual + residual_delta
    normed = residual.float() * torch.rsqrt(residual.float().square().mean(-1, keepdim=True) + epsilon)
    return residual, weight * normed.to(residual.dtype)


def reference_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """The same in plain torch: [tokens, ffn_size]."""
    from torch.nn.functional import silu

    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def reference_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, of queries or keys: x [tokens, heads, head_dim], cos and sin [tokens, head_dim / 2]."""
    import torch

    first, second = x.float().chunk(2, -1)
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _test_norm(kernel: Kernel, run: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    (epsilon,), shape = kernel.constants, (3, 2 * VECTOR_COLUMNS)
    residual, delta = kernel.sample(2, *shape)
    residual, weight, normed = residual.clone(), kernel.sample(shape[1]), torch.empty_like(delta)
    expected = reference_add_rms_norm(residual, delta, weight, epsilon)
    add_rms_norm(residual, delta, weight, normed, epsilon).run_as(run)
    yield from zip((residual, normed), expected, strict=True)


def _test_swiglu(kernel: Kernel, run: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    gate_up = kernel.sample(3, 2 * VECTOR_COLUMNS)
    out = torch.empty(3, VECTOR_COLUMNS, dtype=gate_up.dtype, device="cpu")
    swiglu(gate_up, out).run_as(run)
    yield out, reference_swiglu(gate_up)


def _test_rope(kernel: Kernel, run: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two rows of three tokens behind one, with four query heads that share two of keys."""
    rows, new, heads, kv_heads, head_dim = 2, 3, 4, 2, VECTOR_COLUMNS
    qkv = kernel.sample(rows * new, heads + 2 * kv_heads, head_dim)
    angles = kernel.sample(rows * new, head_dim // 2)
    keys, values = kernel.sample(2, rows, kv_heads, 1 + new, head_dim)
    rotated = reference_rope(qkv, angles.cos(), angles.sin())
    expected_keys, expected_values = (
        part.view(rows, new, kv_heads, head_dim).transpose(1, 2)
        for part in (rotated[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :].clone())
    )
    apply_rope(qkv.view(rows * new, -1), angles.cos(), angles.sin(), keys, values, heads, rows, 1).run_as(run)
    yield qkv[:, :heads], rotated[:, :heads]
    yield keys[:, :, 1:], expected_keys
    yield values[:, :, 1:], expected_values
