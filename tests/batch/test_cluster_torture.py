"""A cluster whose workers, nodes and drivers are killed: the file of rows is that of a single run.

`LLAVA_TORTURE_SEEDS=20` tries as many seeds, and `LLAVA_TORTURE_MODEL=builtin` has the built-in model answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from helpers.clusters import Driver, TestCluster, cluster_of
from helpers.picture_bytes import encoded
from PIL import Image

pytestmark = pytest.mark.cold
SEEDS = int(os.environ.get("LLAVA_TORTURE_SEEDS", "1"))
PICTURES = 3000
RANGES = 65
INSTANT = '''
import os

from llava_cli.batch import run
from llava_cli.batch.cluster import driver
from llava_cli.engine import Answer, Chunk, Engine
from llava_cli.start import main


class Instant(Engine):
    """Answers at once, with the picture's name, but ends its process at those that are deadly."""

    model, precision, device = "instant", "fp32", "cpu"

    def stream(self, conversation, sampling):
        text = conversation.turns[-1].pictures[0].name
        if "deadly" in text:
            os._exit(9)
        yield Chunk(text, Answer(text, "stop", 5, 0, 1, 0.0, 0.0))

    def prompt(self, conversation):
        return conversation.turns[-1].question

    def count(self, conversation):
        return 5

    def peak_memory(self):
        return 0


run_on_cluster = driver.run_on_cluster
driver.run_on_cluster = lambda job, address, workers: run_on_cluster(job, address, workers, lambda job: Instant())
run.open_engine = lambda *options: Instant()
main()
'''
SCRIPT = "" if os.environ.get("LLAVA_TORTURE_MODEL") == "builtin" else INSTANT


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """Three raylets; each test leaves as many."""
    pytest.importorskip("ray")
    with cluster_of(3) as it:
        yield it


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torture") / "pictures"
    folder.mkdir()
    random = Random(0)
    for number in range(PICTURES):
        color = random.randrange(256), random.randrange(256), random.randrange(256)
        (folder / f"{number:05}.png").write_bytes(encoded(Image.new("RGB", (16, 16), color), "PNG"))
    return folder


def started(pictures: Path, output: Path, *more: str, script: str = SCRIPT) -> Driver:
    return Driver(pictures, "what color?", "-m", "builtin", *more, output=output, script=script)


@pytest.fixture(scope="module")
def single(pictures: Path) -> bytes:
    """What a single run writes."""
    run = started(pictures, pictures.parent / "single.jsonl")
    while run.process.poll() is None:  # for as long as it takes the built-in model
        run.process.wait()
    assert run.process.returncode == 0, run.printed
    return run.output.read_bytes()


class Torture:
    """The drivers of a run, one after the other, and their cluster."""

    def __init__(self, cluster: TestCluster, random: Random, pictures: Path, output: Path) -> None:
        self._cluster, self._random = cluster, random
        self._start = lambda: started(pictures, output, "--ray", cluster.address)
        self.driver = self._start()

    def kill_driver(self) -> None:
        self.driver.kill()
        self.driver = self._start()

    def kill_worker(self) -> None:
        """Waits for one, where a driver has just begun."""
        self.driver.until(lambda: bool(self._cluster.workers()))
        self._random.choice(self._cluster.workers()).kill()

    def kill_node(self) -> None:
        self._cluster.kill_node(self._random.choice(sorted(self._cluster.nodes, key=lambda node: node.unique_id)))

    def add_node(self) -> None:
        self._cluster.add_node()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_is_killed_the_rows_are_those_of_a_single_run(
    seed: int, cluster: TestCluster, pictures: Path, single: bytes, tmp_path: Path
) -> None:
    """A moment is a number of ranges that are committed."""
    random = Random(seed)
    torture = Torture(cluster, random, pictures, tmp_path / "out.jsonl")
    steps = [torture.kill_worker, torture.kill_node, torture.kill_driver]
    random.shuffle(steps)
    moments = sorted(random.sample(range(1, RANGES * 3 // 4), 4))
    for moment, step in zip(moments, [*steps, torture.add_node], strict=True):
        torture.driver.until(lambda moment=moment: torture.driver.parts() >= moment)  # type: ignore[misc]
        step()
    driver = torture.driver
    assert driver.process.wait() == 0, driver.printed
    assert driver.output.read_bytes() == single
    assert {path.name for path in driver.run.iterdir()} == {"lock", "manifest", "settings.json"}


def test_pictures_that_end_their_workers_have_errors_and_all_others_answers(
    cluster: TestCluster, tmp_path: Path
) -> None:
    """Two neighbors, of one range."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [f"{number:03}{'-deadly' * (number in (70, 71))}.png" for number in range(192)]
    for name in names:
        (folder / name).write_bytes(encoded(Image.new("RGB", (4, 4)), "PNG"))
    driver = started(folder, tmp_path / "out.jsonl", "--ray", cluster.address, script=INSTANT)
    assert driver.wait() == 1, driver.printed
    rows = [json.loads(line) for line in driver.output.read_bytes().splitlines()]
    assert [row["image"] for row in rows] == names
    assert [row["answer"] for row in rows if row["status"] == "ok"] == names[:70] + names[72:]
    assert [row["error"]["type"] for row in rows if row["status"] == "error"] == ["WorkerLost"] * 2
