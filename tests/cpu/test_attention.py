"""`attend` for one query and for many: our kernels and torch's function against a reference in plain torch."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers.kernels import TOLERANCE, needs_kernels, use_isas
from helpers.linear_layers import AttentionModule

from llava_cli.engine.cpu import attention
from llava_cli.engine.cpu.attention import attend, kernels
from llava_cli.engine.cpu.jit import compiler
from llava_cli.engine.cpu.jit.builder import IsaTier
from llava_cli.engine.cpu.jit.compiler import Misfit
from llava_cli.engine.cpu.jit.prefill_attention import prefill_attention, reference

HEADS = [(4, 4, 8), (4, 4, 16), (6, 2, 80)]
"""heads, kv_heads, head_dim; of 8 there is no kernel, and 80 is no whole number of register blocks."""


def check_attend(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """With unused capacity behind the keys, and padding in one row, for one query, some, and all."""
    torch.manual_seed(0)
    rows, tokens, scaling = 5, 13, head_dim**-0.5
    key, value = (torch.randn(rows, kv_heads, 20, head_dim)[:, :, :tokens].to(dtype) for _ in range(2))
    padding = torch.ones(rows, 1, 1, tokens, dtype=torch.bool)
    padding[2, :, :, :4] = False
    for queries, causal in itertools.product((1, 7, tokens), (True, False)):
        query = torch.randn(rows, heads, queries, head_dim).to(dtype)
        shown = padding & torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
        added = torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, -1e9)
        for given, mask, masked_causal in (
            (None, None, causal),
            (shown, shown, False),
            (added, shown, False),
            (padding, padding, causal),
        ):
            expected = reference(query, key, value, mask, scaling, masked_causal).float()
            out, _ = attend(AttentionModule(causal, heads // kv_heads), query, key, value, given)
            assert out.isfinite().all()
            # Padding itself sees nothing, and may get any finite output.
            sees = torch.ones(rows, queries, dtype=torch.bool)
            if masked_causal or mask is shown:
                sees[2, : max(0, 4 - (tokens - queries))] = False
            assert (out.float() - expected)[sees].norm() <= TOLERANCE[dtype] * expected[sees].norm()


@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
def test_our_attention_equals_the_reference(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, isa: IsaTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_torchs_is_faster", lambda dtype, tokens: False)
    check_attend(heads, kv_heads, head_dim, dtype)


@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
def test_torchs_attention_equals_the_reference(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_isas(monkeypatch)
    check_attend(heads, kv_heads, head_dim, dtype)


@pytest.mark.parametrize("rows, heads, kv_heads, tokens, head_dim", [(2, 4, 4, 65, 32), (1, 8, 2, 130, 64)])
def test_many_tokens_in_several_threads(
    rows: int, heads: int, kv_heads: int, tokens: int, head_dim: int, isa: IsaTier
) -> None:
    """Strided as projections make them, token by token, with keys that share a register with hidden ones."""
    torch.manual_seed(0)
    query = torch.randn(rows, tokens, heads, head_dim).transpose(1, 2)
    key, value = (torch.randn(rows, tokens, kv_heads, head_dim).transpose(1, 2) for _ in range(2))
    out, _ = attend(AttentionModule(True), query, key, value, None)
    assert torch.allclose(out, reference(query, key, value, None, head_dim**-0.5, True), atol=1e-5)


def test_one_query_with_strides() -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 4, 7, 16)[:, :, -1:]  # the last of a prompt's
    both = torch.randn(3, 9, 4, 32).transpose(1, 2)
    key, value = both[..., :16], both[..., 16:]
    out, _ = attend(AttentionModule(True), query, key, value, None)
    assert torch.allclose(out, reference(query, key, value, None, 0.25, True), atol=1e-5)
    wide = torch.randn(3, 4, 9, 32)
    out, _ = attend(AttentionModule(True), query, key, wide, None)
    assert torch.allclose(out, reference(query, key, wide, None, 0.25, True), atol=1e-5)


@needs_kernels
def test_kernels_of_heads_whose_halves_are_no_whole_registers() -> None:
    """A kernel that rotates halves of 8 or 40 would write behind its buffers, in its own check already."""
    for head_dim in (16, 80):
        config = SimpleNamespace(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim)
        made = kernels(config, bf16=False, decodes=True)
        assert len(made) == 2
        assert compiler.find_problem(made) is None


@needs_kernels
@pytest.mark.parametrize("queries", [1, 7])
def test_heads_that_share_keys_unevenly_are_left_to_torch(queries: int) -> None:
    """Six heads of queries and four of keys: the last ones would read keys that do not exist."""
    query, key = torch.randn(1, 6, queries, 16), torch.randn(1, 4, 9, 16)
    with pytest.raises(RuntimeError):
        attend(AttentionModule(False), query, key, key, None)


@needs_kernels
def test_masks_and_outputs_of_many_queries_are_checked() -> None:
    query, key, out = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 9, 16), torch.zeros(2, 7, 4, 16)
    for shape in ((2, 1, 7, 9), (1, 1, 7, 9), (2, 1, 1, 9), (1, 1, 1, 9)):
        prefill_attention(out, query, key, key, torch.ones(shape, dtype=torch.bool), 1.0, False)()
    for shape in ((2, 1, 7, 5), (2, 1, 3, 9), (3, 1, 7, 9), (2, 1, 7, 100)):
        with pytest.raises((Misfit, RuntimeError)):
            prefill_attention(out, query, key, key, torch.ones(shape, dtype=torch.bool), 1.0, False)()
    for wrong in (torch.zeros(2, 7, 4, 8), torch.zeros(1, 7, 4, 16), out.bfloat16()):
        with pytest.raises(Misfit):
            prefill_attention(wrong, query, key, key, None, 1.0, False)()
    with pytest.raises(Misfit):
        prefill_attention(out, query, key, key.bfloat16(), None, 1.0, False)()
