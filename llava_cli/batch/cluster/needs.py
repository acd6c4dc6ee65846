"""What a worker asks of a node: processors, memory, a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava_cli.errors import OutOfMemory
from llava_cli.hardware.device import choose_plan
from llava_cli.loader import find_checkpoint
from llava_cli.models.checkpoint_files import CONFIG
from llava_cli.models.footprint import footprint, sizes_of
from llava_cli.models.registry import BUILTIN
from llava_cli.models.validate import check_files
from llava_cli.models.weight_files import check_weights
from llava_cli.settings import LoadOptions, Settings

MOST_CPUS = 8
"""Of a worker, unless there is a GPU or their number is given: more threads gain little."""
_OF_SERVER = 250_000_000
"""Bytes of a worker whose model is elsewhere, or is the built-in one."""


@dataclass(frozen=True)
class Node:
    """A machine of a cluster, with what it has in all."""

    id: str
    name: str
    cpus: int
    gpus: float
    memory: int
    """Bytes."""


@dataclass(frozen=True)
class Need:
    """What a worker takes."""

    cpus: int
    gpus: float
    memory: int
    """Bytes."""

    def __str__(self) -> str:
        gpu = f", {self.gpus:.2g} GPU" if self.gpus else ""
        return f"{self.cpus} CPU{'s' * (self.cpus > 1)}, {self.memory / 1e9:.1f} GB{gpu}"

    def fits(self, node: Node) -> int:
        """How many workers a node has room for."""
        counts = [node.cpus // self.cpus, node.memory // self.memory]
        if self.gpus:
            counts.append(int(node.gpus / self.gpus + 1e-6))
        return min(counts)


def need_of(settings: Settings, nodes: Sequence[Node], workers: int | None) -> Need:
    """What each of so many workers takes, or, for None, of as many as there is room for. Loads no weights."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    if settings.remote.server:
        return Need(1, 0, _OF_SERVER)
    memory = memory_of(settings.load)
    if gpus and settings.load.device in ("auto", "cuda"):
        per_gpu = max(1, -(-(workers or 1) // int(gpus)))
        return Need(max(1, min(MOST_CPUS, int(cpus / gpus) // per_gpu)), 1 / per_gpu, memory)
    if workers:
        return Need(max(1, cpus // workers), 0, memory)
    return Need(min([MOST_CPUS, *(node.cpus for node in nodes if node.cpus)]), 0, memory)


def memory_of(options: LoadOptions) -> int:
    """Bytes of a model in the precision that is asked for."""
    checkpoint = find_checkpoint(options)
    if checkpoint.name == BUILTIN:
        return _OF_SERVER
    sizes = sizes_of(checkpoint, check_weights(checkpoint), check_files(checkpoint)[CONFIG])
    return footprint(sizes, choose_plan(options.device, options.precision, options.attention)).total


def no_room(model: str, need: Need, nodes: Sequence[Node]) -> OutOfMemory:
    """The error where no node has room for a worker."""
    largest = max(nodes, key=lambda node: (node.gpus, node.memory, node.cpus))
    has = f"{largest.cpus} CPUs, {largest.memory / 1e9:.1f} GB, {largest.gpus:.2g} GPUs"
    hint = "fewer --workers, or -p 4bit, need less; or add a larger node"
    return OutOfMemory(model, f"a worker needs {need}; the largest node, {largest.name}, has {has}", hint)
