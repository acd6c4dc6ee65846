"""A Ray cluster of several raylets on this machine, which a test may kill one by one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_OBJECT_STORE_BYTES = 80_000_000
_FAST_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""A killed raylet is found dead in 3 seconds, not in 14."""


class Raylets:
    """A head without CPUs, and nodes with one each."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._nodes: list[Any] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> None:
        """A node, which has room for a worker. In the main thread only."""
        self._nodes.append(self._cluster.add_node(num_cpus=1, object_store_memory=_OBJECT_STORE_BYTES))

    def kill_node(self, number: int) -> None:
        """Ends a node's raylet; its worker goes on until it finds that out."""
        node = self._nodes.pop(number)
        os.kill(_raylet(node), signal.SIGKILL)

    def workers(self) -> list[int]:
        """The process ids of all workers with our actor."""
        raylets = {_raylet(node) for node in self._nodes}
        return [pid for pid, parent, title in _processes() if parent in raylets and title.startswith("ray::Worker")]


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _processes() -> Iterator[tuple[int, int, str]]:
    """Process ids with that of the parent and the title."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            yield int(folder.name), int(parent), (folder / "cmdline").read_bytes().decode(errors="replace")


@contextmanager
def raylets(nodes: int) -> Iterator[Raylets]:
    """A head with so many nodes. Ends all of their processes."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": _FAST_HEALTH_CHECKS})
    try:
        found = Raylets(cluster)
        for _ in range(nodes):
            found.add()
        yield found
    finally:
        cluster.shutdown()
