"""Memory: what is free of it, what a model takes, and how a run keeps to what it needs."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path


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


_V2, _V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
_CGROUPS = [
    (_V2, "memory.max", "memory.current", ("active_file", "inactive_file")),
    (_V1, "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
]


def peak() -> int:
    """Bytes that this process had at most."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        used = psutil.Process().memory_info()
        return int(getattr(used, "peak_wset", used.rss))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prepare_for_many(kernels: int) -> None:
    """What suits a process that answers many; to be called before there are threads, and before torch is loaded.

    oneDNN and torch each keep a kernel for every shape they have met, 1,000 of them: where shapes are many, that is
    300 MB. Of a batch, a part that is read needs 25 of oneDNN's, a step a dozen, and with 32 `kernels` in all nothing
    is lost; with 16 a tenth of the time went into making them anew. Requests that come as they like have more shapes:
    with 128 a server of a small model answers a fifth more of them than with 32.

    glibc does not hold ever more of what a long run once needed: one heap for all threads, and none for what is as
    large as a batch's activations, which goes back when it is let go: 11,000 pictures took 20 MB more than 1,000 that
    way, 55 where only tensors of 4 MB went back. What is free at the heap's end stays for the next pass, for to take
    and give it every time is a tenth of a batch's time.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(kernels))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(kernels // 2))
    with suppress(*_NOT_GLIBC):
        for parameter, value in _HEAP.items():
            _libc().mallopt(parameter, value)


_HEAP = {-8: 1, -3: 1 << 20, -1: 16 << 20}
"""M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD (bytes) of malloc.h."""


TIDY = 200
"""Answers after which a long run gives memory back."""


def give_back_memory() -> None:
    """Returns to the system what glibc keeps between what is in use: in a long run that becomes more and more."""
    with suppress(*_NOT_GLIBC):
        _libc().malloc_trim(0)


@contextmanager
def read_once(files: Iterable[Path]) -> Iterator[None]:
    """Meanwhile what is read of these files does not stay in memory, where they are mapped (on Linux).

    Of a checkpoint that is quantised each tensor is wanted once; in the end the 14 GB of a 7B stood beside its 4 bits.
    """
    names, ended = {os.path.realpath(file) for file in files}, threading.Event()

    def go_on() -> None:
        with suppress(AttributeError, OSError):  # another system
            while not ended.wait(_EVERY):
                _page_out(names)
            _page_out(names)

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def forget(begin: int, size: int) -> None:
    """Takes a file's pages, mapped at `begin`, out of this process' memory; the system may keep them (on Linux).

    They are read again when they are wanted. What was written to them is lost.
    """
    _advise(begin, size, _DONT_NEED)


def _page_out(names: Collection[str]) -> None:
    """Takes the pages of files of these names out of memory; they are read again when they are wanted."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        if name in names:
            begin, end = (int(number, 16) for number in addresses.split("-"))
            _advise(begin, end - begin, _PAGE_OUT)


def _advise(begin: int, size: int, advice: int) -> None:
    """It is advice: where the system does not take it, all goes on as it would have without."""
    if sys.platform == "linux":
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice)


_NOT_GLIBC = (AttributeError, OSError, TypeError)
"""What calling one of its functions raises where the C library is another one, or has no name (Windows)."""


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


_DONT_NEED = 4
"""MADV_DONTNEED of mman.h."""
_PAGE_OUT = 21
"""MADV_PAGEOUT: with it no change is lost, were there one."""
_EVERY = 0.5
"""Seconds."""


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
