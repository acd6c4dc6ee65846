"""Listing a bucket in ranges of keys: each key once and in order, in few requests, whatever the keys and the server."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tables import for_each

from llava_cli import files
from llava_cli.batch.sources.containers import bucket_listing
from llava_cli.batch.sources.containers.bucket import Bucket, SortedNames
from llava_cli.batch.sources.containers.bucket_listing import list_objects
from llava_cli.batch.sources.containers.key_ranges import KeyRange, KeyRanges, midpoint
from llava_cli.batch.sources.containers.member_index import safe_name
from llava_cli.errors import InputMissing, OutputError
from llava_cli.images import cloud
from llava_cli.images.cloud import Cloud

URL = "s3://b/p/"
THREADS = 8
STRANGE = (
    "./a",
    "!",
    "a",
    "a/",
    "a//b",
    "https://x/y.png",
    "é",
    "漢/字",
    "😀",
    "\uffff",
    "\U0010ffff",
    "~",
    " ",
    "a\nb",
)
Keys = list[str]


class FakeS3:
    """`list_objects_v2` of a bucket in memory, as fsspec calls it."""

    def __init__(self, names: Keys, *, is_shuffled: bool = False, ignores_start: bool = False) -> None:
        self.keys = sorted(f"p/{name}" for name in names)
        if is_shuffled:
            random.Random(1).shuffle(self.keys)
        self.is_shuffled, self.ignores_start = is_shuffled, ignores_start
        self.requests = 0
        self.before: Callable[[int], None] = lambda number: None
        """Called with the number of each request."""
        self._lock = threading.Lock()

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def call_s3(self, method: str, **options: Any) -> dict[str, Any]:
        with self._lock:
            self.requests += 1
            number = self.requests
        self.before(number)
        assert method == "list_objects_v2"
        assert (options.pop("Bucket"), options.pop("Prefix")) == ("b", "p/")
        start, token = options.pop("StartAfter", ""), options.pop("ContinuationToken", None)
        start.encode()
        keys, begin = self.keys, int(token or 0)
        if start and not self.ignores_start:
            if self.is_shuffled:
                keys = [key for key in keys if key > start]
            else:
                begin = bisect_right(keys, start)
        end = begin + options.pop("MaxKeys")
        assert not options
        more = {"NextContinuationToken": str(end)} if end < len(keys) else {}
        items = [{"Key": key, "Size": len(key)} for key in keys[begin:end]]
        return {"Contents": items, "IsTruncated": bool(more), **more}


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(threading.enumerate())
    yield
    assert not [thread for thread in threading.enumerate() if thread not in before and "listing" in thread.name]
    assert not list(tmp_path.glob("llava-*"))


def serve(monkeypatch: pytest.MonkeyPatch, fake: FakeS3, page_keys: int = 10) -> FakeS3:
    monkeypatch.setattr(cloud, "file_system", lambda protocol: fake)
    monkeypatch.setattr(cloud, "PAGE_KEYS", page_keys)
    return fake


def listed() -> Keys:
    objects = list(list_objects(Cloud(URL), URL))
    assert all(size == len(f"p/{name}") for name, size in objects)
    return [name for name, _ in objects]


def distributions(seed: int, count: int) -> dict[str, Keys]:
    """Keys of a bucket, by what they are like."""
    draw = random.Random(seed)
    letters = "".join(map(chr, range(0x4E00, 0x9FFF)))

    def words(alphabet: str, longest: int) -> Keys:
        return sorted({"".join(draw.choices(alphabet, k=draw.randint(1, longest))) for _ in range(count)})

    sizes = [draw.randint(1, count) for _ in range(4)]
    return {
        "numbers": [f"photos/2024/IMG_{n:06}.jpg" for n in range(count)],
        "short numbers": [f"{n}.png" for n in range(count)],
        "a long beginning": [f"a/long/beginning/that/all/keys/have/in/common/{n:09}" for n in range(count)],
        "digests": [f"{draw.getrandbits(64):016x}.jpg" for _ in range(count)],
        "many folders": [f"{draw.randint(0, 99)}/{n:04}.jpg" for n in range(count)],
        "a few folders": [f"{name}/{n:06}" for name, size in zip("bdxz", sizes, strict=True) for n in range(size)],
        "days": [f"20{n % 20:02}/{n % 12:02}/{n % 28:02}/IMG_{n:05}.jpg" for n in range(count)],
        "most at the end": [f"a{n}" for n in range(40)] + [f"zz{n}" for n in range(count)],
        "most at the beginning": [f"a{n:07}" for n in range(count)] + ["zz"],
        "steep": [f"{int(draw.paretovariate(1) * 100):010}-{n}" for n in range(count)],
        "Chinese": words(letters, 4),
        "all kinds": words("aé漢😀\uffff /.~!Z9\x01", 12),
        "signs": words("!#$%&'()-_=+,.;", 10),
        "one letter": ["a" * n for n in range(1, min(count, 300))],
        "folders as objects": [f"{n // 3}/" + ("" if n % 3 == 0 else str(n)) for n in range(count)],
        "": ["", *STRANGE],
    }


@for_each("seed", range(4))
def test_each_key_is_listed_once_in_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In few more requests than there are pages."""
    count = random.Random(seed).choice([9, 11, 95, 1000, 3000])
    for kind, names in distributions(seed, count).items():
        fake = serve(monkeypatch, FakeS3(names))
        assert listed() == sorted(names), kind
        pages = -(-len(names) // 10)
        assert fake.requests <= 1.3 * pages + 40 and (pages > 1 or fake.requests == 1), (kind, pages, fake.requests)


@for_each("is_shuffled, ignores_start", [(True, False), (False, True), (True, True)])
def test_servers_that_know_no_order(is_shuffled: bool, ignores_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, names in distributions(7, 500).items():
        fake = serve(monkeypatch, FakeS3(names, is_shuffled=is_shuffled, ignores_start=ignores_start))
        assert sorted(listed()) == sorted(names), kind
        assert fake.requests <= -(-len(names) // 10) + 3, kind


def test_an_order_that_ends_late_and_a_server_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = serve(monkeypatch, FakeS3([f"{n:04}" for n in range(1000)]))
    fake.keys[700:] = reversed(fake.keys[700:])
    fake.is_shuffled = True
    assert sorted(listed()) == [f"{n:04}" for n in range(1000)]

    def refuse(number: int) -> None:
        if number == 2:
            raise type("NotImplemented", (Exception,), {"status": 501})

    fake = serve(monkeypatch, FakeS3([f"{n:04}" for n in range(1000)]))
    fake.before = refuse
    assert listed() == [f"{n:04}" for n in range(1000)]
    assert fake.requests == 102


def rounds(names: Keys, page: int) -> tuple[int, int]:
    """How many requests are made one after the other if all threads ask at once; and all of them."""
    fake, ranges = FakeS3(names), KeyRanges()
    parts: list[KeyRange | None] = [ranges.all[0], *[None] * (THREADS - 1)]
    count = 0
    while ranges.active:
        for part in filter(None, parts):
            begin = {"StartAfter": f"p/{part.start}"} if part.start else {}
            begin = {"ContinuationToken": part.token} if part.token else begin
            answer = fake.call_s3("list_objects_v2", Bucket="b", Prefix="p/", MaxKeys=page, **begin)
            keys = [item["Key"][2:] for item in answer["Contents"]]
            ranges.add(part, keys, answer.get("NextContinuationToken"))
        count += 1
        parts = [part if part and not part.is_done else ranges.split() for part in parts]
    return count, fake.requests


@for_each("kind", [kind for kind in distributions(3, 1) if kind not in ("one letter", "")])
def test_the_work_is_spread(kind: str) -> None:
    """Over 8 threads, within a third of the time of one."""
    names = sorted(set(distributions(3, 10_000)[kind]))
    pages = -(-len(names) // 50)
    count, requests = rounds(names, 50)
    assert count <= pages / 3 and requests <= 1.3 * pages + 40, (pages, count, requests)


def test_a_folder_of_100_000() -> None:
    count, requests = rounds([f"photos/2024/IMG_{n:06}.jpg" for n in range(100_000)], 1000)
    assert count <= 25
    assert requests <= 130


def test_midpoints() -> None:
    """They are between, and can be sent."""
    draw = random.Random(5)
    for _ in range(3000):
        first, last, end = sorted(
            "".join(draw.choices("019aZz/é漢😀\ud7ff\ue000\U0010ffff\x01", k=4)) for _ in range(3)
        )
        for limit in (end, None):
            if last != limit and (middle := midpoint(first, last, limit)) is not None:
                assert last < middle and (limit is None or middle < limit), (first, last, limit)
                middle.encode()
    assert midpoint("IMG_000", "IMG_099", "IMG_9") == "IMG_5"
    assert midpoint("a", "a", "a\0") is None


def test_names_are_sorted_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the bytes of what they are called in rows, each once."""
    names = [*STRANGE, *(f"{name}{n}.png" for name in STRANGE for n in range(9)), "x.png", "./x.png"]
    serve(monkeypatch, FakeS3(names))
    expected = sorted({os.fsencode(safe_name(name)) for name in names if name.endswith(".png")})
    bucket = Bucket(URL)
    for _ in range(2):
        assert [os.fsencode(entry.name) for entry in bucket.entries()] == expected
    bucket.close()


@for_each("is_shuffled", [False, True])
def test_sorted_names(is_shuffled: bool) -> None:
    names = [f"{n:05}\udcff\n" for n in range(2500)] * 2
    names = random.Random(1).sample(names, len(names)) if is_shuffled else sorted(names)
    found = SortedNames()
    found.fill(iter(names))
    assert list(found.all()) == sorted(set(names))
    found.close()


def test_an_error_ends_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = serve(monkeypatch, FakeS3([f"{n:04}.png" for n in range(5000)]))

    def fail(number: int) -> None:
        if number > 40:
            raise type("AccessDenied", (Exception,), {})

    fake.before = fail
    bucket = Bucket(URL)
    with pytest.raises(InputMissing, match="s3://b/p/: access denied"):
        list(bucket.entries())
    assert fake.requests <= 40 + THREADS
    bucket.close()


def test_one_fault_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = serve(monkeypatch, FakeS3([f"{n:04}" for n in range(500)]))

    def fail(number: int) -> None:
        if number == 7:
            raise type("SlowDown", (Exception,), {})

    fake.before = fail
    assert listed() == [f"{n:04}" for n in range(500)]


def test_ctrl_c_ends_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = serve(monkeypatch, FakeS3([f"{n:05}" for n in range(20_000)]))
    done = threading.Event()

    def interrupt(number: int) -> None:
        if number == 30:  # all that are under way from then on wait for the end
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if number > 30:
            done.wait(10)

    fake.before = interrupt
    monkeypatch.setattr(Cloud, "end", lambda self: done.set())
    with pytest.raises(KeyboardInterrupt):
        listed()
    assert fake.requests <= 30 + 2 * THREADS


@for_each("writes", [0, 50])
def test_a_full_disk_is_one_error(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, FakeS3([f"{n:04}.png" for n in range(5000)]))
    write_all, count = files.write_all, itertools.count()

    def write(descriptor: int, data: bytes) -> None:
        if next(count) >= writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(descriptor, data)

    monkeypatch.setattr(files, "write_all", write)
    bucket = Bucket(URL)
    with pytest.raises(OutputError, match="o space left on device"):
        list(bucket.entries())
    bucket.close()


def test_threads_are_as_many_as_simulated() -> None:
    assert bucket_listing._THREADS == THREADS
