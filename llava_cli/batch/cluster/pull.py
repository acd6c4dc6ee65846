"""`llava models pull NAME --ray ADDRESS`: downloads a model on each node of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llava_cli import render
from llava_cli.batch.cluster.cluster import WorkerGone, check_address, connected
from llava_cli.errors import LlavaError, ModelUnusable, UsageError
from llava_cli.files import quoted
from llava_cli.models.registry import is_folder

_POLL_SECONDS = 1.0


def pull_on_cluster(name: str, address: str) -> None:
    """Downloads an alias or repo on all nodes at once, and prints a line for each of them.

    Raises as `connected`, `UsageError` for what cannot be downloaded, and `ModelUnusable` if some node has not got it.
    """
    command = f"llava models pull {quoted(name)}"
    if address == "local":
        raise UsageError("--ray", "local is this machine alone", command)
    if is_folder(name):
        raise UsageError(name, "a folder is not downloaded", "copy it to a folder that all nodes share")
    check_address(address)
    with connected(address, quiet=False) as cluster:
        nodes = cluster.nodes()
        refs = {cluster.run_on(node, _pulling(), name): node for node in nodes}
        failed: list[str] = []

        def settle(ref: Any) -> None:
            node = refs.pop(ref)
            try:
                render.note(f"node {node.name}: {cluster.result(ref)}")
            except (LlavaError, WorkerGone) as error:
                failed.append(node.name)
                hint = getattr(error, "hint", "")
                hint = "" if hint in ("", command) else f"\n  {hint}"
                render.note(f"llava: node {node.name}: {error}{hint}")

        with render.spinner(f"downloading on {len(nodes)} node{'s' * (len(nodes) > 1)}"):
            while refs:
                for ref in cluster.wait(list(refs), _POLL_SECONDS):
                    settle(ref)
    if failed:
        reason = f"{len(failed)} of {len(nodes)} nodes lack it: {', '.join(failed)}"
        raise ModelUnusable(name, reason, f"{command} --ray {quoted(address)} goes on where it was cut off")


def _pulling() -> Callable[[str], str]:
    """What a node does. Ray sends it as code, since it is local: a node without llava can then say so."""

    def pull(name: str) -> str:
        try:
            from llava_cli.models import download
            from llava_cli.models.validate import check_files
        except ImportError as error:
            raise RuntimeError(f"has no such llava ({error})") from None
        return str(download.pull(name, lambda done, total: None, check=check_files))

    return pull
