"""How much memory this machine could give, and how much this process has taken."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


def free_memory(device: str, cards: Iterable[int] | None = None) -> int:
    """Bytes that a model may take: what is free on these GPUs (None: on all), else what the system could give."""
    if device == "cuda":
        import torch

        return sum(map(_free_on_card, range(torch.cuda.device_count()) if cards is None else cards))
    import psutil

    free = max(0, min([int(psutil.virtual_memory().available), *_left_in_cgroups(), *_left_of_addresses()]))
    return min(free, _left_for_metal()) if device == "mps" else free


def _free_on_card(card: int) -> int:
    """What torch's allocator holds and nobody uses is free, too: it stays with it for what comes next."""
    import torch

    unused = torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)
    return int(torch.cuda.mem_get_info(card)[0] + unused)


def _left_for_metal() -> int:
    """What Apple's GPUs may have of the system's memory, less what this process has of it."""
    import torch

    return max(0, int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))


def cards_of(model: Any) -> list[int] | None:
    """The GPUs that a model is on; None for one on no GPU."""
    placed = {*getattr(model, "hf_device_map", {}).values(), model.device} - {"disk"}
    if model.device.type != "cuda":
        return None
    import torch

    devices = [torch.device("cuda", place) if isinstance(place, int) else torch.device(place) for place in placed]
    return sorted({device.index or 0 for device in devices if device.type == "cuda"})


_CGROUP_ROOT, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CGROUP_FILES = {
    "": ("memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
}
"""By the folder below the root, which version 2 has none of: limit, usage, and the counters of cached files."""


def _left_in_cgroups() -> Iterator[int]:
    """What the limits of this process's cgroups leave, those of a container and of all groups around it."""
    for hierarchy, (limit_file, usage_file, cache_counters) in _CGROUP_FILES.items():
        root = _CGROUP_ROOT / hierarchy
        own = root / _own_cgroup(hierarchy).lstrip("/")
        for folder in {root, own, *(parent for parent in own.parents if root in parent.parents)}:
            try:
                limit, usage = (int((folder / name).read_text()) for name in (limit_file, usage_file))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such cgroup, or its limit is "max"
                continue
            # Cached files count as used, and the kernel drops them when memory is needed.
            yield limit - usage + sum(int(stat.get(name, 0)) for name in cache_counters)


def _own_cgroup(hierarchy: str) -> str:
    """The path of this process's group in the hierarchy of a controller; of version 2, for none."""
    try:
        lines = [line.split(":", 2) for line in _OWN_CGROUPS.read_text().splitlines()]
    except OSError:  # another system
        return ""
    return next((path for _, controllers, path in lines if hierarchy in controllers.split(",")), "")


def _left_of_addresses() -> Iterator[int]:
    """What `ulimit -v` leaves of this process's addresses: half, for files are mapped beside what becomes of them."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        import psutil

        yield (limit - int(psutil.Process().memory_info().vms)) // 2


def peak_memory() -> int:
    """The most bytes that this process has had resident."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> bool:
    """Has `peak_memory` begin anew with what is held now; returns whether this system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: the peak of the resident set
    except OSError:
        return False
    return True


def peak_memory_of_children() -> int:
    """The most bytes that each process which this one has started, and which still runs, has had resident; summed.

    Where the system does not tell that of other processes, what they have now.
    """
    import psutil

    total = 0
    for process in psutil.Process().children():
        with suppress(psutil.Error, OSError):
            total += _peak_of(process.pid) or int(process.memory_info().rss)
    return total


def _peak_of(pid: int) -> int:
    """A process's peak on Linux, else 0. Raises `OSError` where it has ended."""
    if sys.platform != "linux":
        return 0
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
