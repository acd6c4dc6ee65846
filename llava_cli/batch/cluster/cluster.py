"""Ray: starts a cluster on this machine or joins one, says what it has, and hires workers there."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

from llava_cli import render
from llava_cli.batch.cluster.needs import Need, Node
from llava_cli.errors import LlavaError, ServerFailed, UsageError, message_line, os_reason, plain_message

EXTRA = "pip install 'llava-cli[ray]'"
START_HINT = "ray start --head on one machine, ray start --address=HOST:6379 on the others"
_CONNECT_SECONDS = 5.0
_OBJECT_STORE_BYTES = 100_000_000
"""Of a cluster that is started here: rows go to files, not through Ray."""
_THREADS = 4
"""Of an actor: it answers while it is asked how far it is."""
_TRIES = 10
GOES_ON = "the same command goes on, once there is a cluster again"
_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10_000,  # this machine is busy: it answers, too
    "health_check_failure_threshold": 3,
}


class ClusterGone(ServerFailed):
    """There is nothing left to talk to: also to end Ray's part of this process would end all of it."""


class WorkerGone(Exception):
    """A worker's process has ended, or its node has, or it cannot be reached any more."""

    def __init__(self, reason: str, is_unreachable: bool = False) -> None:
        super().__init__(reason)
        self.is_unreachable = is_unreachable


class Cluster:
    """A cluster that this process is connected to. Workers and refs, what is asked of them, are Ray's."""

    def __init__(self, ray: Any, address: str) -> None:
        self._ray, self._address = ray, address
        self._raylet = ray._private.worker._global_node.raylet_socket_name
        self._actor = ray.remote(_actor())
        self._names: dict[str, str] = {}
        """Of nodes, also of those that are gone, by their ids."""

    def check(self) -> None:
        """Raises `ServerFailed` where the cluster or this node of it is gone: the next call would end this process."""
        try:
            with socket.socket(socket.AF_UNIX) as raylet:
                raylet.connect(self._raylet)
            host, _, port = self._ray.get_runtime_context().gcs_address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            atexit.unregister(self._ray._private.worker.shutdown)  # which would end it, too
            raise ClusterGone(f"--ray {self._address}", f"the cluster is gone ({os_reason(error)})", GOES_ON) from None

    def nodes(self) -> list[Node]:
        """Those that are alive."""
        self.check()
        return [self._node(node) for node in self._ray.nodes() if node["Alive"]]

    def _node(self, node: dict[str, Any]) -> Node:
        has = node["Resources"]
        name = self._name(node["NodeID"], node["NodeManagerHostname"])
        return Node(node["NodeID"], name, int(has.get("CPU", 0)), has.get("GPU", 0.0), int(has.get("memory", 0)))

    def _name(self, node_id: str, host: str) -> str:
        """The name of a node's machine, with a number if others have the same one."""
        if node_id not in self._names:
            taken, number = set(self._names.values()), 1
            while (name := f"{host}-{number}" if number > 1 else host) in taken:
                number += 1
            self._names[node_id] = name
        return self._names[node_id]

    def name_of(self, node_id: str) -> str:
        return self._names.get(node_id) or next((node.name for node in self.nodes() if node.id == node_id), node_id[:8])

    def share(self, value: Any) -> Any:
        """A ref to a pickled value, which is sent once to each node that needs it."""
        return self._ray.put(self._ray.cloudpickle.dumps(value))

    def hire(self, need: Need) -> Any:
        """Asks for a worker, and returns at once: it is there once it answers."""
        self.check()
        options = {"num_cpus": need.cpus, "num_gpus": need.gpus, "memory": need.memory}
        fixed = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": _THREADS}
        return self._actor.options(**options, **fixed).remote()

    def run_on(self, node: Node, function: Callable[..., Any], *arguments: Any) -> Any:
        """A ref to what a function returns that runs on a node, beside the workers."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = self._ray.remote(num_cpus=0, max_retries=0)(function)
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        return task.options(scheduling_strategy=there).remote(*arguments)

    def place(self, worker: Any) -> Any:
        """A ref to the id of its node."""
        return worker.place.remote()

    def prepare(self, worker: Any, versions: dict[str, str], assignment: Any) -> Any:
        """A ref to what `Worker.prepare` returns, or to a line that says why there can be no `Worker`."""
        return worker.prepare.remote(versions, assignment)

    def ask(self, worker: Any, method: str, *arguments: Any) -> Any:
        """A ref to what a method of `Worker` returns."""
        return worker.ask.remote(method, *arguments)

    def wait(self, refs: Sequence[Any], seconds: float) -> list[Any]:
        """The refs that are ready, as soon as one is, or after so many seconds."""
        if not refs:
            time.sleep(seconds)
            return []
        self.check()
        ready, _ = self._ray.wait(list(refs), timeout=seconds, fetch_local=False)
        others = [ref for ref in refs if ref not in ready]
        if ready and others:
            ready += self._ray.wait(others, num_returns=len(others), timeout=0, fetch_local=False)[0]
        return list(ready)

    def result(self, ref: Any) -> Any:
        """Of a ref that is ready. Raises `WorkerGone`, or the `LlavaError` that the worker has raised."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, LlavaError):
                raise error.cause from None
            _show_debug(error)
            cause = error.cause if isinstance(error.cause, BaseException) else error
            raise WorkerGone(f"{type(cause).__name__}: {message_line(cause)}") from None
        except exceptions.RayError as error:
            _show_debug(error)
            is_unreachable = isinstance(error, exceptions.ActorUnavailableError)
            raise WorkerGone(plain_message(error).rstrip("."), is_unreachable) from None

    def dismiss(self, worker: Any) -> None:
        """Ends a worker at once, or asks for it no more."""
        with suppress(Exception):  # of a cluster that is gone, too
            self._ray.kill(worker)


def _is_debug() -> bool:
    return bool(os.environ.get("LLAVA_DEBUG"))


def _show_debug(error: BaseException) -> None:
    if _is_debug():
        sys.stderr.write(f"{error}\n")


def _actor() -> type:
    """The class of the actors. Ray sends it as code, since it is local: a node without llava can then say so."""

    class Worker:
        def place(self) -> str:
            import ray

            return str(ray.get_runtime_context().get_node_id())

        def prepare(self, versions: dict[str, str], assignment: bytes) -> Any:
            try:
                from llava_cli import fast_start
                from llava_cli.batch.cluster import worker
            except ImportError as error:
                return f"has no such llava ({error})"
            fast_start.start()  # the process is ours alone
            self.worker = worker.Worker()
            return self.worker.prepare(versions, assignment)

        def ask(self, method: str, *arguments: Any) -> Any:
            return getattr(self.worker, method)(*arguments)

    return Worker


def check_address(address: str) -> None:
    """Raises `UsageError` for what is no address or where Ray is missing, `ServerFailed` where nobody listens."""
    if address == "local" and "RAY_AUTH_MODE" not in os.environ:  # a token of its own, and none in ~/.ray
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    _imported()
    if address in ("local", "auto"):
        return
    if "://" in address:
        hint = "run this on a node of the cluster, with --ray auto; ray job submit -- llava batch … does"
        raise UsageError("--ray", f"{address} is for clients that are not in the cluster", hint)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError("--ray", f"{address!r} is neither local, auto nor HOST:PORT", "--ray local")
    try:  # Ray would try for a minute and more
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ServerFailed(f"--ray {address}", f"no cluster there ({os_reason(error)})", START_HINT) from None


@contextmanager
def connected(address: str, quiet: bool) -> Iterator[Cluster]:
    """Joins the cluster at an address (`HOST:PORT`, or `auto`), or starts one on this machine for `local`.

    Raises as `check_address`. What Ray prints is shown with LLAVA_DEBUG=1 only.
    """
    with ExitStack() as stack:
        options: dict[str, Any] = {"log_to_driver": _is_debug()}
        if not _is_debug():
            stack.enter_context(_silenced())
            logging.getLogger("ray").setLevel(logging.CRITICAL)
            options["logging_level"] = logging.CRITICAL
        ray = _imported()
        if address == "local":
            options |= _local_options(stack)
        else:
            options["address"] = _found(address)
        with _own_signals(), render.spinner("connecting to the cluster", quiet):
            _init(ray, address, options)
        try:
            yield Cluster(ray, address)
        except ClusterGone:
            if address == "local":
                ray._private.worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)
            raise
        except BaseException:
            ray.shutdown()
            raise
        ray.shutdown()


@contextmanager
def _silenced() -> Iterator[None]:
    """Only our own lines are printed: Ray's threads write to stdout what goes wrong, its C++ code to descriptor 2."""
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(nowhere))
        own = stack.enter_context(open(os.dup(2), "w", encoding=sys.stderr.encoding, errors="backslashreplace"))
        if sys.stderr is sys.__stderr__:
            stack.enter_context(redirect_stderr(own))
        os.dup2(nowhere.fileno(), 2)
        stack.callback(os.dup2, own.fileno(), 2)
        stack.callback(_leave_colors)
        yield


def _leave_colors() -> None:
    """Has colorama, which Ray loads, write nothing as this process ends: it would to the stdout of `_silenced`."""
    if initialise := sys.modules.get("colorama.initialise"):
        atexit.unregister(initialise.reset_all)


def _local_options(stack: ExitStack) -> dict[str, Any]:
    """Of a cluster on this machine, whose files are gone at the end, and which nobody else can use."""
    # The names of sockets have at most 107 bytes, so this is not in a TMPDIR that may be deep.
    folder = tempfile.mkdtemp(prefix="llava-", dir="/tmp" if os.path.isdir("/tmp") else None)
    stack.callback(_remove, folder)
    return {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": folder,
        "_system_config": _HEALTH,
    }


def _remove(folder: str) -> None:
    """Removes a folder into which processes that are being ended may write once more."""
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(0.2)


def _found(address: str) -> str:
    """The cluster's address; for `auto` that of the cluster on whose node this is. Raises as `check_address`."""
    if address != "auto":
        return address
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        found = str(os.environ.get("RAY_ADDRESS") or canonicalize_bootstrap_address_or_die("auto"))
    except Exception:
        raise ServerFailed("--ray auto", "no cluster on this machine", START_HINT) from None
    if found in ("local", "auto"):
        raise ServerFailed("--ray auto", f"RAY_ADDRESS={found} names no cluster", START_HINT)
    check_address(found)
    return found


def _init(ray: Any, address: str, options: dict[str, Any]) -> None:
    try:
        ray.init(**options)
    except SystemExit:  # from Ray's handler
        ray.shutdown()
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    except Exception as error:
        with suppress(Exception):
            ray.shutdown()
        _show_debug(error)
        words, hint = str(error), START_HINT
        if "ersion mismatch" in words:
            reason = "another version there: " + " ".join(words.split())
            hint = "the same versions of Python and Ray on all nodes, and here"
        elif "node_ip_address" in words or "raylet" in words.lower():
            reason, hint = "this machine is no node of it", "run this on a node of the cluster; ray start makes one"
        elif address != "local" and isinstance(error, ConnectionError):
            reason = "what listens there is no cluster, or has another token"
            hint = "RAY_AUTH_TOKEN=… or ~/.ray/auth_token has to be that of the cluster"
        else:
            reason = plain_message(error)
        raise ServerFailed(f"--ray {address}", reason, hint) from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray handles SIGTERM from its start on; at the end of the block this process does again."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _imported() -> Any:
    """Ray, which reads these variables as it is imported. Raises `UsageError`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UsageError("--ray", "needs ray, which is not installed", EXTRA) from None
    return ray
