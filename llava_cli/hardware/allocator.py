"""How a process gives memory back: the heap's, oneDNN's and torch's caches, and the pages of mapped files."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

TRIM_EVERY = 200
"""Answers after which a long run calls `trim_heap`."""
_HEAP = {-8: 1, -3: 1 << 20, -1: 16 << 20}
"""glibc's M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD (bytes), from malloc.h."""
_MADV_DONTNEED = 4
_MADV_PAGEOUT = 21  # loses no change to a page, if there were one
_PAGE_OUT_SECONDS = 0.5
_NOT_GLIBC = (AttributeError, OSError, TypeError)
"""What calling one of its functions raises where the C library is another one, or has no name (Windows)."""


def use_threads(count: int) -> None:
    """Has this process compute with so many threads, on a machine that it shares with others of its kind."""
    os.environ["OMP_NUM_THREADS"] = str(count)  # for torch, whose import a process may never need
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)


def limit_caches(primitives: int) -> None:
    """Keeps a process that answers many requests from growing. Call it before any thread starts or torch is imported.

    oneDNN and torch each cache a primitive per shape that they have met, 1,000 by default; where shapes vary, that is
    300 MB. A batch needs 25 of oneDNN's to read a part and a dozen for a step: with 32 `primitives` nothing is lost,
    with 16 a tenth of the time goes into making them anew. A server's requests have more shapes: with 128 it answers a
    fifth more of them on a small model than with 32.

    glibc gets one heap for all threads and maps anything as large as a batch's activations, which then goes back to
    the system when it is freed: 11,000 pictures took 20 MB more than 1,000 that way, 55 MB where only tensors of 4 MB
    were mapped. 16 MB at the heap's end stay for the next pass: taking and returning them each time is a tenth of a
    batch's time.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(primitives))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(primitives // 2))
    with suppress(*_NOT_GLIBC):
        for parameter, value in _HEAP.items():
            _libc().mallopt(parameter, value)


def trim_heap() -> None:
    """Returns to the system the free memory that glibc keeps between blocks in use; in a long run that adds up."""
    with suppress(*_NOT_GLIBC):
        _libc().malloc_trim(0)


def empty_device_cache(device: str) -> None:
    """Returns to a GPU what torch keeps of its memory for later, after something large is gone."""
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


@contextmanager
def read_once(files: Iterable[Path]) -> Iterator[None]:
    """Meanwhile pages of these files leave memory soon after they are read through a mapping (on Linux).

    So does what is free between blocks of the heap. Quantizing needs each tensor of a checkpoint once, and packing one
    layer at a time; without this a 7B's 14 GB end up beside its 4-bit weights.
    """
    names, ended = {os.path.realpath(file) for file in files}, threading.Event()

    def page_out_repeatedly() -> None:
        with suppress(AttributeError, OSError):  # another system
            is_last = False
            while not is_last:
                is_last = ended.wait(_PAGE_OUT_SECONDS)
                _page_out(names)
                trim_heap()

    thread = threading.Thread(target=page_out_repeatedly, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def release_pages(address: int, size: int) -> None:
    """Drops a mapped file's pages from this process; the next access reads them again, from the page cache if it can.

    Changes to a private mapping are lost.
    """
    _madvise(address, size, _MADV_DONTNEED)


def _page_out(names: Collection[str]) -> None:
    """Drops the pages of mapped files with these names from memory, in all processes."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        if name in names:
            begin, end = (int(number, 16) for number in addresses.split("-"))
            _madvise(begin, end - begin, _MADV_PAGEOUT)


def _madvise(address: int, size: int, advice: int) -> None:
    """Where the system does not take the advice, nothing changes."""
    if sys.platform == "linux":
        _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
