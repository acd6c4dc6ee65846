"""Tests of kernels run once for each instruction set that this CPU has."""

from __future__ import annotations

import pytest
import torch
from helpers.kernels import ISAS, use_isas

from llava_cli.engine.cpu import onednn_linear
from llava_cli.engine.cpu.jit.builder import IsaTier


@pytest.fixture(params=ISAS, ids=lambda isa: isa.name)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> IsaTier:
    """An instruction set of this CPU, which kernels are compiled for in this test."""
    use_isas(monkeypatch, request.param)
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["best", "avx2", "amx"])
def each_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with this one's best instruction set, one with that which all have, and one with fast int8 products."""
    if request.param == "avx2":
        use_isas(monkeypatch, *ISAS[-1:])
    monkeypatch.setattr(onednn_linear, "is_fastest_here", lambda: request.param == "amx")
