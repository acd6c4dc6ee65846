"""Attention of one new token a row over its KV cache: a decode step.

    out[r, h] = softmax(scaling * query[r, h] @ keys[r, g].T, where mask[r]) @ values[r, g]

for rows r, query heads h, and g = h // queries_per_kv_head, the key/value head that they share (grouped-query
attention, Ainslie et al. 2023). An item of work is one (r, g). Its keys are read once for all its queries, then its
values, both in the order in which they stand, as fast as memory gives them; torch's own kernel reads them at half of
that on a CPU without AMX. The scores in between are kept whole, so the softmax is the plain one: largest score,
exponentials, sum.

With `rope` the kernel also does what precedes attention in a decoder's layer: it rotates queries and keys (RoPE, Su et
al. 2021, in the layout of transformers' `rotate_half`), and appends key and value to the cache.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from llvmlite import ir

from llava_cli.engine.cpu.jit import SCORE_PADDING
from llava_cli.engine.cpu.jit.builder import (
    F32,
    I8,
    I64,
    MASKED_SCORE,
    IsaTier,
    KernelBuilder,
    Value,
    args_struct,
    splat_const,
)
from llava_cli.engine.cpu.jit.compiler import Kernel, KernelLaunch, Misfit, Run, addresses, threads_for

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit import Layout

_PREFETCH_BYTES = 8192
"""How far ahead keys and values are prefetched."""
_TOKENS_AT_ONCE = 4
"""Tokens whose scores are computed at once."""
_VALUE_REGISTERS = 8
"""Registers of a value that are summed at once."""

KernelArgs = args_struct(
    ("query", "out", "keys", "values", "mask", "scaled_query", "scores", "cos", "sin"),
    ("items", "kv_heads", "queries_per_kv_head", "capacity", "tokens", "threads", "next"),
)
"""query, out [rows, kv_heads, queries_per_kv_head, head_dim]; keys, values [rows, kv_heads, capacity, head_dim], of
which the first `tokens` count; mask [rows, tokens] in bytes, 0 where a token is hidden. items = rows * kv_heads.

Workspace in fp32: scaled_query like query, and scores [rows, heads, tokens + SCORE_PADDING].

With `rope`, query is the fused projection's output [rows, heads + 2 * kv_heads, head_dim]: queries, keys, values. cos
and sin are [rows, head_dim / 2]; the new key and value become token `tokens` - 1.
"""


def build(isa: IsaTier, bf16: bool, head_dim: int, scaling: float, rope: bool = False) -> str:
    """LLVM assembly."""
    return str(_DecodeAttention(isa, bf16, head_dim, scaling, rope).module)


class _DecodeAttention(KernelBuilder):
    def __init__(self, isa: IsaTier, bf16: bool, head_dim: int, scaling: float, rope: bool) -> None:
        super().__init__(KernelArgs, isa, bf16)
        self._head_dim, self._scaling, self._rope = head_dim, scaling, rope
        self._starts = range(0, head_dim, isa.lanes)
        """Where each register of a head begins."""
        attend = self._attend()
        with self.function("run"):
            self.run_parallel(attend)

    def _attend(self) -> ir.Function:
        with self.function("attend") as function:
            b, lanes, head_dim = self.b, self.lanes, I64(self._head_dim)
            self._largest, self._total = self.accumulators(2)
            self._sums = self.accumulators(len(self._starts[:_VALUE_REGISTERS]))
            query, out, keys, values = (self.array_arg(name) for name in ("query", "out", "keys", "values"))
            mask, scaled_query = self.array_arg("mask", I8), self.array_arg("scaled_query", F32)
            all_scores = self.array_arg("scores", F32)
            group, tokens, kv_heads = (self.int_arg(name) for name in ("queries_per_kv_head", "tokens", "kv_heads"))
            scores_stride, heads = b.add(tokens, I64(SCORE_PADDING)), b.mul(kv_heads, group)
            heads_in_row = b.add(heads, b.mul(kv_heads, I64(2 * self._rope)))
            with self.dynamic_loop(1, self.int_arg("items")) as (item, _):
                row, kv_head = b.sdiv(item, kv_heads), b.srem(item, kv_heads)
                row_mask = self.at(mask, b.mul(row, tokens))
                first = self._first_shown(row_mask, tokens)
                cache_offset = b.mul(b.mul(item, self.int_arg("capacity")), head_dim)
                cached_keys, cached_values = self.at(keys, cache_offset), self.at(values, cache_offset)
                row_query = self.at(query, b.mul(b.mul(row, heads_in_row), head_dim))
                if self._rope:
                    self._append(row_query, row, kv_head, heads, cached_keys, cached_values)
                first_query, load_head = b.mul(item, group), self._rotated if self._rope else self._unrotated
                with self.loop(I64(0), group) as i:
                    source = self.at(row_query, b.mul(b.add(b.mul(kv_head, group), i), head_dim))
                    target = self.at(scaled_query, b.mul(b.add(first_query, i), head_dim))
                    for start, part in load_head(source, row):
                        self.store(b.fmul(part, splat_const(self._scaling, F32, lanes)), self.at(target, I64(start)))
                begin = first
                for size in (_TOKENS_AT_ONCE, 1):
                    end = b.sub(tokens, b.srem(b.sub(tokens, begin), I64(size)))
                    with self.loop(begin, end, size) as token:
                        key_bytes = size * self._head_dim * self.itemsize
                        self.prefetch(self.at(cached_keys, b.mul(token, head_dim)), key_bytes, _PREFETCH_BYTES)
                        with self.loop(first_query, b.add(first_query, group)) as head:
                            scores = self.at(all_scores, b.mul(head, scores_stride), token)
                            head_query = self.at(scaled_query, b.mul(head, head_dim))
                            token_keys = self.at(cached_keys, b.mul(token, head_dim))
                            self._score(head_query, token_keys, self.at(row_mask, token), scores, size)
                    begin = end
                with self.loop(first_query, b.add(first_query, group)) as head:
                    scores = self.at(all_scores, b.mul(head, scores_stride))
                    for start in range(0, SCORE_PADDING, lanes):
                        self.store(splat_const(MASKED_SCORE, F32, lanes), self.at(scores, tokens, I64(start)))
                    self.softmax_numerators(scores, first, tokens, self._largest, self._total)
                    self._weigh_values(scores, cached_values, first, tokens, self.at(out, b.mul(head, head_dim)))
        return function

    def _append(
        self, row_query: Value, row: Value, kv_head: Value, heads: Value, cached_keys: Value, cached_values: Value
    ) -> None:
        """Writes the row's new key, rotated, and its value behind those in the cache."""
        b, head_dim = self.b, I64(self._head_dim)
        last = b.mul(b.sub(self.int_arg("tokens"), I64(1)), head_dim)
        key = self.at(row_query, b.mul(b.add(heads, kv_head), head_dim))
        for start, part in self._rotated(key, row):
            self.store_rounded(part, self.at(cached_keys, last, I64(start)))
        value = self.at(key, b.mul(self.int_arg("kv_heads"), head_dim))
        for start, part in self._unrotated(value, row):
            self.store_rounded(part, self.at(cached_values, last, I64(start)))

    def _unrotated(self, head: Value, row: Value) -> Iterator[tuple[int, Value]]:
        """A head's registers, and where they begin."""
        for start in self._starts:
            yield start, self.load_fp32(self.at(head, I64(start)))

    def _rotated(self, head: Value, row: Value) -> Iterator[tuple[int, Value]]:
        """The same after RoPE: element i of the first half is rotated with element i of the second."""
        b, half = self.b, self._head_dim // 2
        angles = b.mul(row, I64(half))
        for start in range(0, half, self.lanes):
            cos, sin = (self.load_fp32(self.at(self.array_arg(name), angles, I64(start))) for name in ("cos", "sin"))
            first, second = (self.load_fp32(self.at(head, I64(start + offset))) for offset in (0, half))
            yield start, b.fsub(b.fmul(first, cos), b.fmul(second, sin))
            yield half + start, b.fadd(b.fmul(second, cos), b.fmul(first, sin))

    def _first_shown(self, mask: Value, tokens: Value) -> Value:
        """The first token that the mask shows, behind padding; the last one if it shows none."""
        b, before = self.b, self.b.block
        head, body, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        token = b.phi(I64)
        token.add_incoming(I64(0), before)
        b.cbranch(b.icmp_signed("<", b.add(token, I64(1)), tokens), body, after)
        b.position_at_end(body)
        token.add_incoming(b.add(token, I64(1)), body)
        b.cbranch(b.icmp_signed("==", b.load(self.at(mask, token)), I8(0)), head, after)
        b.position_at_end(after)
        return token

    def _score(self, query: Value, keys: Value, mask: Value, scores: Value, count: int) -> None:
        """A scaled query times the keys of `count` tokens."""
        b, lanes = self.b, self.lanes
        sums = [splat_const(0.0, F32, lanes)] * count
        for start in self._starts:
            query_part = self.load(self.at(query, I64(start)), F32, lanes)
            for i in range(count):
                key = self.load_fp32(self.at(keys, I64(i * self._head_dim + start)))
                sums[i] = self.fma(key, query_part, sums[i])
        for i, products in enumerate(sums):
            hidden = b.icmp_signed("==", b.load(self.at(mask, I64(i))), I8(0))
            b.store(b.select(hidden, F32(MASKED_SCORE), self.sum(products)), self.at(scores, I64(i)))

    def _weigh_values(self, numerators: Value, values: Value, first: Value, tokens: Value, out: Value) -> None:
        """The sum of values times softmax numerators, over the numerators' total."""
        b, lanes = self.b, self.lanes
        inverse_total = self.broadcast(b.fdiv(F32(1.0), self.sum(b.load(self._total))))
        for part in range(0, len(self._starts), _VALUE_REGISTERS):
            starts = self._starts[part : part + _VALUE_REGISTERS]
            self.clear(self._sums)
            with self.loop(first, tokens) as token:
                numerator = self.broadcast(b.load(self.at(numerators, token)))
                value = self.at(values, b.mul(token, I64(self._head_dim)))
                value_bytes = len(starts) * lanes * self.itemsize
                self.prefetch(self.at(value, I64(starts[0])), value_bytes, _PREFETCH_BYTES)
                for start, accumulator in zip(starts, self._sums, strict=False):
                    self.accumulate(accumulator, self.load_fp32(self.at(value, I64(start))), numerator)
            for start, accumulator in zip(starts, self._sums, strict=False):
                self.store_rounded(b.fmul(b.load(accumulator), inverse_total), self.at(out, I64(start)))


def kernel(bf16: bool, head_dim: int, scaling: float, rope: bool) -> Kernel:
    return Kernel(build, bf16, _self_test, (head_dim, scaling, rope))


class DecodeAttention:
    """Attention of one token a row, query [rows, kv_heads, queries_per_kv_head, head_dim] -> `out`, shaped like it.

    With `rope`, cos and sin [rows, head_dim / 2], query is the fused projection's output [rows, (heads + 2 * kv_heads)
    * head_dim]: queries, keys, values. Then queries and keys are rotated, and keys and values written into the cache.

    A layer of 1B takes 0.2 ms for 660 tokens, and torch's own 0.4 (without AMX).
    """

    def __init__(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        scaling: float,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        import torch

        self._rows, self._kv_heads, queries_per_kv_head, self._head_dim = out.shape
        self._heads, self._dtype = self._kv_heads * queries_per_kv_head, out.dtype
        self._cache: tuple[Callable[[], torch.Tensor | None], ...] = (lambda: None, lambda: None)
        """Keys and values of the last step, which are freed where the cache has moved them since."""
        tensors = {"query": query, "out": out, "scaled_query": _fp32(out.numel())}
        layout: Layout = {
            "query": (out.dtype, tuple(out.shape)),
            "out": (out.dtype, tuple(out.shape)),
            "scaled_query": (torch.float32, (out.numel(),)),
        }
        if rope:
            tensors |= zip(("cos", "sin"), rope, strict=True)
            layout |= dict.fromkeys(("cos", "sin"), (out.dtype, (self._rows, self._head_dim // 2)))
            layout["query"] = out.dtype, (self._rows, (self._heads + 2 * self._kv_heads) * self._head_dim)
        self._args = KernelArgs(
            **addresses(tensors, layout),
            items=self._rows * self._kv_heads,
            kv_heads=self._kv_heads,
            queries_per_kv_head=queries_per_kv_head,
        )
        bf16 = query.dtype == torch.bfloat16
        self.launch = KernelLaunch(kernel(bf16, self._head_dim, scaling, rope is not None), self._args, tensors)

    def attend_to(
        self, keys: torch.Tensor, values: torch.Tensor, tokens: int, mask: torch.Tensor | None = None
    ) -> None:
        """Has `launch` attend to the first `tokens` of keys and values [rows or more, kv_heads, capacity, head_dim].

        The caller keeps those alive until then. `mask` [rows, tokens] is True where a token is seen; None is all. All
        three are contiguous.
        """
        args = self._args
        cached_keys, cached_values = (cached() for cached in self._cache)
        if keys is not cached_keys or values is not cached_values:  # the same ones serve many steps
            self._set_cache(keys, values)
        if tokens > args.capacity:
            raise Misfit(f"{tokens} tokens of keys that have room for {args.capacity}")
        mask = self._checked_mask(mask, tokens)
        scores = _scores_workspace.get(self._rows * self._heads * (tokens + SCORE_PADDING))
        self._alive = mask, scores  # as long as the arguments have their addresses
        args.mask, args.scores, args.tokens = mask.data_ptr(), scores.data_ptr(), tokens
        args.threads = threads_for(2 * tokens * self._rows * self._heads * self._head_dim)

    def _set_cache(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        rows, capacity = keys.shape[0], keys.shape[2]
        if rows < self._rows:
            raise Misfit(f"keys of {rows} rows, and not {self._rows}")
        layout: Layout = dict.fromkeys(
            ("keys", "values"), (self._dtype, (rows, self._kv_heads, capacity, self._head_dim))
        )
        places = addresses({"keys": keys, "values": values}, layout)
        self._cache = weakref.ref(keys), weakref.ref(values)
        self._args.keys, self._args.values, self._args.capacity = places["keys"], places["values"], capacity

    def _checked_mask(self, mask: torch.Tensor | None, tokens: int) -> torch.Tensor:
        import torch

        if mask is None:
            return all_shown(self._rows * tokens)
        addresses({"mask": mask}, {"mask": (torch.bool, (self._rows, tokens))})
        return mask

    def __call__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int, mask: torch.Tensor | None = None) -> None:
        self.attend_to(keys, values, tokens, mask)
        self.launch()


class _ScoresWorkspace(threading.local):
    """Each thread's memory for scores, which grows as needed."""

    _scores: torch.Tensor | None = None

    def get(self, size: int) -> torch.Tensor:
        if self._scores is None or len(self._scores) < size:
            self._scores = _fp32(2 * size)
        return self._scores


_scores_workspace = _ScoresWorkspace()


def _fp32(size: int) -> torch.Tensor:
    import torch

    return torch.empty(size, dtype=torch.float32, device="cpu")


def all_shown(size: int) -> torch.Tensor:
    """A mask that hides nothing."""
    return _ones(-(-size // 1024))[:size]


@lru_cache(maxsize=2)
def _ones(thousands: int) -> torch.Tensor:
    import torch

    return torch.ones(1024 * thousands, dtype=torch.bool, device="cpu")


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """The same in plain torch, without `rope`: out, shaped like query [rows, kv_heads, queries_per_kv_head, head_dim].

    keys, values [rows, kv_heads, tokens, head_dim]; mask [rows, tokens], True where a token is shown; None shows all.
    """
    scores = (query.float() * scaling) @ keys.float().mT
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], MASKED_SCORE)
    return (scores.softmax(-1) @ values.float()).to(query.dtype)


def _self_test(kernel: Kernel, run: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two rows of 13 tokens, with padding in one; pairs of heads share keys."""
    import torch

    from llava_cli.engine.cpu.jit.decoder_ops import reference_rope

    head_dim, scaling, with_rope = kernel.constants
    (rows, kv_heads, tokens), head_dim = (2, 3, 13), int(head_dim)
    query = kernel.sample(rows, kv_heads, 2, head_dim)
    keys, values = kernel.sample(2, rows, kv_heads, tokens, head_dim)
    mask = torch.ones(rows, tokens, dtype=torch.bool, device="cpu")
    mask[1, :2] = False
    out = torch.empty_like(query)
    if with_rope:
        angles = kernel.sample(rows, head_dim // 2)
        cos, sin = angles.cos(), angles.sin()
        new_keys, new_values = kernel.sample(2, rows, kv_heads, head_dim).add(1)
        qkv = torch.cat([part.flatten(1) for part in (query, new_keys, new_values)], 1)
        attention = DecodeAttention(qkv, out, scaling, (cos, sin))
        attention.attend_to(keys, values, tokens, mask)
        attention.launch.run_as(run)
        query = reference_rope(query.flatten(1, 2), cos, sin).view_as(query)
        yield keys[:, :, -1], reference_rope(new_keys, cos, sin)
        yield values[:, :, -1], new_values
    else:
        attention = DecodeAttention(query, out, scaling)
        attention.attend_to(keys, values, tokens, mask)
        attention.launch.run_as(run)
    yield out, reference(query, keys, values, mask, scaling)
