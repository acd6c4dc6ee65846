"""Kernels as machine code for this CPU, each made once, in 0.1 to 0.4 s, and kept in the user's cache.

Their threads are torch's own, for two pools would wait for each other's cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli import __version__, cache_files, limits
from llava_cli.models.registry import kernel_cache

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit import Layout
    from llava_cli.engine.cpu.jit.builder import Kind

SMALL = 1 << 19
"""Products that a thread makes in some 10 us."""


@cache
def kinds_here() -> tuple[Kind, ...]:
    """The kinds of instructions that there are kernels for here, the best one first.

    None on another processor than an x86 with AVX2, without llvmlite, where nobody may run what he has compiled, and
    where torch has other threads than OpenMP's.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not _openmp():
        return ()
    try:
        from llvmlite import binding

        from llava_cli.engine.cpu.jit.builder import KINDS

        binding.check_jit_execution()
    except (ImportError, OSError):
        return ()
    has = binding.get_host_cpu_features()
    return tuple(kind for kind in KINDS if all(has.get(need) for need in kind.needs))


def threads_for(products: int) -> int:
    """How many threads a kernel with so many products takes: to wake others for a few takes longer than to do them."""
    import torch

    return torch.get_num_threads() if products >= SMALL else 1


@cache
def _openmp() -> Any:
    """Where torch's threads come from: its library, through which that of OpenMP is found (on Linux)."""
    import torch

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
    except OSError:  # another system
        return None
    return library if hasattr(library, "GOMP_parallel") else None


Run = Callable[[Any], None]
"""Does the task that it is given."""


def compiled(write: Callable[..., str], kind: Kind, bf16: bool, *more: float) -> Run:
    """The `run` of what `write` writes for such instructions and numbers."""
    return ahead(write, kind, bf16, *more).result()


@cache
def ahead(write: Callable[..., str], kind: Kind, bf16: bool, *more: float) -> Future[Run]:
    """Begins with it, for it will be wanted."""
    return _compiler().submit(_compile, write, kind, bf16, *more)


class Misfit(ValueError):
    """A tensor is not what a kernel takes it for, which would read or write beyond it."""


def addresses(tensors: dict[str, torch.Tensor], layout: Layout, strided: Collection[str] = ()) -> dict[str, int]:
    """Where each tensor is, for a kernel that takes it to be as `layout` says; raises `Misfit` where it is not.

    All are in one piece, but for those of `strided`, whose last dimension alone is: the kernel is told their strides.
    """
    if tensors.keys() != layout.keys():
        raise Misfit(f"{sorted(tensors)} for a kernel that takes {sorted(layout)}")
    places = {}
    for name, tensor in tensors.items():
        dtype, shape = layout[name]
        in_order = tensor.stride(-1) == 1 if name in strided else tensor.is_contiguous()
        if tensor.dtype != dtype or tensor.shape != shape or not in_order or not tensor.is_cpu:
            raise Misfit(f"{name} is {tensor.dtype} {list(tensor.shape)} where a kernel takes {dtype} {list(shape)}")
        places[name] = tensor.data_ptr()
    return places


class Kernel:
    """Machine code and its task, done with each call. What the task only has the addresses of lives in `holds`."""

    def __init__(self, run: Run, task: ctypes.Structure, holds: Any = None) -> None:
        self.run, self.task, self.holds = run, task, holds
        self._given = ctypes.byref(task)

    def __call__(self) -> None:
        self.run(self._given)


def chained(calls: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """The same, but that kernels which follow each other are one: Python takes 1 us for each, and keeps its lock."""
    chain: list[Callable[[], object]] = []
    kernels: list[Kernel] = []
    for call in calls:
        if isinstance(call, Kernel):
            kernels.append(call)
            continue
        chain += [*_linked(kernels), call]
        kernels = []
    return chain + _linked(kernels)


def _linked(kernels: list[Kernel]) -> list[Kernel]:
    """As one; none of none."""
    if not kernels:
        return []
    from llava_cli.engine.cpu.jit.chain import Task, write

    pointers = ctypes.c_void_p * len(kernels)
    runs = pointers(*(ctypes.cast(kernel.run, ctypes.c_void_p).value for kernel in kernels))  # type: ignore[arg-type]
    tasks = pointers(*(ctypes.addressof(kernel.task) for kernel in kernels))
    task = Task(runs=ctypes.addressof(runs), tasks=ctypes.addressof(tasks), kernels=len(kernels))
    return [Kernel(compiled(write, kinds_here()[0], False), task, (runs, tasks, kernels))]


@cache
def _compiler() -> ThreadPoolExecutor:
    """One thread: LLVM makes one after the other."""
    return ThreadPoolExecutor(1, "compiler")


def _compile(write: Callable[..., str], kind: Kind, bf16: bool, *more: float) -> Run:
    import llvmlite
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.add_symbol("GOMP_parallel", ctypes.cast(_openmp().GOMP_parallel, ctypes.c_void_p).value)
    has = llvm.get_host_cpu_features()
    if kind.lanes < 16:  # as if it had no wider registers
        has.update({name: False for name in has if name.startswith(("avx512", "avx10", "amx"))})
    if not kind.vnni:
        has["avxvnni"] = False
    cpu = llvm.get_host_cpu_name()
    target = llvm.Target.from_default_triple().create_target_machine(cpu, has.flatten(), opt=3, jit=True)

    def make() -> bytes:
        module = llvm.parse_assembly(write(kind, bf16, *more))
        passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(module, passes)
        return bytes(target.emit_object(module))

    made_of = __version__, llvmlite.__version__, _source(), write.__module__, write.__name__, kind.name, bf16, more
    code = _kept(repr((*made_of, cpu, has.flatten())), make)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("run"))


@cache
def _source() -> str:
    """A digest of what kernels are written by."""
    return _digest(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


def _kept(name: str, make: Callable[[], bytes]) -> bytes:
    """What was made under that name before, in this process or another.

    A file that is not whole is made anew, and so is one that somebody else may have written.
    """
    path = kernel_cache() / f"{_digest(name.encode())[:32]}.o"
    with suppress(OSError):
        digest, _, code = cache_files.read(path, limits.CACHE_FILE_BYTES).partition(b"\n")
        if digest.decode("latin-1") == _digest(code):
            return code
    code = make()
    with suppress(OSError):  # without room for it the next start makes it again
        cache_files.put(path, [_digest(code).encode() + b"\n" + code])
    return code


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_engines: list[Any] = []
"""Code lives as long as what has made it."""
