"""The head's largest logits are exact, and heads of other kinds are left alone."""

from __future__ import annotations

import pytest
import torch
from helpers.kernels import needs_kernels

from llava_cli.engine.cpu.lm_head import LmHead
from llava_cli.engine.cpu.packed_weights import PackedWeightStore


@needs_kernels
def test_the_largest_logits_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LmHead, "MIN_WEIGHTS", 0)
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 9600, bias=False, dtype=torch.bfloat16)
    head = LmHead.for_head(linear, PackedWeightStore())
    assert head
    with torch.inference_mode():
        one, many = (torch.randn(1, n, 128, dtype=torch.bfloat16) for n in (1, 3))
        logits, exact = head(one)[0, 0], torch.nn.functional.linear(one.float(), linear.weight.float())[0, 0]
        assert (logits - exact).norm() < 0.02 * exact.norm()
        largest, ids = exact.topk(10)
        assert torch.equal(logits.topk(10).indices, ids)
        assert torch.allclose(logits[ids], largest)
        assert torch.equal(head(many), linear(many))


@needs_kernels
def test_the_largest_logits_of_allowed_tokens_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LmHead, "MIN_WEIGHTS", 0)
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 9600, bias=False, dtype=torch.bfloat16)
    head = LmHead.for_head(linear, PackedWeightStore())
    assert head
    with torch.inference_mode():
        one = torch.randn(1, 1, 128, dtype=torch.bfloat16)
        logits, exact = head(one)[:, -1], torch.nn.functional.linear(one.float(), linear.weight.float())[0]
        is_allowed = exact < exact.topk(500).values[0, -1]  # none of those that are exact already
        for few in (is_allowed, is_allowed & (torch.arange(9600) % 320 == 0)):
            masked = torch.where(few, logits, -torch.inf)
            largest, ids = torch.where(few, exact, -torch.inf).topk(20)
            assert not torch.allclose(masked[0, ids[0]], largest[0], rtol=1e-5)
            found = head.largest_logits(masked, logits)
            assert torch.equal(found.topk(20).indices, ids)
            assert torch.allclose(found[0, ids[0]], largest[0], rtol=1e-5)
            assert torch.equal(found.isfinite()[0], few[0])
        others = logits.clone()  # of another hidden state, for all that the head knows
        assert torch.equal(head.largest_logits(others.clone(), others), others)


def test_other_heads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LmHead, "MIN_WEIGHTS", 0)
    for other in (
        torch.nn.Linear(128, 500, bias=False, dtype=torch.bfloat16),
        torch.nn.Linear(96, 512, bias=False, dtype=torch.bfloat16),
        torch.nn.Linear(128, 512, dtype=torch.bfloat16),
        torch.nn.Identity(),
    ):
        assert LmHead.for_head(other, PackedWeightStore()) is None
