"""How much memory this machine could give, and how much this process has taken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path


def free_memory(device: str) -> int:
    """Bytes that a model may take: what is free on all GPUs together, else what the system could give."""
    if device == "cuda":
        import torch

        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *_left_in_cgroups(), *_left_of_addresses()]))


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
