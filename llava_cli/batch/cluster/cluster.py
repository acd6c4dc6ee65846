"""Ray: starts a cluster on this machine, or joins one. Nothing else in the package calls it, but the driver's loop."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import Any

from llava_cli.batch.cluster.needs import Need, Node
from llava_cli.batch.cluster.worker import Assignment, Worker
from llava_cli.errors import LlavaError, ServerFailed, UsageError, message_line

EXTRA = "pip install 'llava-cli[ray]'"
_CONNECT_SECONDS = 5.0
_OBJECT_STORE_BYTES = 100_000_000
"""Of a cluster that is started here: rows go to files, not through Ray."""
_THREADS = 4
"""Of an actor: it answers while it is asked how far it is."""
_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
START_HINT = "ray start --head on one machine, ray start --address=HOST:6379 on the others"


class Cluster:
    """A cluster that this process is connected to. Refs are Ray's."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def nodes(self) -> list[Node]:
        """Those that are alive."""
        return [_node(node) for node in self._ray.nodes() if node["Alive"]]

    def hire(self, assignment: Assignment, need: Need) -> Any:
        """Asks for a worker, and returns at once: it is there once its methods answer."""
        options = {"num_cpus": need.cpus, "num_gpus": need.gpus, "memory": need.memory}
        fixed = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": _THREADS}
        return self._ray.remote(Worker).options(**options, **fixed).remote(assignment)

    def wait(self, refs: Sequence[Any], seconds: float) -> list[Any]:
        """The refs that are ready after so many seconds at most."""
        ready, _ = self._ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)
        if not ready:
            ready, _ = self._ray.wait(list(refs), timeout=seconds, fetch_local=False)
        return list(ready)

    def result(self, ref: Any) -> Any:
        """Of a ref that is ready. Raises `WorkerGone`, or the `LlavaError` that the worker has raised."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            if isinstance(cause, LlavaError):
                raise cause from None
            if os.environ.get("LLAVA_DEBUG"):
                sys.stderr.write(f"{error}\n")
            raise WorkerGone(message_line(cause)) from None
        except exceptions.RayError as error:
            raise WorkerGone(message_line(error)) from None

    def dismiss(self, worker: Any) -> None:
        """Ends a worker at once."""
        with suppress(Exception):
            self._ray.kill(worker)


class WorkerGone(Exception):
    """A worker's process has ended, or its node has."""


def _node(node: dict[str, Any]) -> Node:
    has = node["Resources"]
    name = node["NodeManagerHostname"]
    return Node(node["NodeID"], name, int(has.get("CPU", 0)), has.get("GPU", 0.0), int(has.get("memory", 0)))


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """Joins the cluster at an address (`HOST:PORT`, or `auto`), or starts one on this machine for `local`.

    Raises `UsageError`, or `ServerFailed` where there is none.
    """
    ray = _imported()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))  # rows do not go there
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL", "include_dashboard": False}
        if address == "local":
            # The names of sockets have at most 107 bytes, so this is not in a TMPDIR that may be deep.
            folder = tempfile.mkdtemp(prefix="llava-", dir="/tmp" if os.path.isdir("/tmp") else None)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            options |= {"_temp_dir": folder, "object_store_memory": _OBJECT_STORE_BYTES, "_system_config": _HEALTH}
        else:
            _probe(address)
            del options["include_dashboard"]
            options["address"] = address
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ServerFailed(f"--ray {address}", message_line(error), START_HINT) from None
        stack.callback(ray.shutdown)
        yield Cluster(ray)


def _imported() -> Any:
    """Ray, which then reports its use to nobody. Raises `UsageError`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UsageError("--ray", "needs ray, which is not installed", EXTRA) from None
    return ray


def _probe(address: str) -> None:
    """Raises for what is no address, or where nobody listens: Ray would try for a minute and more."""
    if address == "auto":
        return
    if address.startswith("ray://"):
        hint = "run this on a node of the cluster, with --ray auto; ray job submit -- llava batch … does"
        raise UsageError("--ray", f"{address} is for clients that are not in the cluster", hint)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError("--ray", f"{address!r} is neither local, auto nor HOST:PORT", "--ray local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ServerFailed(f"--ray {address}", f"no cluster there ({message_line(error)})", START_HINT) from None
