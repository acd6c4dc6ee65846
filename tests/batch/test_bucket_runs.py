"""Rows that are written to a bucket, by one process or by shards, on a real S3 server on this machine."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import s3
from helpers.command import Run
from helpers.faults import Told, at_once
from helpers.tables import for_each
from PIL import Image

from llava_cli.batch import run as module
from llava_cli.batch.ranges import bucket_files, row_range
from llava_cli.batch.ranges.bucket_files import BucketFiles
from llava_cli.batch.ranges.bucket_run import BucketRun
from llava_cli.batch.ranges.manifest_index import ManifestIndex
from llava_cli.batch.ranges.merge import merge
from llava_cli.batch.ranges.row_range import ALL, Shard
from llava_cli.batch.ranges.shard import run_shard
from llava_cli.batch.run import Job
from llava_cli.batch.sources.source import Source
from llava_cli.batch.tasks import Task
from llava_cli.errors import LlavaError, OutputError
from llava_cli.images import cloud
from llava_cli.settings import Settings

QUESTION = "what is this?"
COUNT = 20
OUT = "s3://results/out.jsonl"


def picture(number: int) -> bytes:
    Image.new("RGB", (8, 6), (number % 256, 0, 99)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


PHOTOS = {f"photos/{number:02}.png": picture(number) for number in range(COUNT)}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[s3.Server]:
    """With a bucket of pictures, which are in the current folder, too, and one for results; five rows in a range."""
    for name in s3.PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "open_engine", lambda *_: Told())
    monkeypatch.setattr(module, "identify", lambda settings: {"model": "told"})
    monkeypatch.setattr(row_range, "LEAST_RANGES", 4)
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name, data in PHOTOS.items():
        Path(name).write_bytes(data)
    with s3.serving() as server:
        for name, value in {**s3.ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        cloud.file_system.cache_clear()
        s3.forget()
        server.fill("album", PHOTOS)
        server.fill("results", {})
        server.requests.clear()
        yield server


@pytest.fixture
def wanted(server: s3.Server, run: Run) -> bytes:
    """What a single run over the folder writes."""
    assert run("batch", "photos", QUESTION, "-q", "-o", "single.jsonl").exit_code == 0
    return Path("single.jsonl").read_bytes()


def names(server: s3.Server) -> list[str]:
    return [item["Key"] for item in server.client.list_objects_v2(Bucket="results").get("Contents", ())]


def manifest(server: s3.Server) -> str:
    """Of the run, which its settings name."""
    settings = server.client.get_object(Bucket="results", Key="out.jsonl.run/settings.json")["Body"].read()
    return f"out.jsonl.run/{json.loads(settings)['manifest']}"


def output(server: s3.Server) -> bytes:
    return bytes(server.client.get_object(Bucket="results", Key="out.jsonl")["Body"].read())


def shard(run: Run, number: int, count: int, *more: str) -> Any:
    return run("batch", "photos", QUESTION, "-o", OUT, "--shard", f"{number}/{count}", *more)


def assert_joined(server: s3.Server, wanted: bytes) -> None:
    assert output(server) == wanted
    assert [name for name in names(server) if name != manifest(server)] == ["out.jsonl", "out.jsonl.run/settings.json"]
    assert not server.client.list_multipart_uploads(Bucket="results").get("Uploads")


def test_a_whole_run(run: Run, server: s3.Server, wanted: bytes) -> None:
    """From a folder to a bucket; again, it has nothing to do."""
    assert run("batch", "photos", QUESTION, "-o", OUT).exit_code == 0
    assert_joined(server, wanted)
    again = run("batch", "photos", QUESTION, "-o", OUT)
    assert (again.exit_code, "20 rows · 0 failed (joined before)" in again.stderr) == (0, True)
    assert run("batch", "--merge", OUT).exit_code == 0
    assert_joined(server, wanted)


def test_from_a_bucket_to_a_bucket(run: Run, server: s3.Server, wanted: bytes) -> None:
    assert run("batch", "s3://album/photos/", QUESTION, "-o", OUT).exit_code == 0
    rows = [json.loads(line) for line in output(server).splitlines()]
    assert rows == [json.loads(line) for line in wanted.splitlines()]


@for_each("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1, 2)], own=())
def test_shards_in_any_order(order: tuple[int, ...], run: Run, server: s3.Server, wanted: bytes) -> None:
    for key in names(server):
        server.client.delete_object(Bucket="results", Key=key)
    for number in order[:-1]:
        assert shard(run, number, 3).exit_code == 0
    missing = run("batch", "--merge", OUT)
    if len(set(order[:-1])) < 3:
        assert missing.exit_code == 66
        assert f"shard {order[-1]}/3" in missing.stderr or "are missing" in missing.stderr
        assert "out.jsonl" not in names(server)
    for number in {1, 2, 3}.difference(order[:-1]):
        assert shard(run, number, 3).exit_code == 0
    assert_joined(server, wanted)


def test_twice_at_once(server: s3.Server, wanted: bytes) -> None:
    def begin(number: int) -> int:
        job = Job(Source(["photos"], (QUESTION,)), Settings(), "llava batch …", OUT, quiet=True)
        return run_shard(job, Shard(number, 2))

    assert at_once(*(partial(begin, number) for number in (1, 2, 1, 2))) == [0, 0, 0, 0]
    assert merge(OUT, True) == 0
    assert_joined(server, wanted)


def test_a_drained_attempt_is_adopted(
    run: Run, server: s3.Server, wanted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    def say(self: Told, question: str, name: str) -> str:
        asked.append(name)
        if len(asked) == 8:
            signal.raise_signal(signal.SIGTERM)
        return real(self, question, name)

    real = Told.say
    monkeypatch.setattr(Told, "say", say)
    stopped = run("batch", "photos", QUESTION, "-o", OUT)
    assert stopped.exit_code == 143
    assert any(name.startswith("out.jsonl.run/attempt-00001-") for name in names(server))
    assert run("batch", "photos", QUESTION, "-o", OUT).exit_code == 0
    assert len(asked) == len(set(asked)) == COUNT
    assert_joined(server, wanted)


def test_other_settings_and_rows_that_are_no_runs(run: Run, server: s3.Server) -> None:
    assert shard(run, 1, 2).exit_code == 0
    other = run("batch", "photos", "where is this?", "-o", OUT, "--shard", "2/2")
    assert (other.exit_code, "other settings made its rows" in other.stderr) == (65, True)
    server.client.put_object(Bucket="results", Key="taken.jsonl", Body=b"{}\n")
    taken = run("batch", "photos", QUESTION, "-o", "s3://results/taken.jsonl")
    assert (taken.exit_code, "it has rows already" in taken.stderr) == (65, True)


@for_each("data", [b"", b"{}\n", b"x" * 50])
def test_a_damaged_object_is_named(data: bytes, run: Run, server: s3.Server, wanted: bytes) -> None:
    for key in names(server):
        server.client.delete_object(Bucket="results", Key=key)
    assert shard(run, 1, 2).exit_code == 0
    key = "out.jsonl.run/part-00001.jsonl"
    server.client.put_object(Bucket="results", Key=key, Body=data)
    assert shard(run, 2, 2).exit_code == 65
    assert "out.jsonl" not in names(server)
    server.client.delete_object(Bucket="results", Key=key)
    assert shard(run, 1, 2).exit_code == 0
    assert_joined(server, wanted)


def test_errors_are_one_line(run: Run, server: s3.Server, wanted: bytes) -> None:
    missing = run("batch", "photos", QUESTION, "-o", "s3://nowhere-at-all/out.jsonl")
    assert missing.exit_code == 74
    assert missing.stderr.splitlines()[0] == "llava: s3://nowhere-at-all/out.jsonl: there is no such bucket"
    server.always["/results/out.jsonl.run/part-00002.jsonl"] = (403, "AccessDenied")
    denied = run("batch", "photos", QUESTION, "-o", OUT)
    assert (denied.exit_code, "access denied" in denied.stderr) == (74, True)
    server.always.clear()
    assert run("batch", "photos", QUESTION, "-o", OUT).exit_code == 0
    assert_joined(server, wanted)
    for scheme in ("hf://datasets/a/b/out.jsonl",):
        refused = run("batch", "photos", QUESTION, "-o", scheme)
        assert (refused.exit_code, "is only read" in refused.stderr) == (2, True)


def test_a_request_that_fails_is_tried_again(run: Run, server: s3.Server, wanted: bytes) -> None:
    server.faults["/results/out.jsonl.run/part-00001.jsonl"] = [(503, "SlowDown"), (500, "InternalError")]
    server.faults["/results/out.jsonl"] = [(404, ""), (404, ""), (503, "SlowDown"), (500, "InternalError")]
    assert run("batch", "photos", QUESTION, "-o", OUT).exit_code == 0
    assert_joined(server, wanted)


def test_a_lost_index_is_made_anew(run: Run, server: s3.Server, wanted: bytes) -> None:
    assert shard(run, 1, 2).exit_code == 0
    server.client.delete_object(Bucket="results", Key=f"{manifest(server)}.index")
    assert shard(run, 2, 2).exit_code == 0
    assert_joined(server, wanted)


def test_an_empty_source(run: Run, server: s3.Server) -> None:
    Path("nothing").mkdir()
    assert run("batch", "nothing", QUESTION, "-o", OUT).exit_code == 66
    assert str(ALL) == "1/1"
    with pytest.raises(LlavaError):
        merge("s3://results/other.jsonl", True)
    Path("nothing/a.png").write_bytes(picture(1))  # it is not empty any more
    assert run("batch", "nothing", QUESTION, "-o", OUT).exit_code == 0
    assert output(server).count(b"\n") == 1


@for_each("name", ["[1] out*.jsonl", "a?b#c.jsonl", "{é}.jsonl"])
def test_names_that_patterns_have(name: str, run: Run, server: s3.Server, wanted: bytes) -> None:
    for number in (2, 1):
        done = run("batch", "photos", QUESTION, "-o", f"s3://results/{name}", "--shard", f"{number}/2")
        assert done.exit_code == 0, done.stderr
    assert server.client.get_object(Bucket="results", Key=name)["Body"].read() == wanted
    assert [key for key in names(server) if "/part-" in key] == []


@for_each("url", ["s3://results", "s3://results/", "s3://results/folder/"])
def test_what_is_no_object(url: str, run: Run, server: s3.Server) -> None:
    refused = run("batch", "photos", QUESTION, "-o", url)
    assert (refused.exit_code, names(server)) == (2, [])
    assert refused.stderr == f"llava: -o: {url} names no object\n  -o {url.rstrip('/')}/out.jsonl\n"


def test_the_first_list_of_two_is_that_of_the_run(run: Run, server: s3.Server, wanted: bytes) -> None:
    """Another shard has listed the source, one picture later, and puts its list once the first one has begun."""
    first, second = BucketRun(OUT), BucketRun(OUT)

    def tasks(more: tuple[str, ...]) -> Iterator[Task]:
        yield from (Task(name, QUESTION) for name in (*sorted(PHOTOS), *more))

    def meanwhile() -> Iterator[Task]:
        yield from tasks(("photos/new.png",))
        first.begin({"model": "told"}, partial(tasks, ()), None)

    second.begin({"model": "told"}, meanwhile, None)
    assert (first.grid.total, second.grid.total) == (COUNT, COUNT)


def test_a_full_disk_for_temporary_files(run: Run, server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(manifest: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ManifestIndex, "made", no_space)
        full = run("batch", "photos", QUESTION, "-o", OUT)
    assert (full.exit_code, "no space left on device\n  TMPDIR=FOLDER" in full.stderr) == (74, True)
    assert names(server) == []


def test_a_list_without_settings_is_no_runs(
    run: Run, server: s3.Server, wanted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever put it was killed then; the next one asks something else."""

    def killed(self: BucketFiles, name: str, data: bytes) -> bool:
        if name == "settings.json":
            raise OutputError("out.jsonl", "killed")
        return put(self, name, data)

    put = BucketFiles.create
    with monkeypatch.context() as patch:
        patch.setattr(BucketFiles, "create", killed)
        assert run("batch", "photos", "something else?", "-o", OUT).exit_code == 74
    assert [name.partition("-")[0] for name in names(server)] == ["out.jsonl.run/manifest"] * 2
    assert run("batch", "photos", QUESTION, "-o", OUT).exit_code == 0
    assert_joined(server, wanted)


def test_rows_that_failed_are_told_again(run: Run, server: s3.Server) -> None:
    Path("photos/03.png").write_bytes(b"no picture")
    assert run("batch", "photos", QUESTION, "-o", OUT).exit_code == 1
    again = run("batch", "photos", QUESTION, "-o", OUT, "-q")
    assert (again.exit_code, again.stderr) == (1, "")
    assert run("batch", "--merge", OUT).exit_code == 1


@for_each("status, code, is_new", [(409, "ConditionalRequestConflict", True), (412, "PreconditionFailed", False)])
def test_a_put_beside_another_one(status: int, code: str, is_new: bool, run: Run, server: s3.Server) -> None:
    """A conflict says that another put is under way, and not that it will succeed."""
    files = BucketFiles("s3://results/", "results")
    server.faults[f"/results/{status}"] = [(status, code)]
    assert files.create(str(status), b"x") is is_new
    assert (files.size(str(status)) is not None) is is_new


def test_who_joins_second_leaves_no_part_of_its_output(run: Run, server: s3.Server) -> None:
    def chunks() -> Iterator[bytes]:
        yield bytes(bucket_files._BLOCK_BYTES + 1)
        assert files.create("large", b"first")
        yield b"more"

    files = BucketFiles("s3://results/", "results")
    assert files.write("large", chunks()) is False
    assert files.lines("large") == [b"first"]
    assert not server.client.list_multipart_uploads(Bucket="results").get("Uploads")


def test_lines_of_large_objects(run: Run, server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    files, data = BucketFiles("s3://results/", "results"), b"a\n" * 7 + b"long enough\n\nno end"
    server.client.put_object(Bucket="results", Key="lines", Body=data)
    for size in range(1, len(data) + 2):
        monkeypatch.setattr(bucket_files, "_BLOCK_BYTES", size)
        assert list(files.all_lines("lines")) == data.splitlines(keepends=True)
    assert list(files.all_lines("nothing")) == files.lines("nothing") == []
