"""A cluster whose workers, nodes and drivers are killed: the file of rows is that of a single run.

`LLAVA_TORTURE_SEEDS=20` tries as many seeds, and `LLAVA_TEST_MODEL=builtin` has the built-in model answer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from helpers.cluster_job import DEADLY
from helpers.picture_bytes import encoded
from helpers.raylets import Raylets, raylets
from PIL import Image

pytest.importorskip("ray")
SEEDS = int(os.environ.get("LLAVA_TORTURE_SEEDS", "1"))
PICTURES = int(os.environ.get("LLAVA_TORTURE_PICTURES", "3000"))


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """That of drivers, and of the workers on nodes that are started here."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    yield dict(os.environ)
    patch.undo()


@pytest.fixture
def cluster(environment: dict[str, str]) -> Iterator[Raylets]:
    """Three raylets: a head without room for a worker, and two with room for one each."""
    with raylets(nodes=2) as found:
        yield found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = Random(0)
    for number in range(PICTURES):
        color = tuple(random.randrange(256) for _ in range(3))
        (folder / f"{number:05}.png").write_bytes(encoded(Image.new("RGB", (16, 16), color), "PNG"))
    return folder


@pytest.fixture(scope="module")
def expected(pictures: Path, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> bytes:
    """The rows of a single run."""
    output = tmp_path_factory.mktemp("single") / "out.jsonl"
    assert job(environment, pictures, output).wait() == 0
    return output.read_bytes()


def job(environment: dict[str, str], *words: str | Path) -> subprocess.Popen[bytes]:
    """A process that runs a job; its progress goes to a log beside the output."""
    with open(f"{words[1]}.log", "ab") as log:
        command = [sys.executable, "-m", "helpers.cluster_job", *map(str, words)]
        return subprocess.Popen(command, env=environment, stderr=log)


class Torture:
    """Drivers of a run, one after the other, and the cluster that they use."""

    def __init__(self, cluster: Raylets, environment: dict[str, str], source: Path, output: Path) -> None:
        self.cluster, self._environment, self._words = cluster, environment, (source, output, cluster.address)
        self._folder = Path(f"{output}.run")
        self.start_driver()

    def start_driver(self) -> None:
        self._driver = job(self._environment, *self._words)

    def kill_driver(self, random: Random) -> None:
        self._driver.kill()
        assert self._driver.wait() == -signal.SIGKILL
        self.start_driver()

    def kill_worker(self, random: Random) -> None:
        """Waits for one if there is none yet, after another one was killed."""
        while not (workers := self.cluster.workers()):
            self._wait_a_moment()
        os.kill(random.choice(workers), signal.SIGKILL)

    def kill_node(self, random: Random) -> None:
        self.cluster.kill_node(random.randrange(2))

    def add_node(self, random: Random) -> None:
        self.cluster.add()

    def wait_for(self, ranges: int) -> None:
        """Returns once so many ranges are committed."""
        while len(list(self._folder.glob("part-*.jsonl"))) < ranges:
            self._wait_a_moment()

    def _wait_a_moment(self) -> None:
        assert self._driver.poll() is None, "the run is over too early"
        time.sleep(0.002)

    def end(self) -> int:
        return self._driver.wait()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_is_killed_the_rows_are_those_of_a_single_run(
    seed: int, cluster: Raylets, environment: dict[str, str], pictures: Path, expected: bytes, tmp_path: Path
) -> None:
    """Moments are so many committed ranges, of 65."""
    random, output = Random(seed), tmp_path / "out.jsonl"
    torture = Torture(cluster, environment, pictures, output)
    steps = [torture.kill_worker, torture.kill_node, torture.kill_driver]
    random.shuffle(steps)
    for ranges, step in zip(sorted(random.sample(range(1, 50), 4)), [*steps, torture.add_node], strict=True):
        torture.wait_for(ranges)
        step(random)
    assert torture.end() == 0, Path(f"{output}.log").read_text()
    assert output.read_bytes() == expected
    assert {path.name for path in Path(f"{output}.run").iterdir()} == {"lock", "manifest", "settings.json"}


def test_a_picture_that_ends_its_worker_has_an_error_and_all_others_an_answer(
    cluster: Raylets, environment: dict[str, str], tmp_path: Path
) -> None:
    source, output = tmp_path / "pictures", tmp_path / "out.jsonl"
    source.mkdir()
    names = [f"{number:03}-{DEADLY if number in (70, 71) else ''}.png" for number in range(200)]
    for name in names:
        (source / name).write_bytes(encoded(Image.new("RGB", (4, 4)), "PNG"))
    assert job(environment, source, output, cluster.address).wait() == 1
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["image"] for row in rows] == names
    assert [row["image"] for row in rows if row["status"] == "error"] == names[70:72]
    assert rows[70]["error"]["type"] == "WorkerLost"
