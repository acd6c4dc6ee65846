"""A `Job` in another process, where workers of a cluster get it by pickle: it finds the same pictures there."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pytest
from helpers import elsewhere
from helpers.command import Run
from helpers.elsewhere import Found, found_with
from helpers.tables import for_each
from PIL import Image
from pyarrow import parquet

from llava_cli.batch import run as module
from llava_cli.batch.cluster.worker import Assignment, Worker, open_model, versions
from llava_cli.batch.ranges import open_run
from llava_cli.batch.run import Job

QUESTION = "what is this?"
KEY = "sk-a-secret"
UNREAD = "nobody reads this\n"


@dataclass
class Sent:
    """A job that the command has made, with what it lists and finds in this process."""

    pickled: bytes = b""
    lines: list[bytes] = field(default_factory=list)
    found: Found = field(default_factory=list)

    def take(self, job: Job) -> int:
        """In place of `run`."""
        tasks = job.source.tasks()
        self.lines = [task.to_line() for task in (job.templates.checked(tasks) if job.templates else tasks)]
        self.found = found_with(job, self.lines)
        self.pickled = pickle.dumps((job, self.lines))
        job.source.close()
        return 0

    def found_elsewhere(self, folder: Path) -> tuple[str, Found]:
        """What another process misses and finds, which reads nothing of its stdin."""
        sent, answer = folder.parent / "sent", folder.parent / "answer"
        sent.write_bytes(self.pickled)
        command = [sys.executable, elsewhere.__file__, str(sent), str(answer)]
        done = subprocess.run(command, input=UNREAD, text=True, capture_output=True, cwd=folder, timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        missing, found, unread = pickle.loads(answer.read_bytes())
        assert unread == UNREAD
        return missing, found


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """The job of the next command."""
    made = Sent()
    monkeypatch.setattr(module, "run", made.take)
    return made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with pictures in one below it, and one beside it."""
    folder = tmp_path / "here"
    (folder / "pictures" / "sub").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (folder / "pictures" / name).write_bytes(png(number))
    (tmp_path / "outside.png").write_bytes(png(9))
    monkeypatch.chdir(folder)
    return folder


def png(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (20 + number, 10), (number, 100, 200)).save(data, "PNG")
    return data.getvalue()


NAMES = ("0.png", "1.png", "sub/2.png", "sub/é 3.png")
ROWS = [{"image": f"pictures/{name}", "question": f"what is {name}?", "city": f"city {name}"} for name in NAMES]
OUTSIDE = {"image": "../outside.png", "question": QUESTION, "city": "none"}


def write_zip() -> None:
    with zipfile.ZipFile("x.zip", "w") as archive:
        for number, name in enumerate(NAMES):
            archive.writestr(name, png(number))


def write_tar(name: str = "x.tar") -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for path in NAMES:
            archive.add(f"pictures/{path}", path)
    Path(name).write_bytes(gzip.compress(data.getvalue()) if name.endswith("gz") else data.getvalue())


def write_bytes_table() -> None:
    columns = {"picture": [png(number) for number in range(4)], "city": ["A", "B", "C", "D"]}
    parquet.write_table(pyarrow.table(columns), "x.parquet", row_group_size=2)


def write_paths_table() -> None:
    columns = {"image": [f"pictures/{name}" for name in NAMES], "city": ["A", "B", "C", "D"]}
    parquet.write_table(pyarrow.table(columns), "paths.parquet")


def write_rows(*rows: dict[str, str]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))


def write_csv() -> None:
    lines = [",".join(row.values()) for row in ROWS]
    Path("rows.csv").write_text("\n".join([",".join(ROWS[0]), *lines]) + "\n")


def write_list() -> None:
    Path("list.txt").write_text("".join(f"pictures/{name}\n" for name in NAMES))


def write_list_elsewhere() -> None:
    Path("list.txt").write_text("".join(f"{name}\n" for name in NAMES))


def write_all() -> None:
    for write in (write_zip, write_tar, write_bytes_table, write_paths_table, write_csv, write_list):
        write()
    write_rows(*ROWS, OUTSIDE)


def write_nothing() -> None:
    """The folder is enough."""


ALL = (
    "pictures/0.png",
    "pictures",
    "x.zip",
    "x.tar",
    "x.parquet",
    "paths.parquet",
    "rows.jsonl",
    "rows.csv",
    "list.txt",
)
STDIN_LIST = "".join(f"pictures/{name}\n" for name in NAMES)
STDIN_ROWS = "".join(json.dumps(row) + "\n" for row in ROWS)
TEMPLATE = "{name} of {row.city}, {width} wide, of {date or 'no date'}"
TEMPLATES = [{**row, "question": TEMPLATE} for row in ROWS]
SOURCES: dict[str, tuple[Callable[[], None], tuple[str, ...], int]] = {
    "a folder": (write_nothing, ("pictures", QUESTION), 4),
    "some of a folder": (write_nothing, ("pictures", QUESTION, "--include", "1.*"), 1),
    "a picture": (write_nothing, ("pictures/0.png", QUESTION), 1),
    "a list": (write_list, ("list.txt", QUESTION), 4),
    "a list with a root": (write_list_elsewhere, ("list.txt", QUESTION, "--root", "pictures"), 4),
    "a list on stdin": (write_nothing, ("-", QUESTION), 4),
    "questions": (write_rows, ("rows.jsonl",), 4),
    "questions on stdin": (write_nothing, ("-",), 4),
    "questions that name a picture outside": (lambda: write_rows(*ROWS, OUTSIDE), ("rows.jsonl",), 5),
    "a table of questions": (write_csv, ("rows.csv",), 4),
    "a zip": (write_zip, ("x.zip", QUESTION), 4),
    "a tar": (write_tar, ("x.tar", QUESTION), 4),
    "a tar.gz": (lambda: write_tar("x.tar.gz"), ("x.tar.gz", QUESTION), 4),
    "a table of pictures": (write_bytes_table, ("x.parquet", QUESTION), 4),
    "a table of paths": (write_paths_table, ("paths.parquet", QUESTION), 4),
    "a table with a root": (write_paths_table, ("paths.parquet", QUESTION, "--root", "pictures/.."), 4),
    "all of them": (write_all, (*ALL, QUESTION), 34),
    "templates in rows": (lambda: write_rows(*TEMPLATES), ("rows.jsonl", "--template-question"), 4),
    "a template over a table": (write_bytes_table, ("x.parquet", TEMPLATE, "--template-question"), 4),
    "a template over a table of paths": (write_paths_table, ("paths.parquet", TEMPLATE, "--template-question"), 4),
    "a saved prompt with parameters": (write_bytes_table, ("x.parquet", "-t", "saved", "-P", "lang=Frisian"), 4),
}


@pytest.fixture
def send(here: Path, sent: Sent, run: Run) -> Callable[[str], Sent]:
    """Makes the job of one of `SOURCES`."""

    def make(kind: str) -> Sent:
        write, words, count = SOURCES[kind]
        write()
        if "-t" in words:
            run("prompts", "save", "saved", "in {lang}: {row.city}, {name}")
        text = STDIN_ROWS if kind == "questions on stdin" else STDIN_LIST
        result = run("batch", *words, "-m", "builtin", "-o", "out.jsonl", input=text if "-" in words else None)
        assert result.exit_code == 0, result.stderr
        assert len(sent.lines) == count
        return sent

    return make


@pytest.mark.parametrize("kind", SOURCES)
def test_the_same_pictures_and_questions(kind: str, here: Path, send: Callable[[str], Sent]) -> None:
    sent = send(kind)
    refused = [thing for thing, _ in sent.found if "outside" in thing]
    assert len(refused) == ("outside" in kind or kind == "all of them")
    assert len({thing for thing, _ in sent.found}) == min(len(sent.found), 4 + len(refused))
    if "template" in kind or "-t" in SOURCES[kind][1]:
        assert all(("Frisian: " if "-t" in SOURCES[kind][1] else " wide, of ") in asked for _, asked in sent.found)
        assert not any("{" in asked for _, asked in sent.found)
    assert sent.found_elsewhere(here) == ("", sent.found)


def test_what_only_another_source_may_give_is_refused_elsewhere_too(here: Path, sent: Sent, run: Run) -> None:
    """A list may name any file; that a questions file has named this one is known from its rows alone."""
    write_rows(*ROWS, OUTSIDE)
    write_list()
    assert run("batch", "rows.jsonl", "list.txt", QUESTION, "-m", "builtin", "-o", "out.jsonl").exit_code == 0
    (here / "rows.jsonl").write_text("")  # which is not read there
    (here / "list.txt").write_text("")
    missing, found = sent.found_elsewhere(here)
    assert (missing, found) == ("", sent.found)
    assert found[4][0].startswith("../outside.png: is outside")


@for_each("kind", ["a folder", "a zip", "a tar.gz", "a table of pictures", "a table of paths", "all of them"])
def test_a_few_rows_of_the_middle(kind: str, here: Path, send: Callable[[str], Sent]) -> None:
    """A worker has some ranges, and gets what is before them no more."""
    sent = send(kind)
    some = slice(2, None)
    job, lines = pickle.loads(sent.pickled)
    sent.pickled, sent.found = pickle.dumps((job, lines[some])), sent.found[some]
    assert sent.found_elsewhere(here) == ("", sent.found)


GONE = {
    "a folder": "pictures",
    "a picture": "pictures",
    "a list with a root": "pictures",
    "a table with a root": "pictures",
    "a zip": "x.zip",
    "a table of pictures": "x.parquet",
}


@for_each("kind, gone", list(GONE.items()))
def test_a_source_that_is_not_there(kind: str, gone: str, here: Path, send: Callable[[str], Sent]) -> None:
    sent = send(kind)
    job, _ = pickle.loads(sent.pickled)
    os.rename(gone, "elsewhere")
    assert job.source.missing_here().removesuffix("/..") == gone
    os.rename("elsewhere", gone)
    assert job.source.missing_here() == ""


def test_a_key_is_in_no_text(here: Path, sent: Sent, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to the workers, which need it, and into nothing that they may print."""
    monkeypatch.setenv("LLAVA_API_KEY", KEY)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        server = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        assert run("batch", "pictures", QUESTION, "--server", server, "-o", "out.jsonl").exit_code == 0
        job, _ = pickle.loads(sent.pickled)
        assert job.settings.remote.api_key == KEY
        (here / "out.jsonl.run").mkdir()
        shared = open_run(here / "out.jsonl")
        identity = {"model": "a-model", "server": server}
        assignment = Assignment(job, shared, identity, str(here), shared.leave_token(), 1, open_model)
        ready = Worker().prepare(versions(), pickle.dumps(assignment))
    assert ready.refusal is not None
    assert "cannot use a-model" in ready.refusal.reason
    assert KEY not in f"{job!r} {assignment!r} {ready!r}"
