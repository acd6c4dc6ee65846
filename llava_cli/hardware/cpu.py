"""Which CPU this is, and which instructions it has."""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from llava_cli.settings import is_fast

_CPUINFO = Path("/proc/cpuinfo")
_FEATURE_LINES = ("flags", "Features")
"""What lines of `/proc/cpuinfo` with a core's instruction sets begin with: on x86, and on Arm."""
_TORCH_CHECKS = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
"""Instruction sets that torch knows of where there is no `/proc/cpuinfo`, and the function of `torch.cpu` that does."""
BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Instructions that multiply in bf16: of Intel and AMD, and Arm's. Without any of them bf16 is emulated."""


@cache
def cpu_features() -> frozenset[str]:
    """This CPU's instruction sets, by Linux's names: `avx2`, `avx512_vnni`, … Elsewhere only those with bf16."""
    lines = [line for line in _cpuinfo() if line.startswith(_FEATURE_LINES)]
    if lines or sys.platform == "linux":
        return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()
    import torch

    return frozenset(name for name, check in _TORCH_CHECKS.items() if getattr(torch.cpu, check, bool)())


def has_bf16() -> bool:
    """Whether this CPU multiplies in bf16 itself. Emulated, a 1B takes ten times as long to read a prompt."""
    return not BF16_FEATURES.isdisjoint(cpu_features())


def may_have_kernels() -> bool:
    """Whether kernels are likely to be compiled for this CPU, of which only compiling and testing them makes sure."""
    suits = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64") and "avx2" in cpu_features()
    return suits and is_fast() and all(find_spec(name) for name in ("llvmlite", "llava_cli.engine.cpu"))


def cpu_model() -> str:
    """The CPU's name."""
    lines = [line for line in _cpuinfo() if line.startswith("model name")]
    return lines[0].partition(":")[2].strip() if lines else platform.processor() or platform.machine()


@cache
def _cpuinfo() -> tuple[str, ...]:
    try:
        return tuple(_CPUINFO.read_text("utf-8", "replace").splitlines())
    except OSError:  # another system
        return ()
