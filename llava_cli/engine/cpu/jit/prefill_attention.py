"""Attention of a prompt's tokens, or of an image's patches, to each other.

    out[r, q, h] = softmax(scaling * query[r, h, q] @ keys[r, g].T, where mask[r, q]) @ values[r, g]

for rows r, query heads h, queries q, and g = h // queries_per_kv_head. Causal queries are the last of the tokens, and
see none behind themselves.

As in FlashAttention (Dao et al. 2022) a block of a few queries is finished before the next one, so that their scores
stay in the processor's cache and never are a matrix [queries, tokens] in memory. Unlike it, all of a query's scores are
there before its softmax, which therefore needs no rescaling. Keys are transposed once a head: a register then has one
element of as many keys as it has lanes, and no sum goes across lanes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llvmlite import ir

from llava_cli.engine.cpu.jit import MASK_STEP, MAX_QUERY_BLOCK
from llava_cli.engine.cpu.jit.builder import (
    F32,
    I8,
    I32,
    I64,
    MASKED_SCORE,
    IsaTier,
    KernelBuilder,
    Value,
    args_struct,
    splat_const,
)
from llava_cli.engine.cpu.jit.compiler import Kernel, KernelLaunch, Run, addresses, threads_for
from llava_cli.engine.cpu.jit.decode_attention import all_shown

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit import Layout

KernelArgs = args_struct(
    ("query", "out", "keys", "values", "mask", "workspace"),
    (
        *("heads", "queries_per_kv_head", "heads_per_item", "items", "queries", "tokens", "padded_tokens", "causal"),
        *("query_row_stride", "query_head_stride", "query_token_stride"),
        *("key_row_stride", "key_head_stride", "key_token_stride", "mask_row_stride", "mask_query_stride"),
        *("threads", "next", "next_thread"),
    ),
)
"""query [rows, heads, queries, head_dim], keys and values [rows, kv_heads, tokens, head_dim] with any strides, counted
in elements, the same ones for keys and values; out [rows, queries, heads, head_dim], contiguous. mask in bytes, 0 where
a token is hidden, is padded to `padded_tokens`, a multiple of any register's lanes. causal is 0 or 1.

An item of work is `heads_per_item` heads of a row that share their keys. The workspace, in fp32, has for each thread
transposed keys [head_dim, padded_tokens], scores [MAX_QUERY_BLOCK, padded_tokens] and queries [MAX_QUERY_BLOCK,
head_dim]; `next_thread` gives each thread its part.
"""


def build(isa: IsaTier, bf16: bool, head_dim: int, scaling: float) -> str:
    """LLVM assembly."""
    return str(_PrefillAttention(isa, bf16, head_dim, scaling).module)


class _PrefillAttention(KernelBuilder):
    def __init__(self, isa: IsaTier, bf16: bool, head_dim: int, scaling: float) -> None:
        super().__init__(KernelArgs, isa, bf16)
        self._head_dim, self._scaling, self._starts = head_dim, scaling, range(0, head_dim, isa.lanes)
        self._query_block, self._register_blocks = (
            (MAX_QUERY_BLOCK, (3, 1)) if isa.lanes == 16 else (MAX_QUERY_BLOCK // 2, (2, 1))
        )
        """Queries at once, and registers at once of keys that they are multiplied by, or of values that are summed."""
        attend = self._attend()
        with self.function("run"):
            self.set_arg("next_thread", 0)
            self.run_parallel(attend)

    def _attend(self) -> ir.Function:
        with self.function("attend") as function:
            b, head_dim = self.b, I64(self._head_dim)
            self._sums = [self.accumulators(self._register_blocks[0]) for _ in range(self._query_block)]
            self._largest, self._total = self.accumulators(2)
            self._inverse_totals = b.gep(b.alloca(ir.ArrayType(F32, MAX_QUERY_BLOCK)), [I32(0), I32(0)])
            self._tokens, self._padded_tokens = self.int_arg("tokens"), self.int_arg("padded_tokens")
            workspace_size = b.add(
                b.mul(self._padded_tokens, I64(self._head_dim + MAX_QUERY_BLOCK)),
                I64(MAX_QUERY_BLOCK * self._head_dim),
            )
            thread = self.fetch_add("next_thread", 1)
            self._transposed_keys = self.at(self.array_arg("workspace", F32), b.mul(thread, workspace_size))
            self._scores = self.at(self._transposed_keys, b.mul(self._padded_tokens, head_dim))
            self._scaled_queries = self.at(self._scores, b.mul(self._padded_tokens, I64(MAX_QUERY_BLOCK)))
            heads, heads_per_item, queries = (self.int_arg(name) for name in ("heads", "heads_per_item", "queries"))
            items_per_row = b.sdiv(heads, heads_per_item)
            with self.dynamic_loop(1, self.int_arg("items")) as (item, _):
                row, first_head = b.sdiv(item, items_per_row), b.mul(b.srem(item, items_per_row), heads_per_item)
                kv_head = b.sdiv(first_head, self.int_arg("queries_per_kv_head"))
                offset = self._offset(row, "key_row_stride", kv_head, "key_head_stride")
                self._keys = self.at(self.array_arg("keys"), offset)
                self._values = self.at(self.array_arg("values"), offset)
                self._transpose_keys()
                with self.loop(first_head, b.add(first_head, heads_per_item)) as head:
                    offset = self._offset(row, "query_row_stride", head, "query_head_stride")
                    head_queries = self.at(self.array_arg("query"), offset)
                    for begin, end, size in self.blocks(queries, (self._query_block, 1)):
                        with self.loop(begin, end, size) as first:
                            offset = self._offset(row, "mask_row_stride", first, "mask_query_stride")
                            mask = self.at(self.array_arg("mask", I8), offset)
                            self._weigh_tokens(head_queries, first, mask, size)
                            line = b.mul(b.add(b.mul(b.add(b.mul(row, queries), first), heads), head), head_dim)
                            out = self.at(self.array_arg("out"), line)
                            self._weigh_values(first, out, b.mul(heads, head_dim), size)
        return function

    def _offset(self, index: Value, stride: str, other_index: Value, other_stride: str) -> Value:
        return self.b.add(self.b.mul(index, self.int_arg(stride)), self.b.mul(other_index, self.int_arg(other_stride)))

    def _transpose_keys(self) -> None:
        """Keys [tokens, head_dim] -> [head_dim, padded_tokens]."""
        b = self.b
        with self.loop(I64(0), self._tokens) as token:
            key = self.at(self._keys, b.mul(token, self.int_arg("key_token_stride")))
            for start in self._starts:
                part = self.load_fp32(self.at(key, I64(start)))
                for lane in range(self.lanes):
                    line = b.mul(self._padded_tokens, I64(start + lane))
                    b.store(b.extract_element(part, I32(lane)), self.at(self._transposed_keys, line, token))

    def _end_of_causal(self, query: Value) -> Value:
        """The first token that a query does not see: the one behind itself, or the end where it sees all."""
        b = self.b
        behind = b.add(b.sub(self._tokens, self.int_arg("queries")), b.add(query, I64(1)))
        return b.select(b.icmp_signed("==", self.int_arg("causal"), I64(1)), behind, self._tokens)

    def _weigh_tokens(self, queries: Value, first: Value, mask: Value, count: int) -> None:
        """The softmax numerators of `count` queries, and one over their totals."""
        b, lanes, head_dim = self.b, self.lanes, self._head_dim
        for i in range(count):
            query = self.at(queries, b.mul(b.add(first, I64(i)), self.int_arg("query_token_stride")))
            for start in self._starts:
                scaled = b.fmul(self.load_fp32(self.at(query, I64(start))), splat_const(self._scaling, F32, lanes))
                self.store(scaled, self.at(self._scaled_queries, I64(i * head_dim + start)))
        end = self._end_of_causal(b.add(first, I64(count - 1)))
        registers = b.sdiv(b.add(end, I64(lanes - 1)), I64(lanes))
        for begin, stop, size in self.blocks(registers, self._register_blocks):
            with self.loop(begin, stop, size) as register:
                self._score(first, b.mul(register, I64(lanes)), mask, count, size)
        with self.loop(I64(0), I64(count)) as i:
            scores = self.at(self._scores, b.mul(self._padded_tokens, i))
            self.softmax_numerators(scores, I64(0), b.mul(registers, I64(lanes)), self._largest, self._total)
            b.store(b.fdiv(F32(1.0), self.sum(b.load(self._total))), self.at(self._inverse_totals, i))

    def _score(self, first: Value, token: Value, mask: Value, count: int, registers: int) -> None:
        """Scores of `count` queries with so many registers of keys, from `token` on."""
        b, lanes = self.b, self.lanes
        sums = [of_query[:registers] for of_query in self._sums[:count]]
        self.clear(itertools.chain(*sums))
        with self.loop(I64(0), I64(self._head_dim)) as column:
            line = self.at(self._transposed_keys, b.mul(column, self._padded_tokens), token)
            keys = [self.load(self.at(line, I64(j * lanes)), F32, lanes) for j in range(registers)]
            for i, of_query in enumerate(sums):
                query = self.broadcast(b.load(self.at(self._scaled_queries, column, I64(i * self._head_dim))))
                for key, accumulator in zip(keys, of_query, strict=True):
                    self.accumulate(accumulator, query, key)
        lane_numbers = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        for i, of_query in enumerate(sums):
            end = self.broadcast(b.trunc(self._end_of_causal(b.add(first, I64(i))), I32))
            mask_line = b.mul(self.int_arg("mask_query_stride"), I64(i))
            for j, accumulator in enumerate(of_query):
                first_key = b.add(token, I64(j * lanes))
                key_numbers = b.add(lane_numbers, self.broadcast(b.trunc(first_key, I32)))
                in_time = b.icmp_signed("<", key_numbers, end)
                mask_bytes = self.load(self.at(mask, mask_line, first_key), I8, lanes)
                shown = b.and_(in_time, b.icmp_unsigned("!=", mask_bytes, splat_const(0, I8, lanes)))
                score = b.select(shown, b.load(accumulator), splat_const(MASKED_SCORE, F32, lanes))
                self.store(score, self.at(self._scores, b.mul(self._padded_tokens, I64(i)), first_key))

    def _weigh_values(self, first: Value, out: Value, out_stride: Value, count: int) -> None:
        """Sums of values times softmax numerators, over the numerators' totals, for `count` queries."""
        b = self.b
        end = self._end_of_causal(b.add(first, I64(count - 1)))
        inverse_totals = [self.broadcast(b.load(self.at(self._inverse_totals, I64(i)))) for i in range(count)]
        remaining = list(self._starts)
        while remaining:
            size = next(size for size in self._register_blocks if size <= len(remaining))
            starts, remaining = remaining[:size], remaining[size:]
            sums = [of_query[:size] for of_query in self._sums[:count]]
            self.clear(itertools.chain(*sums))
            with self.loop(I64(0), end) as token:
                value = self.at(self._values, b.mul(token, self.int_arg("key_token_stride")))
                parts = [self.load_fp32(self.at(value, I64(start))) for start in starts]
                for i, of_query in enumerate(sums):
                    numerator = b.load(self.at(self._scores, b.mul(self._padded_tokens, I64(i)), token))
                    numerator = self.broadcast(numerator)
                    for part, accumulator in zip(parts, of_query, strict=True):
                        self.accumulate(accumulator, numerator, part)
            for i, of_query in enumerate(sums):
                for start, accumulator in zip(starts, of_query, strict=True):
                    mean = b.fmul(b.load(accumulator), inverse_totals[i])
                    self.store_rounded(mean, self.at(out, b.mul(out_stride, I64(i)), I64(start)))


def kernel(bf16: bool, head_dim: int, scaling: float) -> Kernel:
    return Kernel(build, bf16, _self_test, (head_dim, scaling))


def prefill_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    causal: bool,
) -> KernelLaunch:
    """Attention of many queries, of the shapes that `attend` takes, to be written to `out`, which is contiguous.

    A layer of 1B takes 8 ms for 620 tokens, and torch's own 12 in fp32 and 20 in bf16 (without AMX).
    """
    import torch
    from torch.nn.functional import pad

    (rows, heads, queries, head_dim), (_, kv_heads, tokens, _) = query.shape, key.shape
    if key.stride() != value.stride() or key.stride(-1) != 1:
        key, value = key.contiguous(), value.contiguous()
    query = query if query.stride(-1) == 1 else query.contiguous()
    padded_tokens = -(-tokens // MASK_STEP) * MASK_STEP
    padding = padded_tokens - tokens
    mask = all_shown(padded_tokens)[None, None] if mask is None else pad(mask[:, 0], (0, padding)).contiguous()
    threads, queries_per_kv_head = threads_for(2 * tokens * query.numel()), heads // kv_heads
    heads_per_item = queries_per_kv_head if rows * kv_heads >= 4 * threads else 1
    workspace = torch.empty(
        threads * (padded_tokens * (head_dim + MAX_QUERY_BLOCK) + MAX_QUERY_BLOCK * head_dim),
        dtype=torch.float32,
        device="cpu",
    )
    mask_per_row, mask_per_query = len(mask) > 1, mask.shape[1] > 1
    tensors = {"query": query, "out": out, "keys": key, "values": value, "mask": mask, "workspace": workspace}
    layout: Layout = {
        "query": (query.dtype, (rows, heads, queries, head_dim)),
        "out": (query.dtype, (rows, queries, heads, head_dim)),
        **dict.fromkeys(("keys", "values"), (query.dtype, (rows, kv_heads, tokens, head_dim))),
        "mask": (torch.bool, (rows if mask_per_row else 1, queries if mask_per_query else 1, padded_tokens)),
        "workspace": (torch.float32, (len(workspace),)),
    }
    dimensions = ("row_stride", "head_stride", "token_stride")
    strides = {
        **{f"query_{name}": stride for name, stride in zip(dimensions, query.stride(), strict=False)},
        **{f"key_{name}": stride for name, stride in zip(dimensions, key.stride(), strict=False)},
        "mask_row_stride": mask.stride(0) if mask_per_row else 0,
        "mask_query_stride": mask.stride(1) if mask_per_query else 0,
    }
    args = KernelArgs(
        **addresses(tensors, layout, strided=("query", "keys", "values")),
        **strides,
        heads=heads,
        queries_per_kv_head=queries_per_kv_head,
        heads_per_item=heads_per_item,
        items=rows * heads // heads_per_item,
        queries=queries,
        tokens=tokens,
        padded_tokens=padded_tokens,
        causal=int(causal),
        threads=threads,
    )
    return KernelLaunch(kernel(query.dtype == torch.bfloat16, head_dim, scaling), args, tensors)


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    causal: bool,
) -> torch.Tensor:
    """The same in plain torch: out [rows, queries, heads, head_dim].

    mask [rows or 1, 1, queries or 1, tokens] is True where a token is shown; None shows all.
    """
    import torch

    queries, tokens = query.shape[2], keys.shape[2]
    keys, values = (part.float().repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (keys, values))
    shown = torch.ones(queries, tokens, dtype=torch.bool)
    shown = shown.tril(tokens - queries) if causal else shown
    shown = shown if mask is None else shown & mask
    scores = (query.float() * scaling @ keys.mT).masked_fill(~shown, MASKED_SCORE)
    return (scores.softmax(-1) @ values).transpose(1, 2).to(query.dtype)


def _self_test(kernel: Kernel, run: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two rows of 21 tokens, with padding in one; the last 19 are causal queries, and heads share keys in pairs."""
    import torch

    head_dim, scaling = kernel.constants
    (rows, heads, queries, tokens), head_dim = (2, 4, 19, 21), int(head_dim)
    query = kernel.sample(rows, heads, queries, head_dim)
    key, value = kernel.sample(2, rows, heads // 2, tokens, head_dim)
    mask = torch.ones(rows, 1, 1, tokens, dtype=torch.bool, device="cpu")
    mask[1, ..., :2] = False
    out = torch.empty(rows, queries, heads, head_dim, dtype=query.dtype, device="cpu")
    prefill_attention(out, query, key, value, mask, scaling, True).run_as(run)
    yield out, reference(query, key, value, mask, scaling, True)
