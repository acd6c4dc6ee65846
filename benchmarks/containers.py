"""Archives and tables beside a folder: `python benchmarks/containers.py`. A quarter of an hour on two cores.

Makes tiny pictures in a folder, a zip, a tar, a tar.gz and a Parquet file, 1,000 and 100,000 of them, and runs
`llava batch` over each in a process of its own: peak memory of both, and pictures a second. What is the same for all
of them is left out: pictures are read and not decoded, and the engine answers at once. The larger run is killed
(`kill -9`) in its midst and started again: every row has to be there once, in order, with the picture's own hash.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

QUESTION = "what is this?"
KINDS = ("folder", "pictures.zip", "pictures.tar", "pictures.tar.gz", "pictures.parquet")


def pictures(count: int) -> Iterator[tuple[str, bytes]]:
    for number in range(count):
        data = io.BytesIO()
        Image.new("RGB", (16, 16), (number % 256, number // 256 % 256, number // 65536)).save(data, "PNG")
        yield f"{number // 1000:03d}/{number:06d}.png", data.getvalue()


def make(path: Path, count: int) -> None:
    """The same pictures, in the order of their names."""
    if path.name == "folder":
        for name, data in pictures(count):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in pictures(count):
                archive.writestr(name, data)
    elif path.suffix == ".parquet":
        make_table(path, count)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, data in pictures(count):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
                archive.members = []


def make_table(path: Path, count: int) -> None:
    import pyarrow
    from pyarrow import parquet

    names, data = zip(*pictures(count), strict=True)
    parquet.write_table(pyarrow.table({"image": data, "name": names}), path, row_group_size=10_000)


def answer(source: str, output: str) -> None:
    """In the process that is measured: a batch with an engine that answers at once; prints its seconds and MB."""
    from llava_cli.batch import run as module
    from llava_cli.batch.sources.source import Source
    from llava_cli.conversation import Conversation, Picture
    from llava_cli.engine import Answer, Chunk, Engine
    from llava_cli.images.sandbox import SandboxPool
    from llava_cli.settings import Sampling, Settings

    class AtOnce(Engine):
        model, precision, device = "at once", "fp32", "cpu"

        def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
            yield Chunk("it", Answer("it", "stop", 5, 0, 1, 0.0, 0.0))

        def prompt(self, conversation: Conversation) -> str:
            return ""

        def count(self, conversation: Conversation) -> int:
            return 5

        def peak_memory(self) -> int:
            return 0

    def read_only(pool: SandboxPool, source: str, file: bytes | Path, *_: object, **__: object) -> Picture:
        data = file if isinstance(file, bytes) else file.read_bytes()
        return Picture(source, image, hashlib.sha256(data).hexdigest())

    image = Image.new("RGB", (16, 16))
    SandboxPool.open = read_only  # type: ignore[method-assign]
    module.open_engine = lambda *_: AtOnce()  # type: ignore[assignment]
    module.identify = lambda settings: {"model": "at once"}  # type: ignore[assignment]
    begin = time.monotonic()
    job = module.Job(Source([source], (QUESTION,)), Settings(), "llava batch …", Path(output), quiet=True)
    if code := module.run(job):
        raise SystemExit(code)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(time.monotonic() - begin, memory)


def measured(source: Path, output: Path, kill_at: int = 0) -> tuple[float, float]:
    """Seconds and peak MB of a run; with `kill_at` it is killed once there are so many rows."""
    command = [sys.executable, __file__, "--answer", str(source), str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while kill_at and process.poll() is None:
        time.sleep(0.05)
        if output.exists() and output.read_bytes().count(b"\n") >= kill_at:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return 0.0, 0.0
    printed = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{source}: {process.returncode}")
    seconds, memory = map(float, printed.split())
    return seconds, memory


def is_whole(output: Path, count: int) -> bool:
    """Whether each picture has its one row, in order, with its own hash."""
    hashes = (hashlib.sha256(data).hexdigest() for _, data in pictures(count))
    with output.open() as rows:
        return [json.loads(row)["sha256"] for row in rows] == list(hashes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=1_000)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--answer", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        answer(*args.answer)
        return
    print(f"| | peak MB, {args.few:,} | peak MB, {args.many:,} | more, MB | pictures/s | killed and resumed |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for kind in args.kinds:
            few, many = Path(name, "few", kind), Path(name, "many", kind)
            for path, count in ((few, args.few), (many, args.many)):
                path.parent.mkdir(exist_ok=True)
                make(path, count)
            _, least = measured(few, Path(name, f"{kind}.few.jsonl"))
            seconds, most = measured(many, Path(name, f"{kind}.jsonl"))
            killed = Path(name, f"{kind}.killed.jsonl")
            measured(many, killed, kill_at=args.many // 2)
            _, again = measured(many, killed)
            is_right = is_whole(killed, args.many) and killed.read_bytes() == Path(name, f"{kind}.jsonl").read_bytes()
            rate = f"{args.many / seconds:.0f}"
            outcome = f"{'equal' if is_right else 'NOT EQUAL'}, {again:.0f} MB"
            print(f"| {kind} | {least:.0f} | {most:.0f} | {most - least:+.0f} | {rate} | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
