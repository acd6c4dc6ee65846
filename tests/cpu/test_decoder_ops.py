"""What stands between a decoder's matrix products: each kernel against its reference, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from helpers.kernels import needs_kernels

from llava_cli.engine.cpu.jit.builder import IsaTier
from llava_cli.engine.cpu.jit.compiler import Misfit
from llava_cli.engine.cpu.jit.decoder_ops import (
    add_rms_norm,
    apply_rope,
    reference_add_rms_norm,
    reference_rope,
    reference_swiglu,
    swiglu,
)

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Half of the last bit, or one bit where both round differently."""


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    rounding = ROUNDING[found.dtype]
    assert found.dtype == expected.dtype
    assert torch.allclose(found, expected, rtol=rounding, atol=rounding)


def test_norm(dtype: torch.dtype, isa: IsaTier) -> None:
    torch.manual_seed(0)
    for tokens, hidden_size in ((1, 64), (7, 192), (40, 2048)):
        x, delta = (torch.randn(tokens, hidden_size).to(dtype) for _ in range(2))
        weight, normed = torch.randn(hidden_size).to(dtype), torch.empty_like(x)
        residual, expected = reference_add_rms_norm(x, delta, weight, 1e-5)
        add_rms_norm(x, delta, weight, normed, 1e-5)()
        assert torch.equal(x, residual)
        assert_close(normed, expected)


def test_swiglu(dtype: torch.dtype, isa: IsaTier) -> None:
    """Also of numbers whose exponential overflows, and of NaN."""
    torch.manual_seed(0)
    for tokens, ffn_size in ((1, 16), (7, 176), (40, 5632)):
        gate_up = torch.randn(tokens, 2 * ffn_size).mul_(4).to(dtype)
        gate_up[0, :3] = torch.tensor([-200.0, 200.0, float("nan")])
        out = torch.empty(tokens, ffn_size, dtype=dtype)
        swiglu(gate_up, out)()
        assert out[0, 2].isnan()
        assert_close(out.nan_to_num(), reference_swiglu(gate_up).nan_to_num())


def test_rope(dtype: torch.dtype, isa: IsaTier) -> None:
    """Into a cache that has tokens, and room for more rows and tokens."""
    torch.manual_seed(0)
    cached = 3
    for rows, row_tokens, heads, kv_heads, head_dim in ((1, 1, 4, 4, 32), (2, 7, 6, 2, 64)):
        tokens = rows * row_tokens
        qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
        angles = torch.rand(tokens, head_dim // 2) * 6
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        cache_shape = rows + 1, kv_heads, cached + row_tokens + 2, head_dim
        keys, values = (torch.randn(cache_shape).to(dtype) for _ in range(2))
        query, key, value = qkv.clone().split((heads, kv_heads, kv_heads), 1)
        expected_keys, expected_values = keys.clone(), values.clone()
        for expected, part in ((expected_keys, reference_rope(key, cos, sin)), (expected_values, value)):
            by_row = part.view(rows, row_tokens, kv_heads, head_dim).transpose(1, 2)
            expected[:rows, :, cached : cached + row_tokens] = by_row
        apply_rope(qkv.view(tokens, -1), cos, sin, keys, values, heads, rows, cached)()
        assert_close(qkv[:, :heads], reference_rope(query, cos, sin))
        assert_close(keys, expected_keys)
        assert torch.equal(values, expected_values)


@needs_kernels
def test_tensors_are_checked() -> None:
    x, weight = torch.zeros(6, 64), torch.ones(64)
    for wrong in (torch.ones(63), weight.bfloat16(), torch.ones(128)[::2]):
        with pytest.raises(Misfit):
            add_rms_norm(x, x.clone(), wrong, x.clone(), 1e-5)
    for wrong in (torch.zeros(5, 64), x.bfloat16(), torch.zeros(6, 128)[:, ::2]):
        with pytest.raises(Misfit):
            add_rms_norm(x, wrong, weight, x.clone(), 1e-5)
        with pytest.raises(Misfit):
            add_rms_norm(x, x.clone(), weight, wrong, 1e-5)
    for gate_up in (torch.zeros(6, 127), torch.zeros(5, 128), torch.zeros(6, 128).bfloat16()):
        with pytest.raises(Misfit):
            swiglu(gate_up, x)


@needs_kernels
def test_a_cache_without_room_is_refused() -> None:
    qkv, angles = torch.zeros(6, (4 + 2 * 2) * 32), torch.zeros(6, 16)
    cache = torch.zeros(2, 2, 5, 32)
    apply_rope(qkv, angles, angles, cache, cache.clone(), 4, 2, 2)()
    for keys, cached in (
        (cache, 3),
        (cache[:1], 2),
        (cache[:, :1].contiguous(), 2),
        (cache[..., :16].contiguous(), 2),
        (cache.bfloat16(), 2),
        (torch.zeros(2, 2, 10, 32)[:, :, ::2], 2),
    ):
        with pytest.raises(Misfit):
            apply_rope(qkv, angles, angles, keys, keys, 4, 2, cached)
    with pytest.raises(Misfit):
        apply_rope(qkv, angles[:, :15], angles, cache, cache, 4, 2, 2)
