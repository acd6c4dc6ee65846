"""Attention of one token a row: the kernel against its reference, and what it refuses."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers.kernels import TOLERANCE, needs_kernels

from llava_cli.engine.cpu.jit.builder import IsaTier
from llava_cli.engine.cpu.jit.compiler import Misfit
from llava_cli.engine.cpu.jit.decode_attention import DecodeAttention, reference
from llava_cli.engine.cpu.jit.decoder_ops import reference_rope

SHAPES = [
    # (rows, kv_heads, queries_per_kv_head, head_dim), capacity, tokens
    ((1, 4, 1, 64), 40, 33),
    ((3, 2, 4, 32), 64, 64),
    ((2, 2, 3, 128), 700, 661),
    ((1, 2, 1, 80), 19, 1),
    ((1, 1, 3, 256), 9, 7),
    ((5, 2, 3, 16), 20, 13),
]


def test_it_equals_the_reference(dtype: torch.dtype, isa: IsaTier) -> None:
    """Without a mask, and with padding before tokens and between them."""
    torch.manual_seed(0)
    for shape, capacity, tokens in SHAPES:
        query, (rows, heads, _, head_dim) = torch.randn(shape).to(dtype), shape
        keys, values = (torch.randn(rows, heads, capacity, head_dim).to(dtype) for _ in range(2))
        some = torch.rand(rows, tokens) > 0.3
        some[:, -1], some[0, : tokens // 2] = True, False
        for mask in (None, some):
            out = torch.empty_like(query)
            DecodeAttention(query, out, 0.3)(keys, values, tokens, mask)
            expected = reference(query, keys[:, :, :tokens], values[:, :, :tokens], mask, 0.3).float()
            assert (out.float() - expected).norm() <= TOLERANCE[dtype] * expected.norm(), (shape, mask is None)


def test_it_keeps_no_cache_alive(isa: IsaTier) -> None:
    """A layer's would stand beside the buffers that its keys and values have been moved to."""
    query, keys, values = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 8, 64), torch.randn(1, 1, 8, 64)
    attention = DecodeAttention(query, torch.empty_like(query), 0.3)
    attention(keys, values, 8)
    freed = weakref.ref(keys)
    moved = keys.clone()
    del keys
    assert freed() is None
    attention(moved, values, 8)


def test_with_rope_it_rotates_and_appends_to_the_cache(dtype: torch.dtype, isa: IsaTier) -> None:
    torch.manual_seed(0)
    rows, kv_heads, group, head_dim, tokens = 3, 2, 3, 32, 14
    heads = kv_heads * group
    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim).to(dtype)
    angles = torch.rand(rows, head_dim // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = (torch.randn(rows, kv_heads, 20, head_dim).to(dtype) for _ in range(2))
    out = torch.empty(rows, kv_heads, group, head_dim, dtype=dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    query, new_keys, new_values = qkv.split((heads, kv_heads, kv_heads), 1)
    expected_keys[:, :, tokens - 1], expected_values[:, :, tokens - 1] = reference_rope(new_keys, cos, sin), new_values
    DecodeAttention(qkv.flatten(1), out, 0.3, (cos, sin))(keys, values, tokens)
    bound = TOLERANCE[dtype]
    assert torch.equal(values, expected_values)
    assert torch.allclose(keys, expected_keys, rtol=2 * bound, atol=2 * bound)
    rotated = reference_rope(query.float(), cos, sin).view(out.shape)
    expected = reference(rotated, expected_keys[:, :, :tokens], expected_values[:, :, :tokens], None, 0.3)
    assert (out.float() - expected).norm() <= bound * expected.norm()


@needs_kernels
def test_keys_values_and_mask_are_checked() -> None:
    query, out = torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16)
    keys = torch.zeros(2, 2, 20, 16)
    attention = DecodeAttention(query, out, 0.3)
    attention(keys, keys.clone(), 20, torch.ones(2, 20, dtype=torch.bool))
    mask = torch.ones(2, 20, dtype=torch.bool)
    for wrong in (
        (keys, keys, 21, None),
        (keys[:1], keys[:1], 20, None),
        (keys[:, :1].contiguous(), keys[:, :1].contiguous(), 20, None),
        (keys, keys[:, :, :10].contiguous(), 10, None),
        (keys[..., :8].contiguous(), keys[..., :8].contiguous(), 20, None),
        (keys, keys.bfloat16(), 20, None),
        (keys[:, :, ::2], keys[:, :, ::2], 10, None),
        (keys, keys.clone(), 20, mask[:, :19]),
        (keys, keys.clone(), 20, mask[:1]),
        (keys, keys.clone(), 20, mask.float()),
    ):
        with pytest.raises(Misfit):
            attention(*wrong)
    for wrong_query in (query[:1], query.bfloat16(), query[..., :8], query.view(2, -1)):
        with pytest.raises(Misfit):
            DecodeAttention(wrong_query, out, 0.3)
    with pytest.raises(Misfit):
        DecodeAttention(torch.zeros(2, 10 * 16), out, 0.3, (torch.zeros(2, 8), torch.zeros(2, 7)))
