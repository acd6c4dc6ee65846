"""Which instruction sets kernels are compiled for in a test, and how exact they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from llava_cli.engine.cpu.jit import compiler

if TYPE_CHECKING:
    from llava_cli.engine.cpu.jit.builder import IsaTier

ISAS = compiler.supported_isas()
"""Those that this CPU has, the best first."""
needs_kernels = pytest.mark.skipif(not ISAS, reason="nothing can be compiled for this CPU")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.004}
"""How far a kernel's output may be from its reference, relative to the norm."""


def use_isas(monkeypatch: pytest.MonkeyPatch, *isas: IsaTier) -> None:
    """Makes this a CPU with these instruction sets; without any, nothing can be compiled."""
    monkeypatch.setattr(compiler, "_host_isas", lambda: (isas, "" if isas else "no kernels in this test"))


def build_nothing(isa: IsaTier, bf16: bool) -> str:
    """A kernel that leaves its output as it is."""
    return "define void @run(ptr %args) { ret void }"


def build_call_with_too_few_arguments(isa: IsaTier, bf16: bool) -> str:
    """What LLVM ends its process on: an intrinsic of which this version has another form."""
    return """
        declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>)
        define void @run(ptr %args) {
            %x = load <16 x i32>, ptr %args
            %y = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %x, <16 x i32> %x)
            store <16 x i32> %y, ptr %args
            ret void
        }
    """
