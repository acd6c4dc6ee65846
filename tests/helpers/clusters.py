"""A Ray cluster of several nodes on this machine, for tests; and what kills its parts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

_NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}
_HEAD = {"include_dashboard": False, "no_monitor": True}
"""No page, and nothing that would add nodes by itself."""
_SETTINGS = {
    "enable_worker_prestart": False,  # of processes for workers that nobody has asked for
    "health_check_initial_delay_ms": 1000,  # a node that was killed is missed after 3 s in place of 14
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
_WAIT_SECONDS = 240
_ACTOR = re.compile(r"ray::(?!IDLE|\w+Agent)")
"""What Ray calls processes that have an actor, and are not its own."""


class TestCluster:
    """Raylets with one CPU each."""

    __test__ = False

    def __init__(self, cluster: Any, variables: dict[str, str]) -> None:
        """`variables` are of the environment of its nodes and of what runs there."""
        self._cluster, self._variables = cluster, variables
        self.address: str = cluster.address

    @property
    def nodes(self) -> list[Any]:
        """All but the head."""
        return list(self._cluster.worker_nodes)

    def add_node(self) -> None:
        """Returns once it is there."""
        with _environment(self._variables):
            self._cluster.add_node(**_NODE)

    def kill_node(self, node: Any) -> None:
        """Kills its raylet, and nothing else: its workers go on until they miss it."""
        node.kill_raylet(check_alive=False)
        self._cluster.worker_nodes.discard(node)

    def workers(self) -> list[psutil.Process]:
        """The processes of our actors, by their age; not those whose raylet is gone."""
        ours = [one for one in psutil.Process().children(recursive=True) if _ACTOR.match(_title(one))]
        return sorted(ours, key=lambda process: process.pid)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Of this process, and of those that it starts meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@contextmanager
def cluster_of(nodes: int, **variables: str) -> Iterator[TestCluster]:
    """A cluster with so many nodes, one of which is the head; `variables` are of their environment alone."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets have short names
    Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)  # where Ray notes the address of the newest cluster
    head = {**_NODE, **_HEAD, "_system_config": _SETTINGS, "temp_dir": folder}
    with _environment(ENVIRONMENT):
        with _environment(variables):
            cluster = Cluster(initialize_head=True, head_node_args=head, connect=False)
        try:
            it = TestCluster(cluster, variables)
            for _ in range(nodes - 1):
                it.add_node()
            yield it
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


class Driver:
    """`llava batch … --ray ADDRESS` as a process, and its output."""

    def __init__(self, *arguments: str | Path, output: Path, script: str = "") -> None:
        """`script` is Python that runs in the place of the command, with the same arguments."""
        program = ["-c", script] if script else ["-m", "llava_cli"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.output, self.run = output, Path(f"{output}.run")
        environment = {**os.environ, **ENVIRONMENT}
        self.process = subprocess.Popen(
            [sys.executable, *program, "batch", *map(str, arguments), "-o", str(output)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
        )

    @property
    def printed(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def parts(self) -> int:
        """The ranges that are committed."""
        return len(list(self.run.glob("part-*")))

    def until(self, reached: Callable[[], bool]) -> None:
        """Waits for something that the run does."""
        end = time.monotonic() + _WAIT_SECONDS
        while not reached():
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < end, self.printed
            time.sleep(0.02)

    def wait(self) -> int:
        return self.process.wait(_WAIT_SECONDS)

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        return self.wait()
