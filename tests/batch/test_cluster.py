"""`llava batch --ray` on a cluster of three raylets: the file of a single run, whatever dies meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import psutil
import pytest
from helpers.clusters import Driver, TestCluster, cluster_of
from helpers.command import Run
from helpers.tables import for_each
from PIL import Image, ImageDraw

pytestmark = pytest.mark.cold
QUESTION = "what is this?"
DEADLY = '''
import os, sys
from llava_cli.batch.cluster import driver, worker
from llava_cli.engine.local import LocalEngine

def open_engine(job):
    """A model that ends its process at one of the pictures."""
    from llava_cli.batch.cluster.worker import open_model
    engine = open_model(job)
    answer_many = engine.answer_many

    def watched(requests, size, go_on):
        def checked():
            for request in requests:
                if not isinstance(request, Exception) and "0017.png" in request.conversation.pictures[0].name:
                    os._exit(1)
                yield request
        return answer_many(checked(), size, go_on)

    engine.answer_many = watched
    return engine

run = driver.run_on_cluster
driver.run_on_cluster = lambda job, address, workers: run(job, address, workers, open_engine)
from llava_cli.start import main
main()
'''


def draw(folder: Path, count: int) -> Path:
    """Pictures that differ."""
    folder.mkdir()
    random = Random(1)
    for number in range(count):
        image = Image.new("RGB", (48, 48), "white")
        pen, x, y = ImageDraw.Draw(image), random.randrange(24), random.randrange(24)
        kind = random.choice((pen.ellipse, pen.rectangle))
        kind((x, y, x + 20, y + 20), fill=random.choice(("red", "blue", "green", "orange")))
        image.save(folder / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    pytest.importorskip("ray")
    with cluster_of(3) as it:
        yield it


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("cluster") / "pictures", 120)


@pytest.fixture(scope="module")
def single(pictures: Path) -> bytes:
    """What a single run writes."""
    return run_single(pictures)


def run_single(pictures: Path) -> bytes:
    output = pictures.parent / f"{pictures.name}.jsonl"
    command = [sys.executable, "-m", "llava_cli", "batch", str(pictures), QUESTION, "-q", "-m", "builtin"]
    subprocess.run([*command, "-o", str(output)], check=True)
    return output.read_bytes()


def started(pictures: Path, cluster: TestCluster, output: Path, *more: str | Path, script: str = "") -> Driver:
    address = ("--ray", cluster.address, "-m", "builtin")
    return Driver(pictures, QUESTION, *address, *more, output=output, script=script)


def files_of(driver: Driver) -> list[str]:
    return sorted(path.name for path in driver.run.iterdir())


def assert_equals(driver: Driver, single: bytes) -> None:
    assert driver.output.read_bytes() == single
    assert files_of(driver) == ["lock", "manifest", "settings.json"]


def test_equals_a_single_run(cluster: TestCluster, pictures: Path, single: bytes, tmp_path: Path) -> None:
    driver = started(pictures, cluster, tmp_path / "out.jsonl", "--json-progress")
    assert driver.wait() == 0, driver.printed
    assert_equals(driver, single)
    lines = [json.loads(line) for line in driver.printed.splitlines() if line.startswith("{")]
    assert lines[-1]["rows"] == lines[-1]["total"] == 120
    assert sum(node["workers"] for node in lines[-1]["nodes"]) >= 1
    assert "raylet" not in driver.printed
    again = started(pictures, cluster, tmp_path / "out.jsonl")
    assert again.wait() == 0
    assert "has all 120 rows already" in again.printed


def test_drained_by_ctrl_c_and_resumed(cluster: TestCluster, pictures: Path, single: bytes, tmp_path: Path) -> None:
    driver = started(pictures, cluster, tmp_path / "out.jsonl")
    driver.until(lambda: driver.parts() > 3)
    assert driver.kill(signal.SIGINT) == 130, driver.printed
    assert "stopped; to go on:" in driver.printed
    assert 0 < driver.parts() < 120
    again = started(pictures, cluster, tmp_path / "out.jsonl")
    assert again.wait() == 0, again.printed
    assert_equals(again, single)


def test_a_row_that_ends_its_worker(cluster: TestCluster, pictures: Path, single: bytes, tmp_path: Path) -> None:
    """It gets an error; all others are answered."""
    driver = started(pictures, cluster, tmp_path / "out.jsonl", script=DEADLY)
    assert driver.wait() == 1, driver.printed
    rows, wanted = driver.output.read_bytes().splitlines(), single.splitlines()
    different = [json.loads(row) for row, other in zip(rows, wanted, strict=True) if row != other]
    assert [(row["image"], row["error"]["type"]) for row in different] == [("0017.png", "WorkerLost")]
    assert files_of(driver) == ["lock", "manifest", "settings.json"]


def test_a_cluster_on_this_machine(pictures: Path, single: bytes, tmp_path: Path) -> None:
    """It is gone with its driver, also where that is killed."""
    for output in (tmp_path / "killed.jsonl", tmp_path / "out.jsonl"):
        driver = Driver(pictures, QUESTION, "--ray", "local", "-m", "builtin", "--workers", "2", output=output)
        if output.name == "out.jsonl":
            assert driver.wait() == 0, driver.printed
            assert_equals(driver, single)
            continue
        driver.until(lambda: driver.parts() > 3)  # noqa: B023
        family = psutil.Process(driver.process.pid).children(recursive=True)
        assert any(one.name() == "raylet" for one in family)
        driver.kill()
        _, alive = psutil.wait_procs(family, 30)
        assert not [one for one in alive if not one.name().endswith("Agent")]  # Ray's agents miss their raylet later


@for_each(
    ("address", "code", "said"),
    [
        ("localhost:1", 69, "no cluster there"),
        ("ray://head:10001", 2, "ray job submit"),
        ("head", 2, "neither local, auto nor HOST:PORT"),
    ],
)
def test_no_cluster(address: str, code: int, said: str, run: Run, drawing: Path, tmp_path: Path) -> None:
    result = run("batch", drawing, "what?", "-o", tmp_path / "out.jsonl", "--ray", address)
    assert (result.exit_code, said in result.stderr) == (code, True)
    assert not (tmp_path / "out.jsonl").exists()


def test_options_that_do_not_go_with_it(run: Run, drawing: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert "needs a file for the rows" in run("batch", drawing, "what?", "--ray", "local").stderr
    for option in (["--extend"], ["--retry-errors"], ["--repair"], ["--verify", "3"]):
        assert run("batch", drawing, "what?", "-o", out, "--ray", "local", *option).exit_code == 2
    assert run("batch", drawing, "what?", "-o", out, "--ray", "local", "--workers", "0").exit_code == 2


def test_nothing_imports_ray_unless_it_is_asked_for(drawing: Path, tmp_path: Path) -> None:
    script = "import sys; from llava_cli.start import main\ntry: main()\nfinally: sys.exit('ray' in sys.modules)"
    arguments = ["batch", str(drawing), QUESTION, "-q", "-m", "builtin", "-o", str(tmp_path / "out.jsonl")]
    for more in ([], ["--shard", "1/1"]):
        assert subprocess.run([sys.executable, "-c", script, *arguments, *more]).returncode == 0
