"""What a worker asks of a node: processors, memory, a GPU."""

from __future__ import annotations

import math
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
_BUSY = 0.9
"""Share of the CPUs at work: with more of them a worker is faster, with fewer none is left over."""
_GPU_PARTS = 10_000
"""Of a GPU, in Ray's precision."""
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
    if settings.remote.server:
        return Need(1, 0, _OF_SERVER)
    memory = memory_of(settings.load)
    with_gpu = [node for node in nodes if node.gpus]
    if with_gpu and settings.load.device in ("auto", "cuda"):
        return _on_gpus(with_gpu, memory, workers)
    return _on_cpus(nodes, memory, workers)


def _on_gpus(nodes: Sequence[Node], memory: int, workers: int | None) -> Need:
    """A GPU for each worker, or an equal share of one; CPUs so that no GPU of these nodes is left without."""
    per_gpu = max(1, math.ceil((workers or 1) / sum(node.gpus for node in nodes)))
    cpus = min((int(node.cpus / node.gpus) for node in nodes if node.cpus), default=1) // per_gpu
    # Ray rounds to its precision: six times 0.1667 would be more than a GPU.
    return Need(max(1, min(MOST_CPUS, cpus)), _GPU_PARTS // per_gpu / _GPU_PARTS, memory)


def _on_cpus(nodes: Sequence[Node], memory: int, workers: int | None) -> Need:
    """As many CPUs as leave room for all the workers or, for None, keep nearly all CPUs at work that can be."""
    most = max([1, *(node.cpus for node in nodes)])
    needs = [Need(cpus, 0, memory) for cpus in range(1, (most if workers else min(most, MOST_CPUS)) + 1)]
    room = {need: sum(need.fits(node) for node in nodes) for need in needs}
    if not any(room.values()):
        return needs[0]
    if workers:
        return max(needs, key=lambda need: (min(workers, room[need]), need.cpus))
    enough = _BUSY * max(need.cpus * room[need] for need in needs)
    return max((need for need in needs if need.cpus * room[need] >= enough), key=lambda need: need.cpus)


def memory_of(options: LoadOptions) -> int:
    """Bytes of a model in the precision that is asked for."""
    checkpoint = find_checkpoint(options)
    if checkpoint.name == BUILTIN:
        return _OF_SERVER
    sizes = sizes_of(checkpoint, check_weights(checkpoint), check_files(checkpoint)[CONFIG])
    return footprint(sizes, choose_plan(options.device, options.precision, options.attention)).total


def no_room(model: str, need: Need, nodes: Sequence[Node]) -> OutOfMemory:
    """The error where no node has room for a worker."""
    largest = max(nodes, key=lambda node: (node.cpus > 0, node.gpus if need.gpus else 0, node.memory, node.cpus))
    has = f"{largest.cpus} CPU{'s' * (largest.cpus != 1)}, {largest.memory / 1e9:.1f} GB"
    if need.gpus:
        has += f", {largest.gpus:.2g} GPU{'s' * (largest.gpus != 1)}"
    hint = "-p 4bit needs less memory; or add a larger node" if largest.cpus else "add a node that has CPUs"
    return OutOfMemory(model, f"a worker needs {need}; the largest node, {largest.name}, has {has}", hint)
