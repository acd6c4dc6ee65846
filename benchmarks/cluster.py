"""What a cluster costs: `python benchmarks/cluster.py pairs`, `… instant` or `… list`. Needs the extra `ray`.

`pairs`: the built-in model answers about pictures in a single run with as many threads as cores, and on `--ray local`
with as many workers of one thread, in turns; rates are those between the first and the last row. `instant`: workers on
a cluster of this machine have an engine that answers at once, so that all that is left is listing, handing out, reading
pictures, writing rows and joining them. `list`: a run of `--rows` rows is begun and joined without any answers.

All of them need idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from PIL import Image, ImageDraw

from llava_cli.batch.cluster.driver import run_on_cluster
from llava_cli.batch.ranges.folder_run import FolderRun
from llava_cli.batch.rows import make_row, to_line
from llava_cli.batch.run import Job
from llava_cli.batch.sources.source import Source
from llava_cli.batch.tally import Tally
from llava_cli.batch.tasks import Task
from llava_cli.conversation import Conversation
from llava_cli.engine import Answer, Chunk, Engine
from llava_cli.settings import Sampling, Settings

QUESTION = "what is this?"
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


def draw(folder: Path, count: int) -> Path:
    folder.mkdir()
    chosen = random.Random(1)
    for number in range(count):
        image = Image.new("RGB", (64, 64), "white")
        x, y = chosen.randrange(40), chosen.randrange(40)
        ImageDraw.Draw(image).ellipse((x, y, x + 20, y + 20), fill=chosen.choice(("red", "blue", "green", "orange")))
        image.save(folder / f"{number:06}.png")
    return folder


def rate(arguments: list[str]) -> float:
    """Rows/s of a batch between its first and its last row."""
    command = [sys.executable, "-m", "llava_cli", "batch", *arguments, "-q", "--json-progress"]
    run = subprocess.run(command, stderr=subprocess.PIPE, check=True, env={**os.environ, **ENVIRONMENT})
    lines = [json.loads(line) for line in run.stderr.splitlines() if line.startswith(b"{")]
    begun = [line for line in lines if line["rows"]]
    return float((begun[-1]["rows"] - begun[0]["rows"]) / (begun[-1]["seconds"] - begun[0]["seconds"]))


def pairs(count: int, pictures: int) -> None:
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        photos, ratios = draw(Path(name) / "photos", pictures), []
        for number in range(count):
            one = [str(photos), QUESTION, "-m", "builtin", "-o"]
            single = rate([*one, f"{name}/single{number}.jsonl"])
            cluster = rate([*one, f"{name}/ray{number}.jsonl", "--ray", "local", "--workers", str(cores)])
            same = Path(f"{name}/single{number}.jsonl").read_bytes() == Path(f"{name}/ray{number}.jsonl").read_bytes()
            ratios.append(cluster / single)
            print(f"single {single:.1f}, {cores} workers {cluster:.1f} pictures/s: {ratios[-1]:.2f}, equal: {same}")
        print(f"median {statistics.median(ratios):.2f} of {count}")


class Instant(Engine):
    """Answers at once."""

    model, precision, device = "instant", "fp32", "cpu"

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        yield Chunk("a red circle", Answer("a red circle", "stop", 5, 0, 3, 0.0, 0.0))

    def prompt(self, conversation: Conversation) -> str:
        return conversation.turns[-1].question

    def count(self, conversation: Conversation) -> int:
        return 5

    def peak_memory(self) -> int:
        return 0


def instantly(job: Job) -> Engine:
    return Instant()


@contextmanager
def largest(matches: Callable[[psutil.Process], bool]) -> Iterator[list[int]]:
    """The most memory that one of some processes has while the block runs, in bytes."""
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(1):
            for process in psutil.process_iter(["name", "memory_info"]):
                if matches(process) and process.info["memory_info"]:
                    most[0] = max(most[0], process.info["memory_info"].rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def instant(rows: int, pictures: int, workers: int) -> None:
    from ray.cluster_utils import Cluster

    os.environ.update(ENVIRONMENT)
    Path("/tmp/ray").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llava", dir="/tmp") as name:
        head: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 100_000_000}
        cluster = Cluster(initialize_head=True, head_node_args={**head, "temp_dir": f"{name}/ray"})
        try:
            photos = draw(Path(name) / "photos", pictures)
            questions = tuple(f"what is this? ({number})" for number in range(rows // pictures))
            source = Source([str(photos)], questions)
            output = Path(name) / "out.jsonl"
            job = Job(source, Settings.resolve(model="builtin"), "llava batch …", output, quiet=True)
            begin = time.monotonic()
            with largest(lambda process: process.info["name"] == "ray::Worker") as worker:
                code = run_on_cluster(job, cluster.address, workers, instantly)
            seconds = time.monotonic() - begin
        finally:
            cluster.shutdown()
        lines, size = sum(1 for _ in output.open("rb")), output.stat().st_size
        manifest = Path(f"{output}.run/manifest").stat().st_size
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{lines:,} rows (exit code {code}) in {seconds:.1f} s: {lines / seconds:,.0f} rows/s, {workers} workers")
    print(f"  driver {own / 1e6:.0f} MB, largest worker {worker[0] / 1e6:.0f} MB at most")
    print(f"  manifest {manifest / rows:.0f} bytes, rows {size / rows:.0f} bytes each")


def listed(rows: int) -> None:
    """Times what one process does for all rows, and its memory: the list, finding what is missing, and the joining."""
    own = psutil.Process()
    before = own.memory_info().rss
    with tempfile.TemporaryDirectory(prefix="llava") as name:
        run = FolderRun(Path(name) / "out.jsonl")
        tasks = (Task(f"photos/2024/{number:09}.jpg", QUESTION) for number in range(rows))
        begin = time.monotonic()
        run.begin({"model": "instant"}, lambda: tasks, None)
        begun = time.monotonic()
        size = (run.output.parent / "out.jsonl.run" / "manifest").stat().st_size
        print(f"list: {(begun - begin) / rows * 1e6:.1f} µs a row, {size / rows:.0f} bytes each in the manifest")
        print(f"one range of it: {timed(lambda: list(run.tasks(run.grid.range(run.grid.count // 2)))) * 1e3:.1f} ms")
        for number in run.grid.all():
            answer = Answer("a red circle", "stop", 5, 0, 3, 0.0, 0.0)
            part = b"".join(to_line(make_row(task, None, answer, "instant")) for task in run.tasks(number))
            (run.output.parent / "out.jsonl.run" / number.file_name).write_bytes(part)
        print(
            f"what is missing, of {run.grid.count:,} ranges: {timed(lambda: list(run.missing(run.grid.all()))):.3f} s"
        )
        print(f"joining: {timed(lambda: run.merge(Tally().add)) / rows * 1e6:.1f} µs a row")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"memory: {before / 1e6:.0f} MB before, {most / 1e6:.0f} MB at most; {rows:,} rows")


def timed(action: Callable[[], object]) -> float:
    """Its seconds."""
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pairs", "instant", "list"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=16)
    args = parser.parse_args()
    if args.what == "pairs":
        pairs(args.pairs, args.pictures)
    elif args.what == "list":
        listed(args.rows)
    else:
        instant(args.rows, args.pictures, args.workers)


if __name__ == "__main__":
    main()
