"""What a worker of a cluster takes of its node, and what is said where no node has that."""

from __future__ import annotations

import os
import sys
from itertools import count

import pytest
import torch
from helpers.tables import for_each

from llava_cli.batch.cluster import needs
from llava_cli.batch.cluster.needs import MOST_CPUS, Need, Node, memory_of, need_of, no_room
from llava_cli.errors import LlavaError
from llava_cli.hardware.allocator import use_threads
from llava_cli.settings import LoadOptions, ServerOptions, Settings

GB = 10**9
MODEL = 15 * GB


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes `MODEL` bytes."""
    monkeypatch.setattr(needs, "memory_of", lambda options: MODEL)


def cluster(*sizes: tuple[float, ...]) -> list[Node]:
    """Nodes with so many CPUs, GB and GPUs."""
    numbers = count(1)
    return [
        Node(f"{number}", f"node{number}", int(cpus), sum(gpus), int(memory * GB))
        for number, (cpus, memory, *gpus) in zip(numbers, sizes, strict=False)
    ]


def room(need: Need, nodes: list[Node]) -> list[int]:
    return [need.fits(node) for node in nodes]


@for_each(
    "nodes, workers, cpus, fits",
    [
        (cluster((4, 64), (4, 64)), None, 4, [1, 1]),
        (cluster((64, 512)), None, MOST_CPUS, [8]),
        (cluster((0, 64), (4, 64)), None, 4, [0, 1]),  # a head without CPUs
        (cluster((0, 64), (4, 64)), 2, 2, [0, 2]),
        (cluster((8, 64), (7, 64)), None, 7, [1, 1]),
        (cluster((1, 64), (64, 512)), None, 8, [0, 8]),  # not 65 workers with a thread each
        (cluster((4, 64), (16, 128)), None, 4, [1, 4]),
        (cluster((1, 4), (64, 64)), None, 8, [0, 4]),  # a node that is too small for the model has no say
        (cluster((4, 64), (4, 64)), 1, 4, [1, 1]),  # no worker spans nodes
        (cluster((4, 64), (4, 64)), 2, 4, [1, 1]),
        (cluster((4, 64), (4, 64)), 3, 2, [2, 2]),
        (cluster((64, 512), (2, 64), (2, 64)), 2, 32, [2, 0, 0]),
        (cluster((64, 512)), 2, 32, [2]),  # no limit, since their number is asked for
        (cluster((2, 64)), 9, 1, [2]),  # more than there are CPUs
        (cluster((16, 32)), 4, 8, [2]),  # memory for two
        (cluster((4, 8), (2, 8)), None, 1, [0, 0]),
        (cluster((4, 8), (2, 8)), 2, 1, [0, 0]),
        (cluster((0, 64)), None, 1, [0]),
    ],
)
def test_cpus(nodes: list[Node], workers: int | None, cpus: int, fits: list[int]) -> None:
    need = need_of(Settings(), nodes, workers)
    assert need == Need(cpus, 0, MODEL)
    assert room(need, nodes) == fits


@for_each(
    "nodes, workers, cpus, gpus, fits",
    [
        (cluster((32, 256, 4)), None, 8, 1, [4]),
        (cluster((64, 256), (4, 64, 4)), None, 1, 1, [0, 4]),  # CPUs of a node without GPUs are no help
        (cluster((64, 256), (8, 64, 1)), None, 8, 1, [0, 1]),
        (cluster((0, 256), (8, 64, 1)), None, 8, 1, [0, 1]),
        (cluster((64, 256, 1), (4, 64, 2)), None, 2, 1, [1, 2]),
        (cluster((2, 256, 4)), None, 1, 1, [2]),
        (cluster((0, 64, 1)), None, 1, 1, [0]),
        (cluster((16, 256, 2)), 1, 8, 1, [2]),
        (cluster((16, 256, 2)), 2, 8, 1, [2]),
        (cluster((16, 256, 2)), 3, 4, 0.5, [4]),
        (cluster((16, 256, 2)), 4, 4, 0.5, [4]),
        (cluster((16, 256, 1), (16, 256, 1)), 6, 5, 0.3333, [3, 3]),
        (cluster((16, 32, 4)), None, 4, 1, [2]),  # memory for two
    ],
)
def test_gpus(nodes: list[Node], workers: int | None, cpus: int, gpus: float, fits: list[int]) -> None:
    need = need_of(Settings(), nodes, workers)
    assert need == Need(cpus, gpus, MODEL)
    assert room(need, nodes) == fits
    on_cpus = need_of(Settings(load=LoadOptions(device="cpu")), nodes, workers)
    assert on_cpus.gpus == 0


def test_any_number_of_workers_has_room_on_a_gpu() -> None:
    """In Ray's precision: six times 0.1667 of a GPU would be more than one."""
    for workers in range(1, 65):
        need = need_of(Settings(), cluster((64, 2000, 1)), workers)
        assert round(need.gpus * 10_000) * workers <= 10_000
        assert need.fits(cluster((64, 2000, 1))[0]) >= workers


def test_a_worker_whose_model_is_elsewhere() -> None:
    remote = Settings(remote=ServerOptions(server="http://localhost:1/v1"))
    for workers in (None, 1, 5):
        need = need_of(remote, cluster((0, 64), (4, 8, 1)), workers)
        assert (need.cpus, need.gpus) == (1, 0)
        assert need.memory < GB
        assert room(need, cluster((0, 64), (4, 8, 1))) == [0, 4]


def test_the_built_in_model_fits_anywhere() -> None:
    assert memory_of(LoadOptions(model="builtin")) < GB


@for_each(
    "nodes, says, helps",
    [
        (
            cluster((4, 8), (2, 8.5)),
            "a worker needs 1 CPU, 15.0 GB; the largest node, node2, has 2 CPUs, 8.5 GB",
            "-p 4bit needs less memory; or add a larger node",
        ),
        (
            cluster((0, 64), (1, 8)),
            "a worker needs 1 CPU, 15.0 GB; the largest node, node2, has 1 CPU, 8.0 GB",
            "-p 4bit needs less memory; or add a larger node",
        ),
        (
            cluster((8, 64), (4, 8, 1)),
            "a worker needs 4 CPUs, 15.0 GB, 1 GPU; the largest node, node2, has 4 CPUs, 8.0 GB, 1 GPU",
            "-p 4bit needs less memory; or add a larger node",
        ),
        (
            cluster((0, 64)),
            "a worker needs 1 CPU, 15.0 GB; the largest node, node1, has 0 CPUs, 64.0 GB",
            "add a node that has CPUs",
        ),
    ],
)
def test_no_node_has_room(nodes: list[Node], says: str, helps: str) -> None:
    need = need_of(Settings(), nodes, None)
    assert not any(room(need, nodes))
    error: LlavaError = no_room("llava-7b", need, nodes)
    assert (str(error), error.hint, error.exit_code) == (f"llava-7b: {says}", helps, 71)


def test_a_workers_threads_need_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose model is elsewhere never imports it; one that has it already is told."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        use_threads(before + 1)
    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (before, str(before + 1))
    use_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    use_threads(before)
