"""What this machine is, and what suits it: device, precision, attention, memory."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llava_cli.errors import UsageError
from llava_cli.settings import Device, Precision, Settings


@dataclass(frozen=True)
class Plan:
    """How a model will be run here, and why."""

    device: str
    precision: str
    attention: str
    why: str


def plan(device: Device, precision: Precision) -> Plan:
    """Turns "auto" into what is best here. Raises `UsageError` for a device that is not there."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    here: dict[Device, bool] = {"cuda": cuda, "mps": mps, "cpu": True}
    if device == "auto":
        device = next(name for name, there in here.items() if there)
    elif not here[device]:
        raise UsageError(f"--device {device}", "this machine has none", "llava doctor shows what it has")
    if precision == "auto":
        chosen, why = native(device)
    else:
        chosen, why = precision, "as asked"
        if precision in ("8bit", "4bit") and importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError(f"--precision {precision}", "bitsandbytes is missing", "pip install bitsandbytes")
    return Plan(device, chosen, _attention(device, chosen), why)


def native(device: str) -> tuple[str, str]:
    """The 16 or 32 bits that a device is fast and exact enough in, and why: what quantised models compute in too."""
    import torch

    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU computes in bf16"
        return "fp16", "this GPU has no bf16"
    if device == "mps":
        return "fp16", "fp16 is what Apple GPUs are fastest at"
    # Never fp16 here: CPUs emulate it, twenty times slower than bf16 or fp32.
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, ask, bool)() for ask in asks) or _arm_bf16():
        return "bf16", "this CPU has bf16 instructions"
    return "fp32", "this CPU has no bf16 instructions"


def _arm_bf16() -> bool:
    try:
        return " bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _attention(device: str, precision: str) -> str:
    """FlashAttention 2 where it is installed and the GPU (Ampere or later) has it, else torch's own."""
    import torch
    from transformers.utils.import_utils import is_flash_attn_2_available

    if device == "cuda" and precision != "fp32" and torch.cuda.get_device_capability() >= (8, 0):
        return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    return "sdpa"


def free_memory(device: str) -> int:
    """Bytes that a model may take: on a GPU what is free on all of them, else what the system could give."""
    if device == "cuda":
        import torch

        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    import psutil

    free = int(psutil.virtual_memory().available)
    for folder, limit, used, cached in _CGROUPS:  # a container's own limit
        try:
            held = int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Cached files count as used, and are given back when memory is wanted.
            free = min(free, int((folder / limit).read_text()) - held + sum(int(stat.get(c, 0)) for c in cached))
        except (OSError, ValueError):  # none here, or "max"
            continue
    return max(free, 0)


def prepare_for_many(kernels: int) -> None:
    """What suits a process that answers many; to be called before there are threads, and before torch is loaded.

    oneDNN and torch each keep a kernel for every shape they have met, 1,000 of them: where shapes are many, that is
    300 MB. Of a batch, a part that is read needs 25 of oneDNN's, a step a dozen, and with 32 `kernels` in all nothing
    is lost; with 16 a tenth of the time went into making them anew. Requests that come as they like have more shapes:
    with 128 a server of a small model answers a fifth more of them than with 32.

    Threads of torch that wait for each other soon leave the cores to what opens pictures and prepares prompts: 8 %
    more pictures a second with a small model.

    glibc does not hold ever more of what a long run once needed: one heap for all threads, and none for what is as
    large as a batch's activations, which goes back when it is let go: 11,000 pictures took 20 MB more than 1,000 that
    way, 55 where only tensors of 4 MB went back. What is free at the heap's end stays for the next pass, for to take
    and give it every time is a tenth of a batch's time.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(kernels))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(kernels // 2))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        for parameter, value in _HEAP.items():
            libc.mallopt(parameter, value)


_HEAP = {-8: 1, -3: 1 << 20, -1: 16 << 20}
"""M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD (bytes) of malloc.h."""


TIDY = 200
"""Answers after which a long run gives memory back."""


def give_back_memory() -> None:
    """Returns to the system what glibc keeps between what is in use: in a long run that becomes more and more."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


_V2, _V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
_CGROUPS = [
    (_V2, "memory.max", "memory.current", ("active_file", "inactive_file")),
    (_V1, "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
]

BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "8bit": 1.15, "4bit": 0.7}
"""What one weight takes, the parts of a quantised model that stay 16-bit averaged in."""


def best_fit(parameters: float) -> str:
    """The best precision at which a model of so many weights fits this machine, or "no".

    Looks at a GPU only where NVIDIA's driver is: a list of names should not wait for torch.
    """
    gpu = Path("/proc/driver/nvidia").exists() and free_memory("cuda")
    memory = gpu or free_memory("cpu")
    for precision in ("bf16", "8bit", "4bit"):
        # A tenth more for activations and the KV cache.
        if parameters * BYTES_PER_WEIGHT[precision] * 1.1 <= memory:
            return precision
    return "no"


def report(settings: Settings) -> dict[str, str]:
    """What `llava doctor` prints."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import psutil
    import torch

    from llava_cli.registry import default_name

    how = plan(settings.device, settings.precision)
    memory = psutil.virtual_memory()
    found = {
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cpu": f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "memory": f"{memory.total / 1e9:.1f} GB, {free_memory('cpu') / 1e9:.1f} GB free",
    }
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found[f"gpu {i}"] = f"{torch.cuda.get_device_name(i)}, {total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
    found |= {"device": how.device, "precision": f"{how.precision} ({how.why})", "attention": how.attention}
    found["default model"] = default_name(settings)
    for package in ("torch", "transformers", "bitsandbytes", "accelerate", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
