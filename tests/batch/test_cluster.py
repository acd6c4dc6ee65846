"""`llava batch --ray` on a cluster of three raylets: the file of a single run, whatever dies meanwhile.

`LLAVA_TORTURE_SEEDS=20` kills workers, nodes and drivers at the moments of as many seeds, and
`LLAVA_TORTURE_MODEL=builtin` has the built-in model answer meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace

import psutil
import pytest
from helpers.clusters import ENVIRONMENT, Driver, TestCluster, cluster_of
from helpers.command import Run
from helpers.hub import Hub, serving
from helpers.peer import Held, Peer, by_picture
from helpers.peer import serving as serving_answers
from helpers.picture_bytes import encoded
from helpers.tables import for_each
from helpers.terminal import Open
from helpers.torture import INSTANT, Torture
from PIL import Image, ImageDraw

from llava_cli.batch.cluster.cluster import EXTRA, Cluster, _actor
from llava_cli.errors import ServerFailed
from llava_cli.models.registry import builtin_folder

QUESTION = "what is this?"
SEEDS = int(os.environ.get("LLAVA_TORTURE_SEEDS", "1"))
HAS_MODEL = os.environ.get("LLAVA_TORTURE_MODEL") == "builtin"
MANY = 3000
RANGES = 65
"""Of so many pictures."""
TINY = "owner/tiny-llava"


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
def hub() -> Iterator[Hub]:
    with serving(Hub({TINY: builtin_folder()})) as hub:
        yield hub


@pytest.fixture(scope="module")
def cluster(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    pytest.importorskip("ray")
    with cluster_of(3, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path_factory.mktemp("hub"))) as it:
        yield it


@pytest.fixture(scope="module")
def answers() -> Iterator[Peer]:
    """A server, for what does not depend on the model."""
    with serving_answers() as peer:
        yield peer


@pytest.fixture
def peer(answers: Peer) -> Peer:
    """The server, answering at once."""
    answers.usual = by_picture
    return answers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("cluster") / "pictures", 120)


@pytest.fixture(scope="module")
def single(pictures: Path, answers: Peer) -> bytes:
    """What a single run writes."""
    answers.usual = by_picture
    return run_single(pictures, "--server", answers.url, output=pictures.parent / "single.jsonl")


def run_single(pictures: Path, *options: str, output: Path) -> bytes:
    command = [sys.executable, "-m", "llava_cli", "batch", str(pictures), QUESTION, "-q", *options]
    subprocess.run([*command, "-o", str(output)], check=True)
    return output.read_bytes()


def started(
    pictures: Path, cluster: TestCluster, peer: Peer, output: Path, *more: str | Path, script: str = ""
) -> Driver:
    address = ("--ray", cluster.address, "--server", peer.url)
    return Driver(pictures, QUESTION, *address, *more, output=output, script=script)


def files_of(driver: Driver) -> list[str]:
    return sorted(path.name for path in driver.run.iterdir())


def assert_equals(driver: Driver, single: bytes) -> None:
    assert driver.output.read_bytes() == single
    assert files_of(driver) == ["lock", "manifest", "settings.json"]


def test_equals_a_single_run(cluster: TestCluster, pictures: Path, tmp_path: Path) -> None:
    """With the built-in model, which each worker loads."""
    words = (pictures, QUESTION, "--ray", cluster.address, "-m", "builtin")
    driver = Driver(*words, "--json-progress", output=tmp_path / "out.jsonl")
    assert driver.wait() == 0, driver.printed
    assert_equals(driver, run_single(pictures, "-m", "builtin", output=tmp_path / "single.jsonl"))
    lines = [json.loads(line) for line in driver.printed.splitlines() if line.startswith("{")]
    assert lines[-1]["rows"] == lines[-1]["total"] == 120
    assert sum(node["workers"] for node in lines[-1]["nodes"]) >= 1
    assert "raylet" not in driver.printed
    again = Driver(*words, output=tmp_path / "out.jsonl")
    assert again.wait() == 0
    assert "out.jsonl: 120 rows · 0 failed" in again.printed


def test_drained_by_a_signal_and_resumed_at_a_terminal(
    cluster: TestCluster, pictures: Path, peer: Peer, single: bytes, terminal: Open, tmp_path: Path
) -> None:
    """The terminal has a line for each node.

    Every run has a picture whose answer is still to come as we look at it or stop it.
    """
    output = tmp_path / "out.jsonl"
    for number in (signal.SIGINT, signal.SIGTERM):
        peer.usual = held = Held(20)
        driver = started(pictures, cluster, peer, output, "--workers", "1")
        before = driver.parts()
        driver.until(lambda: driver.parts() > before + 3)  # noqa: B023
        driver.process.send_signal(number)
        held.let_go()
        assert driver.wait() == 128 + number, driver.printed
        assert "stopped; to go on:" in driver.printed
        assert before < driver.parts() < 120
    peer.usual = held = Held(30)
    words = ("batch", pictures, QUESTION, "--server", peer.url, "-o", output, "--workers", "1")
    screen = terminal(*words, "--ray", cluster.address, **ENVIRONMENT)
    screen.expect("connecting to the cluster")
    screen.expect("no worker is ready yet")
    screen.expect(r"1 worker .*[1-9]\.\d pictures/s")
    held.let_go()
    screen.expect(r"pictures/s · .* on \d nodes?")
    assert screen.leave() == 0
    assert_equals(driver, single)


def test_a_cluster_on_this_machine(pictures: Path, peer: Peer, single: bytes, terminal: Open, tmp_path: Path) -> None:
    """It is gone with its driver, also where that is killed; at a terminal nothing of Ray's is seen."""
    output = tmp_path / "out.jsonl"
    words = ("--ray", "local", "--server", peer.url, "--workers", "1")
    peer.usual = held = Held(20)
    driver = Driver(pictures, QUESTION, *words, output=output)
    driver.until(lambda: driver.parts() > 3)
    family = psutil.Process(driver.process.pid).children(recursive=True)
    assert any(one.name() == "raylet" for one in family)
    family = [one for one in family if not one.name().endswith("Agent")]  # Ray's agents miss their raylet later
    driver.kill()
    held.let_go()
    _, alive = psutil.wait_procs(family, 30)
    assert not alive
    screen = terminal("batch", pictures, QUESTION, *words, "-o", output)
    screen.expect(r"pictures/s · .* on 1 node")
    assert screen.leave() == 0
    assert output.read_bytes() == single


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
    assert run("batch", drawing, "what?", "-o", out, "--ray", "local", "--shard", "1/2").exit_code == 2
    assert "is about --ray" in run("batch", drawing, "what?", "-o", out, "--workers", "2").stderr
    assert not out.exists()


def test_nothing_imports_ray_unless_it_is_asked_for(drawing: Path, tmp_path: Path) -> None:
    script = """
import sys
from llava_cli.start import main

command = sys.argv
for more in (["single.jsonl"], ["shard.jsonl", "--shard", "1/1"]):
    sys.argv = [*command, *more]
    try:
        main()
    except SystemExit as done:
        assert not done.code
    assert "ray" not in sys.modules
"""
    command = [sys.executable, "-c", script, "batch", str(drawing), QUESTION, "-q", "-m", "builtin", "-o"]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert (tmp_path / "single.jsonl").read_bytes() == (tmp_path / "shard.jsonl").read_bytes()


INJECTED = """
import os, sys
from llava_cli.batch.cluster import driver, worker

def open_engine(job):
    {body}
    return worker.open_model(job)

run = driver.run_on_cluster
driver.run_on_cluster = lambda job, address, workers: run(job, address, workers, open_engine)
from llava_cli.start import main
main()
"""


def test_a_node_that_cannot_load_the_model_is_named(
    cluster: TestCluster, pictures: Path, peer: Peer, single: bytes, tmp_path: Path
) -> None:
    """The others answer all."""
    body = f"""
    from contextlib import suppress
    from llava_cli.errors import OutOfMemory
    with suppress(FileExistsError):
        os.mkdir({str(tmp_path / "first")!r})
        raise OutOfMemory("builtin", "not enough memory", "llava models lists what fits")"""
    driver = started(pictures, cluster, peer, tmp_path / "out.jsonl", script=INJECTED.format(body=body))
    assert driver.wait() == 0, driver.printed
    assert_equals(driver, single)
    assert driver.printed.count("builtin: not enough memory; it gets no work\n  llava models lists") == 1


ERRORS = (
    (
        "from llava_cli.errors import OutOfMemory; raise OutOfMemory('m', 'not enough memory', 'a hint')",
        71,
        "llava: m: not enough memory\n  a hint\n",
    ),
    ("os._exit(1)", 69, "llava: --ray: workers end as they start"),
    (
        "from llava_cli.batch.row_file import RowFile; RowFile.append = lambda *_: os.listdir('/nowhere')",
        74,
        "llava: OUT: no such file or directory\n  the same command resumes\n",
    ),
)


def test_an_error_of_all_workers_ends_the_run(
    cluster: TestCluster, pictures: Path, peer: Peer, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """In its line, with its exit code, and nothing is lost."""
    drivers = [
        started(
            *(pictures, cluster, peer, tmp_path / f"{code}.jsonl", "--workers", "1"), script=INJECTED.format(body=body)
        )
        for body, code, _ in ERRORS
    ]
    for driver, (body, code, said) in zip(drivers, ERRORS, strict=True):
        with subtests.test(body):
            assert driver.wait() == code, driver.printed
            assert said.replace("OUT", str(driver.output)) in driver.printed
            assert "Traceback" not in driver.printed
            assert "shared" in files_of(driver)


def test_a_node_without_llava_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llava_cli.batch.cluster.worker", None)
    monkeypatch.delattr("llava_cli.batch.cluster.worker", raising=False)
    assert _actor()().prepare({}, b"").startswith("has no such llava (")


def pull(name: str, address: str) -> tuple[int, list[str]]:
    """`llava models pull NAME --ray ADDRESS`: the exit code, and the lines that it prints."""
    command = [sys.executable, "-m", "llava_cli", "models", "pull", name, "--ray", address]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT})
    return done.returncode, done.stderr.splitlines()


def test_a_model_is_pulled_on_each_node(cluster: TestCluster, hub: Hub, drawing: Path, tmp_path: Path) -> None:
    """Until then its nodes are refused, with the command that does it."""
    output = tmp_path / "out.jsonl"
    missing = Driver(drawing, QUESTION, "--ray", cluster.address, "-m", TINY, output=output)
    assert missing.wait() != 0
    assert f"{TINY}: not on this machine\n  llava models pull {TINY}" in missing.printed
    hub.breaks_after = 1_000_000
    code, lines = pull(TINY, cluster.address)
    assert code == 69, lines
    assert sum("the download broke off" in line for line in lines) == 3
    assert lines[-2].startswith(f"llava: {TINY}: 3 of 3 nodes lack it: ")
    hub.breaks_after, hub.down = None, False
    code, lines = pull(TINY, cluster.address)
    assert (code, len(lines)) == (0, 3), lines
    folder = Path(lines[0].partition(": ")[2])
    assert (folder / "model.safetensors").read_bytes() == (builtin_folder() / "model.safetensors").read_bytes()
    code, lines = pull("owner/nothing", cluster.address)
    assert sum("node" in line for line in lines) == 4, lines
    assert pull("/somewhere", cluster.address) == (
        2,
        ["llava: /somewhere: a folder is not downloaded", "  copy it to a folder that all nodes share"],
    )
    assert pull(TINY, "local")[0] == 2


def test_without_ray(run: Run, drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("batch", drawing, "what?", "-o", tmp_path / "out.jsonl", "--ray", "local")
    assert (result.exit_code, result.stderr) == (2, f"llava: --ray: needs ray, which is not installed\n  {EXTRA}\n")


def test_a_cluster_that_is_gone(tmp_path: Path) -> None:
    """It is noticed before Ray ends this process without a word."""
    own = SimpleNamespace(raylet_socket_name=str(tmp_path / "raylet"))
    ray = SimpleNamespace(_private=SimpleNamespace(worker=SimpleNamespace(_global_node=own, shutdown=print)), remote=id)
    with pytest.raises(ServerFailed, match="--ray auto: the cluster is gone"):
        Cluster(ray, "auto").nodes()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures for torture."""
    folder = tmp_path_factory.mktemp("torture") / "pictures"
    folder.mkdir()
    random = Random(0)
    for number in range(MANY):
        color = random.randrange(256), random.randrange(256), random.randrange(256)
        (folder / f"{number:05}.png").write_bytes(encoded(Image.new("RGB", (16, 16), color), "PNG"))
    return folder


def tortured(pictures: Path, answers: Peer, *more: str, output: Path) -> Driver:
    """Of its server only the name is asked for: answers are the script's, unless they are the built-in model's."""
    model, script = (("-m", "builtin"), "") if HAS_MODEL else (("--server", answers.url), INSTANT)
    return Driver(pictures, QUESTION, *model, *more, output=output, script=script)


@pytest.fixture(scope="module")
def single_of_many(many: Path, answers: Peer) -> bytes:
    """What a single run writes."""
    run = tortured(many, answers, output=many.parent / "single.jsonl")
    while run.process.poll() is None:  # for as long as it takes the built-in model
        run.process.wait()
    assert run.process.returncode == 0, run.printed
    return run.output.read_bytes()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_is_killed_the_rows_are_those_of_a_single_run(
    seed: int, cluster: TestCluster, answers: Peer, many: Path, single_of_many: bytes, tmp_path: Path
) -> None:
    """A moment is a number of ranges that are committed; as many nodes are left as there were."""
    random = Random(seed)
    output = tmp_path / "out.jsonl"
    torture = Torture(cluster, random, lambda: tortured(many, answers, "--ray", cluster.address, output=output))
    steps = [torture.kill_worker, torture.kill_node, torture.kill_driver]
    random.shuffle(steps)
    moments = sorted(random.sample(range(1, RANGES * 3 // 4), 4))
    for moment, step in zip(moments, [*steps, torture.add_node], strict=True):
        torture.driver.until(lambda moment=moment: torture.driver.parts() >= moment)  # type: ignore[misc]
        step()
    driver = torture.driver
    assert driver.process.wait() == 0, driver.printed
    assert driver.output.read_bytes() == single_of_many
    assert {path.name for path in driver.run.iterdir()} == {"lock", "manifest", "settings.json"}


def test_pictures_that_end_their_workers_have_errors_and_all_others_answers(
    cluster: TestCluster, answers: Peer, tmp_path: Path
) -> None:
    """Two neighbors, of one range."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [f"{number:03}{'-deadly' * (number in (70, 71))}.png" for number in range(192)]
    for name in names:
        (folder / name).write_bytes(encoded(Image.new("RGB", (4, 4)), "PNG"))
    driver = started(folder, cluster, answers, tmp_path / "out.jsonl", script=INSTANT)
    assert driver.wait() == 1, driver.printed
    rows = [json.loads(line) for line in driver.output.read_bytes().splitlines()]
    assert [row["image"] for row in rows] == names
    assert [row["answer"] for row in rows if row["status"] == "ok"] == names[:70] + names[72:]
    assert [row["error"]["type"] for row in rows if row["status"] == "error"] == ["WorkerLost"] * 2
