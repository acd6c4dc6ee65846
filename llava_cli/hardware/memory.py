"""How much memory this machine could give, and how much this process has taken."""

from __future__ import annotations

import sys
from pathlib import Path


def free_memory(device: str) -> int:
    """Bytes that a model may take: what is free on all GPUs together, else what the system could give."""
    if device == "cuda":
        import torch

        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    import psutil

    free = int(psutil.virtual_memory().available)
    for folder, limit_file, usage_file, cache_counters in _CGROUPS:  # a container's own limit
        try:
            limit, usage = (int((folder / name).read_text()) for name in (limit_file, usage_file))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such cgroup, or its limit is "max"
            continue
        # Cached files count as used, and the kernel drops them when memory is needed.
        free = min(free, limit - usage + sum(int(stat.get(name, 0)) for name in cache_counters))
    return max(free, 0)


_V2, _V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
_CGROUPS = [
    (_V2, "memory.max", "memory.current", ("active_file", "inactive_file")),
    (_V1, "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
]


def peak_memory() -> int:
    """The most bytes that this process has had resident."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
