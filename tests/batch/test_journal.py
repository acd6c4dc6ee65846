"""The output of `llava batch` survives: killed, cut off from power, on a full or broken disk, and damaged by others."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers.faults import (
    KILLED,
    NAMES,
    Died,
    Faults,
    Pictures,
    Told,
    begin,
    give_away,
    output,
    without_a_model,
)
from helpers.tables import for_each

from llava_cli import files, limits
from llava_cli.batch import run as module
from llava_cli.batch.journal import Journal
from llava_cli.batch.rows import to_line
from llava_cli.batch.run import Job, run
from llava_cli.batch.sources.source import Source
from llava_cli.errors import BadData, LlavaError, OutputTaken
from llava_cli.settings import Settings


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model, no pictures, and a sync every second row, whatever the time."""
    without_a_model(monkeypatch)


def attempt(folder: Path, faults: Faults | None = None, check: str = "", **options: Any) -> int:
    """One run of `llava batch list.txt "what?" -o out.jsonl`: its exit code, or KILLED.

    What it says when it fails has `check` in it.
    """
    source = Source([str(folder / "list.txt")], options.pop("questions", ("what?",)), root="/")
    path = options.pop("output", folder / "out" / "out.jsonl")
    job = Job(source, Settings(), "llava batch …", path, quiet=True, **options)
    with (faults or Faults())(folder / "out"):
        try:
            return run(job)
        except LlavaError as error:
            assert check in str(error)
            return error.exit_code
        except Died:
            return KILLED


def set_output(folder: Path, data: bytes) -> None:
    (folder / "out" / "out.jsonl").write_bytes(data)


# Scenes: what a run finds on the disk, and the options it is started with.

Scene = Callable[[Path], dict[str, Any]]


def fresh(folder: Path) -> dict[str, Any]:
    begin(folder)
    return {}


def torn(folder: Path) -> dict[str, Any]:
    """The last row ends in its midst."""
    begin(folder)
    attempt(folder)
    whole = output(folder)
    set_output(folder, whole[: whole.rindex(b'"model"')])
    return {}


def erring(folder: Path) -> dict[str, Any]:
    """Two rows are errors and the last one is missing; what was not there for them is there now."""
    begin(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pictures, "missing", frozenset({"bb.png", "ccc.png"}))
        assert attempt(folder) == 1
    set_output(folder, b"".join(output(folder).splitlines(keepends=True)[:-1]))
    return {"retry": True}


def growing(folder: Path) -> dict[str, Any]:
    """Three pictures were answered, and there are two more now."""
    begin(folder, NAMES[:3])
    assert attempt(folder) == 0
    (folder / "list.txt").write_text("\n".join(NAMES))
    return {"extend": True}


def damaged(folder: Path) -> dict[str, Any]:
    """One row is broken and the last one torn."""
    torn(folder)
    set_output(folder, output(folder).replace(b'"bb.png"', b'"bb\0png"'))
    return {"repair": True}


def zipped(folder: Path) -> dict[str, Any]:
    """The pictures are in an archive, whatever its name is."""
    begin(folder)
    with zipfile.ZipFile(folder / "list.txt", "w") as archive:
        for name in NAMES:
            archive.writestr(name, name)
    return {}


def packed(folder: Path) -> dict[str, Any]:
    """The same in one that can only be read forward."""
    begin(folder)
    with tarfile.open(folder / "list.txt", "w:gz") as archive:
        for name in NAMES:
            archive.addfile(tarfile.TarInfo(name))
    return {}


SCENES: list[Scene] = [fresh, torn, erring, growing, damaged]
OPEN, ROW, SYNC, CUT = 2, 5, 2, 4
PUT = OPEN + ROW + SYNC + 2 + SYNC
MOMENTS = {
    fresh: 2 * OPEN + 2 * PUT + SYNC + 5 * ROW + 3 * SYNC,
    torn: 2 * OPEN + PUT + CUT + ROW + SYNC,
    erring: 2 * OPEN + PUT + ROW + SYNC,
    growing: 2 * OPEN + PUT + 2 * ROW + 2 * SYNC,
    damaged: 2 * OPEN + PUT + CUT + PUT + ROW + SYNC,
}


@pytest.fixture
def undisturbed(tmp_path: Path) -> bytes:
    """What all scenes lead to."""
    folder = begin(tmp_path / "undisturbed")
    assert attempt(folder) == 0
    return output(folder)


class Stage:
    """A scene, set again for each try."""

    def __init__(self, scene: Scene, folder: Path, wanted: bytes) -> None:
        self.scene, self.wanted = scene, wanted
        self.template, self.folder = folder / "template", folder / "now"
        self.options = scene(self.template)
        self.before = output(self.template)

    def set(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        return Path(shutil.copytree(self.template, self.folder))

    def moments(self, **options: Any) -> int:
        """How many there are in a run that nothing disturbs."""
        faults = Faults(**options)
        assert attempt(self.set(), faults, **self.options) == 0
        assert output(self.folder) == self.wanted
        return len(faults.moments)

    def assert_readable(self) -> None:
        """Who reads the file now sees all rows that there were, in order, and perhaps the beginning of one more."""
        rows = output(self.folder)
        whole = rows[: rows.rfind(b"\n") + 1]
        assert self.wanted.startswith(whole) or self.before.startswith(whole)
        assert whole.count(b"\n") >= self.before.count(b"\n")

    def assert_goes_on(self) -> None:
        """The same command ends with the file of an undisturbed run, and what was cut out of it is kept."""
        assert attempt(self.folder, **self.options) == 0
        assert output(self.folder) == self.wanted
        assert not list(self.folder.rglob("*.new"))
        if self.scene in (torn, damaged):
            wanted = self.wanted.splitlines(keepends=True)
            taken = b"".join(line for line in self.before.splitlines(keepends=True) if line not in wanted)
            assert taken in [path.read_bytes() for path in self.folder.rglob("torn-*")]


@pytest.fixture(params=SCENES, ids=lambda scene: scene.__name__)
def stage(request: pytest.FixtureRequest, tmp_path: Path, undisturbed: bytes) -> Stage:
    return Stage(request.param, tmp_path, undisturbed)


def survives(stage: Stage, **options: Any) -> None:
    """Dies once at each moment of a run, and goes on."""
    for at in range(stage.moments()):
        assert attempt(stage.set(), Faults(at, **options), **stage.options) == KILLED
        stage.assert_readable()
        stage.assert_goes_on()


def test_the_moments_are_those_that_were_counted_by_hand(stage: Stage) -> None:
    assert stage.moments() == MOMENTS[stage.scene]


def test_killed_at_any_moment(stage: Stage) -> None:
    survives(stage)


@pytest.mark.parametrize("scene", [zipped, packed])
def test_a_run_over_an_archive_is_killed_at_any_moment(scene: Scene, tmp_path: Path, undisturbed: bytes) -> None:
    survives(Stage(scene, tmp_path, undisturbed))


def test_power_fails_at_any_moment(stage: Stage) -> None:
    """Of what was not synced nothing is left."""
    survives(stage, power=True)


def test_killed_again_while_it_repairs_the_output(stage: Stage) -> None:
    count = stage.moments()
    for first in range(count):
        for second in range(first % 13, count, 13):
            assert attempt(stage.set(), Faults(first), **stage.options) == KILLED
            code = attempt(stage.folder, Faults(second), **stage.options)
            assert code == KILLED or (code == 0 and output(stage.folder) == stage.wanted)
            stage.assert_readable()
            stage.assert_goes_on()


def test_killed_between_the_parts_of_a_row_that_is_written_in_pieces(stage: Stage) -> None:
    for at in range(stage.moments(most=90)):
        assert attempt(stage.set(), Faults(at, most=90), **stage.options) == KILLED
        stage.assert_goes_on()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_an_error_of_the_disk_at_any_moment(number: int, stage: Stage) -> None:
    """It is said with its exit code, the file ends on a whole row, and the same command goes on."""
    for at in range(stage.moments()):
        code = attempt(stage.set(), Faults(at, number), **stage.options)
        assert code == (73 if at < 2 * OPEN else 74)
        assert output(stage.folder).endswith(b"\n") or output(stage.folder) in (b"", stage.before)
        stage.assert_readable()
        stage.assert_goes_on()


def test_a_disk_that_fails_from_some_moment_on(stage: Stage) -> None:
    for at in range(stage.moments()):
        assert attempt(stage.set(), Faults(at, errno.EIO, lasting=True), **stage.options) in (73, 74)
        stage.assert_readable()
        stage.assert_goes_on()


def test_short_writes(stage: Stage) -> None:
    assert stage.moments(most=1) > 5 * MOMENTS[stage.scene]


@for_each("seed", range(40))
def test_any_sequence_of_kills_and_errors(seed: int, tmp_path: Path) -> None:
    """Thirty rows, some of them errors; every start is disturbed at some moment, until one is not."""
    random = Random(seed)
    names = [f"{random.choice('aéß')}{n}.png" for n in range(30)]
    folder, whole = begin(tmp_path / "it", names), begin(tmp_path / "whole", names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pictures, "missing", frozenset(random.sample(names, random.randrange(4))))
        wanted = attempt(whole)
        code = None
        while code != wanted:
            faults = Faults(
                at=random.randrange(random.choice((10, 60, 250))),
                error=random.choice((0, 0, errno.EIO, errno.ENOSPC)),
                lasting=random.random() < 0.3,
                power=random.random() < 0.3,
                most=random.choice((None, None, 1, 50)),
            )
            code = attempt(folder, faults, retry=random.random() < 0.3, extend=random.random() < 0.2)
            assert code in (wanted, KILLED, 73, 74)
    assert output(folder) == output(whole)


# A test that cannot fail is none: what these plant is found.


def no_repair(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "truncate", lambda descriptor, size: None)


def no_keeping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Journal, "_set_aside", lambda self, data: None)


def no_sync_before_the_rename(patch: pytest.MonkeyPatch) -> None:
    replace = Faults.replace

    def unsynced(self: Faults, old: Any, new: Any) -> None:
        self._certain[Path(old).stat().st_ino] = 0
        replace(self, old, new)

    patch.setattr(Faults, "replace", unsynced)


def in_place(patch: pytest.MonkeyPatch) -> None:
    def put(path: Path, chunks: Any) -> None:
        data = b"".join(chunks)
        descriptor = files.open_for_writing(path, os.O_WRONLY | os.O_TRUNC, files.SHARED)
        files.write_all(descriptor, data)
        files.os.close(descriptor)

    patch.setattr(files, "atomic_write", put)


def counting_torn_rows(patch: pytest.MonkeyPatch) -> None:
    """A torn row is ended and taken for one, as plain append-and-skip does."""

    def check(self: Journal, *args: Any) -> None:
        if (data := self.output.read_bytes()) and not data.endswith(b"\n"):
            files.write_all(self._open_file.descriptor, b"\n")
        self._open_file.size, self.done = self.output.stat().st_size, self.output.read_bytes().count(b"\n")

    patch.setattr(Journal, "check", check)


@for_each(
    ("plant", "scene", "power"),
    [
        (no_repair, fresh, False),
        (no_keeping, torn, False),
        (in_place, fresh, False),
        (in_place, erring, False),
        (no_sync_before_the_rename, fresh, True),
        (no_sync_before_the_rename, erring, True),
        (counting_torn_rows, fresh, False),
    ],
    own=(undisturbed,),
)
def test_planted_bugs_are_found(
    plant: Callable[[pytest.MonkeyPatch], None], scene: Scene, power: bool, tmp_path: Path, undisturbed: bytes
) -> None:
    stage = Stage(scene, tmp_path, undisturbed)
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises((AssertionError, ValueError)):
            survives(stage, power=power)
    survives(stage, power=power)


# Damage that no crash leaves.


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """The folder of a run that is complete."""
    folder = begin(tmp_path / "done")
    assert attempt(folder) == 0
    return folder


def test_any_byte_that_is_another(done: Path) -> None:
    """Where it makes of a row what could not be one, that is found and named; nothing ends in a traceback."""
    whole, found = output(done), 0
    first, last = (sum(map(len, whole.splitlines(keepends=True)[:line])) for line in (2, 3))
    for at in range(first, last):
        for value in (whole[at] ^ 1, whole[at] ^ 128, 0):
            set_output(done, whole[:at] + bytes([value]) + whole[at + 1 :])
            code = attempt(done, check="line 3: damaged")
            assert code in (0, 65)
            found += code == 65
    assert found > (last - first) * 2  # what is not found is inside of an answer or a hash


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda line: bytes(len(line) - 1) + b"\n",
    "zeros inside": lambda line: line[:99] + bytes(512) + line[99:],
    "split UTF-8": lambda line: line.replace("ö".encode(), "ö".encode()[:1]),
    "cut in two": lambda line: line[:40] + b"\n" + line[40:],
    "empty": lambda line: b"\n",
    "deep": lambda line: b"[" * 100_000 + b"\n",
    "null": lambda line: b"null\n",
    "other status": lambda line: line.replace(b'"status": "ok"', b'"status": "good"'),
    "other key": lambda line: line.replace(b'"answer_tokens"', b'"answer_tolkens"'),
    "no answer": lambda line: line.replace(b'"answer": "', b'"answer": null, "was": "'),
    "no error": lambda line: line.replace(b'"status": "ok"', b'"status": "error"'),
    "flags": lambda line: line.replace(b"}\n", b', "flags": 3}\n'),
    "right": lambda line: line.replace(b"}\n", b', "right": "yes"}\n'),
    "another row's": lambda line: line.replace(b"ccc.png", b"bb.png"),
    "gone": lambda line: b"",
    "twice": lambda line: line * 2,
}


@for_each("kind", DAMAGE, own=(done, undisturbed))
def test_a_damaged_line_is_named_and_repaired_only_on_request(kind: str, done: Path, undisturbed: bytes) -> None:
    lines = undisturbed.splitlines(keepends=True)
    lines[2] = DAMAGE[kind](lines[2])
    set_output(done, broken := b"".join(lines))
    line = 4 if kind == "twice" else 3
    assert attempt(done, check=f"out.jsonl, line {line}: damaged, or not about what it should be") == 65
    assert output(done) == broken
    assert attempt(done, repair=True) == 0
    assert output(done) == undisturbed
    kept = (done / "out" / "out.jsonl.run" / "torn-1").read_bytes()
    assert kept and all(part in broken for part in kept.splitlines(keepends=True))
    assert set(broken.splitlines()) <= set(undisturbed.splitlines()) | set(kept.splitlines())


def test_rows_behind_the_last_one(done: Path, undisturbed: bytes) -> None:
    extra = undisturbed.splitlines(keepends=True)[0]
    set_output(done, undisturbed + extra)
    assert attempt(done, check="out.jsonl, line 6: more rows than tasks") == 65
    assert attempt(done, repair=True) == 0
    assert output(done) == undisturbed
    assert (done / "out" / "out.jsonl.run" / "torn-1").read_bytes() == extra


@pytest.mark.parametrize("name", ["settings.json", "manifest"])
def test_any_byte_beside_the_output_that_is_another(name: str, done: Path) -> None:
    path = done / "out" / "out.jsonl.run" / name
    whole = path.read_bytes()
    for at in range(len(whole)):
        for value in (whole[at] ^ 1, whole[at] ^ 128):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            assert attempt(done) in (0, 65)


@pytest.mark.parametrize("name", ["settings.json", "manifest", "."])
def test_rows_without_what_stands_beside_them(name: str, done: Path, undisturbed: bytes) -> None:
    path = done / "out" / "out.jsonl.run" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert attempt(done, check="it has rows already, and no folder .run beside it that says what made them") == 65
    assert output(done) == undisturbed


# Others who write the same file.


class Meddling(Told):
    """While it answers about `ccc.png`, somebody does something."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle = meddle

    def say(self, question: str, name: str) -> str:
        if name == "ccc.png":
            self._meddle()
        return super().say(question, name)


def appended(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"mine\n")


def moved(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def replaced(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").rename(path)


@for_each("meddle, retry", itertools.product([appended, moved, replaced, Path.unlink], [False, True]))
def test_somebody_else_writes_to_the_output(
    meddle: Callable[[Path], object], retry: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (erring if retry else fresh)(tmp_path)
    path = tmp_path / "out" / "out.jsonl"
    monkeypatch.setattr(module, "open_engine", lambda *_: Meddling(lambda: meddle(path)))
    assert attempt(tmp_path, check="somebody else has written to it, or taken it away", **options) == 73
    assert not list(tmp_path.rglob("*.new"))


def test_another_process_has_the_output(done: Path, undisturbed: bytes) -> None:
    """Once that process is gone, it is free."""
    set_output(done, undisturbed[:-9])
    code = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    lock = str(done / "out" / "out.jsonl.run" / "lock")
    with subprocess.Popen([sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        assert attempt(done, check="another run is writing it") == 73
        assert output(done) == undisturbed[:-9]
        other.kill()
    assert attempt(done) == 0
    assert output(done) == undisturbed


def test_two_runs_one_of_which_goes_by_a_linked_folder(done: Path) -> None:
    (done / "link").symlink_to("out")
    first = Journal(done / "out" / "out.jsonl")
    first.lock()
    with pytest.raises(OutputTaken, match=r"out\.jsonl: another run is writing it"):
        Journal(done / "link" / "out.jsonl").lock()
    first.close()


# Outputs that cannot be.


@for_each(
    ("path", "reason"),
    [
        ("missing/out.jsonl", "no such file or directory"),
        ("list.txt/out.jsonl", "not a directory"),
        ("out", "a folder"),
        ("fifo", "not a regular file"),
        ("null", "not a regular file"),
        ("n" * 300, "file name too long"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_model_is_loaded(
    path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "null").symlink_to("/dev/null")
    monkeypatch.setattr(module, "open_engine", no_model)
    before = sorted(tmp_path.rglob("*"))
    assert attempt(tmp_path, output=tmp_path / path, check=reason) == 73
    assert sorted(tmp_path.rglob("*")) == before


BESIDE = ["out.jsonl.run", "out.jsonl.run/lock", "out.jsonl.run/manifest", "out.jsonl.run/settings.json"]


@for_each(
    "name, what", itertools.product(BESIDE, ["link", "dangling link", "fifo", "other kind"]), own=(done, undisturbed)
)
def test_what_stands_beside_the_output_is_a_plant(
    what: str, name: str, done: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused by name, before the model is loaded; nothing waits for it, follows it or is lost."""
    monkeypatch.setattr(module, "open_engine", no_model)
    path, real = done / "out" / name, done / "real"
    path.rename(real)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "other kind":
        path.touch() if real.is_dir() else path.mkdir()
    else:
        path.symlink_to(real if what == "link" else done / "nowhere")
    before = {path: path.lstat().st_mtime_ns for path in done.rglob("*")}
    reason = "is a link to " if "link" in what else "not a folder" if real.is_dir() else "(not a regular file|is a dir)"
    with pytest.raises(OutputTaken, match=f"{re.escape(str(path))}: {reason}"):
        run(Job(Source([str(done / "list.txt")], ("what?",), root="/"), Settings(), "", done / "out" / "out.jsonl"))
    assert {path: path.lstat().st_mtime_ns for path in done.rglob("*")} == before
    assert output(done) == undisturbed


def test_a_planted_link_where_what_is_torn_is_kept(done: Path, undisturbed: bytes) -> None:
    (done / "secret").write_text("mine")
    folder = done / "out" / "out.jsonl.run"
    (folder / "torn-1").symlink_to(done / "secret")
    (folder / "torn-2").symlink_to(done / "nowhere")
    os.mkfifo(folder / "torn-3")
    set_output(done, undisturbed[:-9])
    assert attempt(done) == 0
    assert output(done) == undisturbed
    last = undisturbed.splitlines(keepends=True)[-1][:-9]
    assert (folder / "torn-4").read_bytes() == last
    assert ((done / "secret").read_text(), (done / "nowhere").exists()) == ("mine", False)


@pytest.mark.parametrize("name", ["out.jsonl", *BESIDE[:2]])
def test_what_another_user_has_put_where_everybody_may_write(
    name: str, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an output that will be read by others, or whose manifest somebody else has written."""
    path = done / "out" / name
    path.parent.chmod(0o1777)
    give_away(path, monkeypatch)
    assert attempt(done, check=f"{path}: belongs to another user") == 73
    path.parent.chmod(0o755)
    assert attempt(done) == 0  # somebody shares a folder with those who may write there


def test_what_a_killed_run_left_is_cleared_by_the_next(done: Path) -> None:
    left = [done / "out" / ".out.jsonl.0123abcd.new", done / "out" / "out.jsonl.run" / ".manifest.0123abcd.new"]
    others = [done / "out" / ".other.jsonl.0123abcd.new", done / "out" / ".out.jsonl.new"]
    for path in (*left, *others):
        path.write_text("half")
    assert attempt(done) == 0
    assert [path.exists() for path in (*left, *others)] == [False, False, True, True]


# Lines that no memory holds.


def sparse(path: Path, before: bytes = b"") -> None:
    """A file of many GB, none of them on the disk, and without an end of a line."""
    path.write_bytes(before)
    os.truncate(path, 1 << 36)


def test_a_row_without_an_end(done: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROW_BYTES", 100_000)
    first = undisturbed.splitlines(keepends=True)[0]
    sparse(done / "out" / "out.jsonl", first)
    for repair in (False, True):
        assert attempt(done, check="out.jsonl, line 2: longer than 100,000 bytes", repair=repair) == 65
    assert not list(done.rglob("torn-*"))


def test_a_manifest_without_an_end(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROW_BYTES", 100_000)
    os.truncate(done / "out" / "out.jsonl", 0)
    (done / "out" / "out.jsonl.run" / "manifest").write_bytes(b"[" * 1_000_000)
    assert attempt(done, check="manifest: damaged") == 65


@for_each("text", [b"x", b"[" * 100_000, b'{"a":' * 50_000, b"{" + b'"a": 1,' * 100_000, b"1" * 5000], own=(done,))
def test_settings_that_are_too_much(text: bytes, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SETTINGS_BYTES", 600_000)
    (done / "out" / "out.jsonl.run" / "settings.json").write_bytes(text)
    assert attempt(done, check="settings.json: damaged") == 65


def test_settings_without_an_end(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SETTINGS_BYTES", 100_000)
    sparse(done / "out" / "out.jsonl.run" / "settings.json", b"{")
    assert attempt(done, check="settings.json: damaged") == 65


def test_settings_of_a_stranger_are_told_in_one_line(done: Path) -> None:
    """However many they are, and whatever is in them."""
    path = done / "out" / "out.jsonl.run" / "settings.json"
    path.write_text(json.dumps({f"\x1b[2J\n{number}" * 100: "\x1b[2J\n" * 100 for number in range(5000)}))
    with pytest.raises(BadData) as error:
        run(Job(Source([str(done / "list.txt")], ("what?",), root="/"), Settings(), "", done / "out" / "out.jsonl"))
    assert error.value.reason.isprintable() and len(error.value.reason) < 10_000
    assert re.search(r"; and 4,\d\d\d more$", error.value.reason)


def test_what_rows_say_is_summed_up_in_one_line(
    done: Path, undisturbed: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in undisturbed.splitlines()]
    for number, row in enumerate(lines):
        row["flags"] = [f"\x1b[2J\n{number}.{n}" * 50 for n in range(50)]
    lines[0] |= {"status": "error", "error": {"type": "\x1b]0;x\x07\nOops" * 100}, "answer_tokens": 10**400}
    set_output(done, b"".join(map(to_line, lines)))
    job = Job(Source([str(done / "list.txt")], ("what?",), root="/"), Settings(), "", done / "out" / "out.jsonl")
    assert run(job) == 1
    *_, line = capfd.readouterr().err.splitlines()
    assert line.isprintable() and len(line) < 5000


def no_model(*_: object) -> Told:
    raise AssertionError("loaded")


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[bool]:
    """A small disk of its own in memory, or one that cannot be written; whether that could be had."""
    folder.mkdir(exist_ok=True)
    found = subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode == 0
    try:
        yield found
    finally:
        if found:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("there", [False, True], ids=["new", "old"])
def test_read_only_output(there: bool, done: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = done / "out"
    if not there:
        shutil.rmtree(folder)
        folder.mkdir()
    monkeypatch.setattr(module, "open_engine", no_model)
    with mounted(folder, "--bind", "-o", "ro", str(folder)) as found:
        if not found:  # nobody who may not mount may write where permissions are against it
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o500)
        assert attempt(done, check="read-only file system" if found else "permission denied") == 73
    if not found:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700)
    assert output(done) == (undisturbed if there else b"")


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one, with room for some thirty of a hundred rows: 74, whole rows, and going on once there is room."""
    names = [f"{'long' * 40}{number}.png" for number in range(100)]
    folder, whole = begin(tmp_path / "it", names), begin(tmp_path / "whole", names)
    assert attempt(whole) == 0
    with mounted(folder / "out", "-t", "tmpfs", "-o", "size=64k", "none") as small:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not small:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        try:
            assert attempt(folder, check="no space left on device" if small else "file too large") == 74
            rows = output(folder)
            assert rows and rows.endswith(b"\n") and output(whole).startswith(rows)
            assert attempt(folder) == 74
            assert output(folder) == rows
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if small:
            subprocess.run(["mount", "-o", "remount,size=1m", str(folder / "out")], check=True)
        assert attempt(folder) == 0
        assert output(folder) == output(whole)


def test_a_full_disk_while_rows_are_replaced_leaves_it_as_full_as_it_was(tmp_path: Path) -> None:
    names = [f"{'long' * 40}{number}.png" for number in range(40)]
    folder = begin(tmp_path, names)
    with mounted(folder / "out", "-t", "tmpfs", "-o", "size=48k", "none") as small:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pictures, "missing", frozenset(names))
            assert attempt(folder) == 1
        before = output(folder)
        if not small:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        assert attempt(folder, retry=True) == 74
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert output(folder) == before
        assert not list(folder.rglob("*.new"))


def test_no_room_for_what_is_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many paths, for few stay in memory."""
    folder = begin(tmp_path)
    assert attempt(folder) == 0
    (folder / "list.txt").write_text("\n".join(f"{number:0200}.png" for number in range(25_000)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with mounted(tmp_path / "scratch", "-t", "tmpfs", "-o", "size=40k", "none") as small:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not small:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        code = attempt(folder, check="scratch")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code == 74
        assert not list((tmp_path / "scratch").iterdir())


def test_replacing_rows_keeps_who_may_read(tmp_path: Path, undisturbed: bytes) -> None:
    options = erring(tmp_path)
    path = tmp_path / "out" / "out.jsonl"
    path.chmod(0o600)
    assert attempt(tmp_path, **options) == 0
    assert output(tmp_path) == undisturbed
    assert path.stat().st_mode & 0o777 == 0o600


def test_retrying_a_row_that_fails_again_leaves_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path)
    monkeypatch.setattr(Pictures, "missing", frozenset({"bb.png"}))
    assert attempt(tmp_path) == 1
    before = output(tmp_path)
    assert attempt(tmp_path, retry=True) == 1
    assert output(tmp_path) == before


def test_settings_are_compared_as_they_were_given(tmp_path: Path) -> None:
    """Also where they are not UTF-8."""
    begin(tmp_path)
    odd = "what is \udcff\udc80 ü\u2028?"
    for _ in range(2):
        assert attempt(tmp_path, questions=(odd,)) == 0
    assert attempt(tmp_path, questions=(odd + "?",), check="questions was") == 65
