"""Machine code for this CPU: `kernel`'s products, each made once in a process, in 0.4 s.

Their threads are torch's own, for two pools would wait for each other's cores.
"""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_cli.engine.kernel import Kind


@cache
def kinds_here() -> tuple[Kind, ...]:
    """The kinds of instructions that there are products for here, the best one first.

    None of them on another processor than an x86 with AVX2, without llvmlite, or where torch has no OpenMP.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not _openmp():
        return ()
    try:
        from llvmlite.binding import get_host_cpu_features

        from llava_cli.engine.kernel import KINDS
    except ImportError:
        return ()
    has = get_host_cpu_features()
    return tuple(kind for kind in KINDS if all(has.get(need) for need in kind.needs))


@cache
def _openmp() -> Any:
    """What torch's threads come from, as it is loaded (on Linux)."""
    import torch

    _ = torch.get_num_threads()
    try:
        found = re.search(r"/\S*/lib(?:gomp|iomp5|omp)\b\S*", Path("/proc/self/maps").read_text())
    except OSError:
        return None
    library = ctypes.CDLL(found[0]) if found else None
    return library if hasattr(library, "GOMP_parallel") else None


def ahead(bits: int, bf16: bool) -> None:
    """Begins to make the best product for such weights and activations, which will be wanted."""
    if kinds := kinds_here():
        _made(bits, bf16, kinds[0])


def product(bits: int, bf16: bool, kind: Kind) -> Callable[[Any], None]:
    """What does a task that it is given a reference to; see `kernel` for what that is."""
    return _made(bits, bf16, kind).result()


@cache
def _made(bits: int, bf16: bool, kind: Kind) -> Future[Callable[[Any], None]]:
    return _maker().submit(_make, bits, bf16, kind)


@cache
def _maker() -> ThreadPoolExecutor:
    """One thread: LLVM's code is made one after the other."""
    return ThreadPoolExecutor(1, "compiler")


def _make(bits: int, bf16: bool, kind: Kind) -> Callable[[Any], None]:
    import llvmlite.binding as llvm

    from llava_cli.engine.kernel import KINDS, written

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.add_symbol("GOMP_parallel", ctypes.cast(_openmp().GOMP_parallel, ctypes.c_void_p).value)
    has = llvm.get_host_cpu_features()
    for better in KINDS[: KINDS.index(kind)]:  # than what is asked for: without what only it needs
        has.update(dict.fromkeys(set(better.needs) - set(kind.needs), False))
    cpu = llvm.get_host_cpu_name()
    target = llvm.Target.from_default_triple().create_target_machine(cpu, has.flatten(), opt=3, jit=True)
    module = llvm.parse_assembly(written(bits, bf16, kind))
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    _engines.append(engine)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("multiply"))


_engines: list[Any] = []
"""Code lives as long as what has made it."""
