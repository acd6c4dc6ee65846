"""A bucket beside the same folder on disk: `python benchmarks/buckets.py`. An hour on two idle cores, or `--objects N`.

The built-in model answers about pictures of a folder and about the same ones in a bucket, block after block in turn, in
one process. The S3 server is moto's, on this machine: it takes CPU time that a server elsewhere would not take, so it
has a lower priority (`--nice`), and its time is shown. Needs the extra `test`.

`--model FOLDER --precision 4bit --max-tokens 16` asks another model (`geometry.py` makes some).

`--keys N` lists N keys of no server, whose answers take 100 ms: one page after the other, and as `llava batch` does it.
"""

from __future__ import annotations

import argparse
import bisect
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import psutil
from PIL import Image

from llava_cli.batch.picture_loader import PictureLoader
from llava_cli.batch.runner import answer_tasks
from llava_cli.batch.sources.containers.bucket_listing import list_objects
from llava_cli.batch.sources.source import Source
from llava_cli.batch.tasks import Task
from llava_cli.images.cloud import PAGE_KEYS, Cloud, Object, Page
from llava_cli.loader import open_engine
from llava_cli.settings import Settings

QUESTION = "what is this?"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "eu-central-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


def make(folder: Path, count: int) -> None:
    """JPEGs of 640 x 480 pixels and about 40 kB."""
    draw = random.Random(1)
    for number in range(count):
        inside = folder / f"{number // 1000:03d}"
        inside.mkdir(parents=True, exist_ok=True)
        coarse = Image.frombytes("RGB", (40, 30), draw.randbytes(40 * 30 * 3))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(inside / f"{number:06d}.jpg", quality=90)


def serve(folder: Path, nice: int) -> None:
    """Serves a bucket `photos` of a folder's files until it is ended; prints its URL."""
    import logging

    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import make_server

    os.nice(nice)
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket("photos", ENVIRONMENT["AWS_DEFAULT_REGION"])
    for path in folder.rglob("*.jpg"):
        backend.put_object("photos", path.relative_to(folder).as_posix(), path.read_bytes())
    MotoRequestHandler.protocol_version = "HTTP/1.1"  # connections stay open, as those of real servers do
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


@contextmanager
def serving(folder: Path, nice: int) -> Iterator[psutil.Process]:
    command = [sys.executable, __file__, "--serve", str(folder), "--nice", str(nice)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        os.environ.update({**ENVIRONMENT, "AWS_ENDPOINT_URL": process.stdout.readline().strip()})
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def cpu_seconds(process: psutil.Process) -> float:
    """Of a process and its children that live."""
    all_of_it = [process, *process.children(recursive=True)]
    return sum(one.cpu_times().user + one.cpu_times().system for one in all_of_it)


class Side:
    """One of the two sources, with what its blocks have taken."""

    def __init__(self, name: str, word: str, engine: object, settings: Settings) -> None:
        self.name, self._engine, self._settings = name, engine, settings
        self._source = Source([word], (QUESTION,))
        begin = time.monotonic()
        self.tasks = list(self._source.tasks())
        self.listing = time.monotonic() - begin
        source = self._source
        self._loader = PictureLoader(source.find, readers=source.readers, holds=source.holds)
        self.seconds: list[float] = []
        self.own_cpu, self.server_cpu = 0.0, 0.0

    def answer(self, tasks: list[Task], server: psutil.Process) -> list[tuple[str, str | None]]:
        own = psutil.Process()
        before, server_before, begin = cpu_seconds(own), cpu_seconds(server), time.monotonic()
        outcomes = answer_tasks(self._engine, tasks, self._loader, self._settings, None, lambda: True)  # type: ignore[arg-type]
        rows = [(row["sha256"], row["answer"]) for _, row in outcomes]
        self.seconds.append(time.monotonic() - begin)
        self.server_cpu += cpu_seconds(server) - server_before
        # The server is this process's child.
        self.own_cpu += cpu_seconds(own) - before - (cpu_seconds(server) - server_before)
        return rows

    def close(self) -> None:
        self._loader.close()
        self._source.close()


class SlowCloud(Cloud):
    """A folder of numbered pictures."""

    def __init__(self, count: int) -> None:
        self.has_pages = True
        self._names = [f"2024/IMG_{number:09}.jpg" for number in range(count)]

    def page(self, url: str, after: str | None = None, token: str | None = None) -> Page:
        time.sleep(0.1)
        begin = int(token) if token else bisect.bisect_right(self._names, after or "")
        end = begin + PAGE_KEYS
        objects = [Object(name, 1) for name in self._names[begin:end]]
        return Page(objects, str(end) if end < len(self._names) else None)


def time_listing(count: int) -> None:
    cloud, seconds, found = SlowCloud(count), [], []
    for objects in (cloud.list(""), list_objects(cloud, "")):
        begin = time.monotonic()
        found.append(list(objects))
        seconds.append(time.monotonic() - begin)
    assert found[0] == found[1], "the names differ"
    print(f"{count:,} keys: {seconds[0]:.1f} s page after page, {seconds[1]:.1f} s in ranges", end=", ")
    print(f"{seconds[0] / seconds[1]:.1f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=10_000)
    parser.add_argument("--answered", type=int, help="Of these; all by default.")
    parser.add_argument("--block", type=int, default=500)
    parser.add_argument("--nice", type=int, default=10, help="Of the server; 0 where other programs run.")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--keys", type=int, help="Only lists so many.")
    args = parser.parse_args()
    if args.keys:
        time_listing(args.keys)
        return
    if args.serve:
        serve(args.serve, args.nice)
        return
    settings = Settings.resolve(model=args.model, precision=args.precision, max_tokens=args.max_tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, args.objects)
        with serving(folder, args.nice) as server:
            engine = open_engine(settings, print)
            disk = Side("folder", str(folder), engine, settings)
            bucket = Side("bucket", "s3://photos/", engine, settings)
            assert [task.image for task in disk.tasks] == [task.image for task in bucket.tasks]
            print(f"{args.objects:,} objects listed in {bucket.listing:.1f} s, files in {disk.listing:.1f} s")
            tasks = iter(disk.tasks[: args.answered])
            disk.answer(disk.tasks[:16], server)  # the first ones start processes and connections
            bucket.answer(disk.tasks[:16], server)
            for side in (disk, bucket):
                side.seconds, side.own_cpu, side.server_cpu = [], 0.0, 0.0
            count = 0
            while block := list(islice(tasks, args.block)):
                sides = [disk, bucket] if len(disk.seconds) % 2 else [bucket, disk]
                rows = [side.answer(block, server) for side in sides]
                assert rows[0] == rows[1], "the rows differ"
                count += len(block)
                print(f"{count:,}: {disk.seconds[-1]:.1f} s from the folder, {bucket.seconds[-1]:.1f} s", flush=True)
            report(disk, bucket, count)
            disk.close()
            bucket.close()


def report(disk: Side, bucket: Side, count: int) -> None:
    for side in (disk, bucket):
        rate, own = count / sum(side.seconds), side.own_cpu / count * 1000
        server = side.server_cpu / count * 1000
        print(f"{side.name}: {rate:.1f} pictures/s, {own:.1f} ms of CPU each, the server's {server:.1f} ms")
    ratios = [a / b for a, b in zip(disk.seconds, bucket.seconds, strict=True)]
    print(f"bucket over folder: {sum(disk.seconds) / sum(bucket.seconds):.2f}, blocks {min(ratios):.2f} to", end=" ")
    print(f"{max(ratios):.2f}, median {statistics.median(ratios):.2f} ({len(ratios)} pairs)")
    print(f"CPU time of the folder's over the bucket's: {disk.own_cpu / bucket.own_cpu:.2f}")


if __name__ == "__main__":
    main()
