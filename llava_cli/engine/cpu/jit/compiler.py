"""Compiles kernels for this CPU, compares each with plain torch once, and keeps its machine code in the user's cache.

Compiling takes 0.1 to 0.4 s a kernel, in a thread of its own. Kernels run on torch's OpenMP threads, because two thread
pools would wait for each other's cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import subprocess
import sys
from ast import literal_eval
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli import cache_files, limits, processes
from llava_cli._version import __version__
from llava_cli.hardware.cpu import cpu_features
from llava_cli.paths import kernel_cache

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit import Layout
    from llava_cli.engine.cpu.jit.builder import IsaTier

MIN_THREADED_PRODUCTS = 1 << 19
"""Multiplications that take one thread some 10 us, which is what waking the others costs."""
_TRUSTED_LLVM = 20, 22
"""Major versions that are known to compile all kernels. LLVM ends its process on an intrinsic that it cannot compile,
so any other version compiles in a process of its own first."""
_CHILD_SECONDS = 60
_FP32_TOLERANCE, _BF16_TOLERANCE = 1e-4, 0.01
"""How far results may be from torch's, as a share of their norm."""

Run = Callable[[Any], None]
"""A compiled kernel: takes a reference to its arguments."""
SelfTest = Callable[["Kernel", Run], "Iterable[tuple[torch.Tensor, torch.Tensor]]"]
"""Runs a kernel on small random tensors; yields what it computes, and what plain torch does."""


class KernelUnusable(Exception):
    """A kernel cannot be compiled here, or computes something else than torch does."""


class Misfit(ValueError):
    """A tensor is not what a kernel takes it for, so the kernel would read or write out of bounds."""


@dataclass(frozen=True)
class Kernel:
    """What can be compiled: a function that builds LLVM code, the constants in it, and how to test the result."""

    build: Callable[..., str]
    bf16: bool
    """Whether tensors are in bf16; else they are in fp32."""
    self_test: SelfTest = field(compare=False)
    constants: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.build.__module__.rpartition('.')[2]}.{self.build.__name__}"

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.bf16 else torch.float32

    def sample(self, *shape: int) -> torch.Tensor:
        """Random numbers for a self-test, always the same ones; leaves torch's own generator alone."""
        import torch

        generator = torch.Generator("cpu").manual_seed(sum(shape))
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(self.dtype)

    def compile_async(self) -> Future[Run]:
        """Starts compiling this kernel in the background; its Future raises `KernelUnusable`."""
        return _compile_async(self, best_isa())

    @property
    def run(self) -> Run:
        """The compiled kernel. Raises `KernelUnusable`."""
        return self.compile_async().result()


class KernelLaunch:
    """A kernel with its arguments; a call runs it. `keep_alive` owns the memory that the arguments point to."""

    def __init__(self, kernel: Kernel, args: ctypes.Structure, keep_alive: Any = None) -> None:
        self.kernel, self.args, self.keep_alive = kernel, args, keep_alive
        self._run: Run | None = None
        self._reference = ctypes.byref(args)

    def __call__(self) -> None:
        if self._run is None:
            self._run = self.kernel.run
        self._run(self._reference)

    def run_as(self, run: Run) -> None:
        """Runs code that is being tested."""
        run(self._reference)


# ---------------------------------------------------------------- which kernels there are here

_problems: list[str] = []
"""Why no further model of this process gets kernels: what is wrong with the first that was unusable."""


def supported_isas() -> tuple[IsaTier, ...]:
    """The instruction sets that kernels can be compiled for here, best first; none once a kernel was unusable."""
    return () if _problems else _host_isas()[0]


def best_isa() -> IsaTier:
    """The instruction set that kernels are compiled for."""
    return _host_isas()[0][0]


def find_problem(kernels: Iterable[Kernel]) -> str | None:
    """Waits until these kernels are compiled and tested; what is wrong with the first unusable one, if any.

    From then on `supported_isas` is empty: models that are loaded later go without kernels.
    """
    if not supported_isas():
        return None
    for future in [kernel.compile_async() for kernel in kernels]:
        if error := future.exception():
            _problems.append(str(error))
            return str(error)
    return None


def describe(list_kernels: Callable[[], Collection[Kernel]]) -> str:
    """Which kernels run here: "avx2, 9 compiled", or "none: " and why."""
    isas, obstacle = _host_isas()
    if not isas:
        return f"none: {obstacle}"
    kernels = list_kernels()
    problem = find_problem(kernels) or next(iter(_problems), None)
    return f"none: {problem}" if problem else f"{isas[0].name}, {len(kernels)} compiled"


@cache
def _host_isas() -> tuple[tuple[IsaTier, ...], str]:
    """The instruction sets of this CPU that kernels are written for, best first; or none, and why."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return (), f"no kernels for {platform.machine()}"
    if not _openmp():
        return (), "torch has no OpenMP threads"
    try:
        from llvmlite import binding

        from llava_cli.engine.cpu.jit.builder import ISA_TIERS

        binding.check_jit_execution()
    except ImportError:
        return (), "no llvmlite"
    except OSError:
        return (), "this system does not run code that was compiled here"
    isas = tuple(isa for isa in ISA_TIERS if cpu_features().issuperset(isa.required_features))
    return isas, "" if isas else "this CPU has no AVX2"


@cache
def _openmp() -> Any:
    """torch's library, through which its OpenMP is found; None where torch has other threads (outside Linux)."""
    import torch

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
    except OSError:  # another system
        return None
    return library if hasattr(library, "GOMP_parallel") else None


# ---------------------------------------------------------------- arguments


def threads_for(products: int) -> int:
    """How many threads a kernel with so many multiplications uses."""
    import torch

    return torch.get_num_threads() if products >= MIN_THREADED_PRODUCTS else 1


def addresses(tensors: dict[str, torch.Tensor], layout: Layout, strided: Collection[str] = ()) -> dict[str, int]:
    """Each tensor's address, for a kernel that relies on `layout`; raises `Misfit` where one is not like that.

    Tensors are contiguous, but for those in `strided`, of which the last dimension is: kernels get their strides.
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


# ---------------------------------------------------------------- compiling


@cache
def _compile_async(kernel: Kernel, isa: IsaTier) -> Future[Run]:
    return _compiler().submit(_compile, kernel, isa)


@cache
def _compiler() -> ThreadPoolExecutor:
    """One thread, because LLVM compiles one module at a time."""
    return ThreadPoolExecutor(1, "compiler")


def _compile(kernel: Kernel, isa: IsaTier) -> Run:
    """The kernel from the cache, or compiled and tested. Raises `KernelUnusable`."""
    try:
        path = _cache_path(kernel, isa)
        if code := _read_code(path):
            return _link(code, isa)
        code = _emit(kernel, isa)
        run = _link(code, isa)
        _check(kernel, run)
    except KernelUnusable:
        raise
    except Exception as error:  # whatever another version of LLVM has against it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise KernelUnusable(f"{kernel.name} cannot be compiled: {reason}") from error
    with suppress(OSError):  # without space for it the next start compiles again
        cache_files.atomic_write(path, [_digest(code).encode() + b"\n" + code])
    return run


def _check(kernel: Kernel, run: Run) -> None:
    """Raises `KernelUnusable` where what a kernel computes is too far from what torch does."""
    import torch

    bound = _BF16_TOLERANCE if kernel.bf16 else _FP32_TOLERANCE
    with torch.inference_mode():
        for actual, expected in kernel.self_test(kernel, run):
            error = float((actual.float() - expected.float()).norm() / expected.float().norm())
            if not error <= bound:  # nor where it is no number
                raise KernelUnusable(f"{kernel.name} differs from torch by {error:.1%}")


def _emit(kernel: Kernel, isa: IsaTier) -> bytes:
    """The kernel's object file."""
    from llvmlite import binding

    if binding.llvm_version_info[0] in _TRUSTED_LLVM:
        return _emit_here(kernel.build, isa, kernel.bf16, kernel.constants)
    words = kernel.build.__module__, kernel.build.__name__, isa.name, str(int(kernel.bf16))
    child = subprocess.run(
        processes.worker_command(__name__, *words, *map(repr, kernel.constants)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=_CHILD_SECONDS,
        check=False,
    )
    if child.returncode:
        version = ".".join(map(str, binding.llvm_version_info))
        raise KernelUnusable(f"{kernel.name} cannot be compiled by LLVM {version}")
    return child.stdout


def main() -> None:
    """The process of its own: writes the object file of the kernel that its arguments name to standard output."""
    from llava_cli.engine.cpu.jit.builder import ISA_TIERS

    module, name, isa_name, bf16, *constants = sys.argv[1:]
    isa = next(isa for isa in ISA_TIERS if isa.name == isa_name)
    numbers = tuple(literal_eval(number) for number in constants)
    code = _emit_here(getattr(import_module(module), name), isa, bf16 == "1", numbers)
    _load(code, isa, openmp=1)  # an address that nothing calls here
    sys.stdout.buffer.write(code)


def _emit_here(build: Callable[..., str], isa: IsaTier, bf16: bool, constants: tuple[float, ...]) -> bytes:
    from llvmlite import binding as llvm

    target = _target_machine(isa)
    module = llvm.parse_assembly(build(isa, bf16, *constants))
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return bytes(target.emit_object(module))


def _link(code: bytes, isa: IsaTier) -> Run:
    address = ctypes.cast(_openmp().GOMP_parallel, ctypes.c_void_p).value
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_load(code, isa, address))


def _load(code: bytes, isa: IsaTier, openmp: Any) -> int:
    """Loads an object file; the address of its `run`."""
    from llvmlite import binding as llvm

    llvm.add_symbol("GOMP_parallel", openmp)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine(isa))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address("run"))


_engines: list[Any] = []
"""Code lives as long as the engine that loaded it."""


def _target_machine(isa: IsaTier) -> Any:
    from llvmlite import binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, features = llvm.Target.from_default_triple(), _features(isa).flatten()
    return triple.create_target_machine(llvm.get_host_cpu_name(), features, opt=3, jit=True)


def _features(isa: IsaTier) -> Any:
    """This CPU's features without those that an instruction set does not use."""
    from llvmlite import binding as llvm

    features = llvm.get_host_cpu_features()
    if isa.lanes < 16:
        features.update({name: False for name in features if name.startswith(("avx512", "avx10", "amx"))})
    if not isa.vnni:
        features["avxvnni"] = False
    return features


# ---------------------------------------------------------------- the cache


def _cache_path(kernel: Kernel, isa: IsaTier) -> Path:
    """Where a kernel's code is kept: another file for all that it depends on."""
    import llvmlite
    from llvmlite import binding as llvm

    made_of = __version__, llvmlite.__version__, _source_digest(), kernel.name, isa.name, kernel.bf16, kernel.constants
    key = repr((*made_of, llvm.get_host_cpu_name(), _features(isa).flatten()))
    return kernel_cache() / f"{_digest(key.encode())[:32]}.o"


def _read_code(path: Path) -> bytes | None:
    """A kernel's code; None where the file does not exist, is damaged, or may have been written by another user."""
    with suppress(OSError):
        digest, _, code = cache_files.read(path, limits.CACHE_FILE_BYTES).partition(b"\n")
        if digest.decode("latin-1") == _digest(code):
            return code
    return None


@cache
def _source_digest() -> str:
    """Changes with the code that builds kernels."""
    return _digest(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
