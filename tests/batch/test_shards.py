"""Shards of a run: in any order, twice at once, killed at any moment; joined, they are the file of a single run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import psutil
import pytest
from helpers.command import Run
from helpers.faults import KILLED, NAMES, Died, Faults, Pictures, Told, at_once, begin, output, without_a_model
from helpers.tables import for_each

from llava_cli import limits
from llava_cli.batch import run as module
from llava_cli.batch.ranges import folder_run, row_range
from llava_cli.batch.ranges.folder_run import FolderRun
from llava_cli.batch.ranges.manifest_index import ManifestIndex
from llava_cli.batch.ranges.merge import merge
from llava_cli.batch.ranges.row_range import ALL, Grid, Shard, parse_shard
from llava_cli.batch.ranges.shard import run_shard
from llava_cli.batch.run import Job, run
from llava_cli.batch.sources.source import Source
from llava_cli.errors import LlavaError, OutputLocked, UsageError
from llava_cli.files import quoted
from llava_cli.settings import Settings


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model, no pictures, two rows in a range, and a sync every second row, whatever the time."""
    without_a_model(monkeypatch)
    monkeypatch.setattr(row_range, "LEAST_RANGES", 2)
    monkeypatch.setattr(folder_run, "_WAIT_SECONDS", 0.02)


def job_in(folder: Path, **options: Any) -> Job:
    source = Source([str(folder / "list.txt")], ("what?",), root="/")
    return Job(source, Settings(), "llava batch …", folder / "out" / "out.jsonl", quiet=True, **options)


def attempt(
    folder: Path, shard: Shard | None, faults: Faults | None = None, check: str = "", **options: Any
) -> int | str:
    """`llava batch … --shard I/N`, or without it: the exit code, or KILLED; what it says as it fails has `check`."""
    with (faults or Faults())(folder / "out"):
        try:
            job = job_in(folder, **options)
            return run_shard(job, shard) if shard else run(job)
        except LlavaError as error:
            assert check in f"{error} {error.hint}"
            return error.exit_code
        except Died:
            return KILLED


def beside(folder: Path) -> list[str]:
    """The files, but for what was cut out of the output."""
    names = (path.name for path in (folder / "out" / "out.jsonl.run").iterdir())
    return sorted(name for name in names if not name.startswith("torn-"))


def join(folder: Path) -> int:
    return merge(folder / "out" / "out.jsonl", True)


@pytest.fixture
def wanted(tmp_path: Path) -> bytes:
    """What a single run writes."""
    folder = begin(tmp_path / "single")
    assert attempt(folder, None) == 0
    return output(folder)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return begin(tmp_path / "here")


def assert_joined(folder: Path, wanted: bytes) -> None:
    """The file, and what is beside it, are those of a single run."""
    assert output(folder) == wanted
    assert beside(folder) == ["lock", "manifest", "settings.json"]
    assert attempt(folder, None) == 0
    assert output(folder) == wanted


@for_each("total", [0, 1, 2, 5, 63, 64, 129, 100_000, 10**8])
def test_ranges_cover_all_rows_once(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_range, "LEAST_RANGES", 64)
    grid = Grid(total)
    assert grid.size == max(1, min(1000, total // 64))
    ends = [0, *(grid.range(number).end for number in range(min(grid.count, 200)))]
    assert all(grid.range(number).begin == ends[number] for number in range(len(ends) - 1))
    assert grid.count == 0 or grid.range(grid.count - 1).end == total
    if grid.count < 1000:
        for count in (1, 3, 8, 200):
            shards = [rows for number in range(1, count + 1) for rows in grid.of_shard(Shard(number, count))]
            assert shards == list(grid.all())


@for_each("text", ["", "3", "0/8", "9/8", "1/0", "a/b", "1/2/3", "-1/8", "1 / 8"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(UsageError, match="is no part of all"):
        parse_shard(text)
    assert parse_shard("3/8") == Shard(3, 8)


@for_each("order", list(permutations([1, 2, 3])))
def test_in_any_order(order: tuple[int, ...], tmp_path: Path, wanted: bytes) -> None:
    folder = begin(tmp_path / "".join(map(str, order)))
    for number in order:
        assert attempt(folder, Shard(number, 3)) == 0
    assert_joined(folder, wanted)


def test_another_number_of_shards_and_more_than_ranges(here: Path, wanted: bytes) -> None:
    assert attempt(here, Shard(2, 3)) == 0
    for number in range(1, 51):
        assert attempt(here, Shard(number, 50)) == 0
    assert_joined(here, wanted)


def test_a_single_run_that_was_stopped_goes_on_in_shards(here: Path, wanted: bytes) -> None:
    assert attempt(here, None) == 0
    lines = wanted.splitlines(keepends=True)
    (here / "out" / "out.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:10])
    assert attempt(here, Shard(2, 2)) == 0
    assert attempt(here, Shard(1, 2)) == 0
    assert output(here) == wanted
    assert_joined(here, wanted)


def test_what_is_missing_is_named(here: Path) -> None:
    assert attempt(here, Shard(2, 3)) == 0
    before = beside(here)
    with pytest.raises(LlavaError) as error:
        join(here)
    assert "rows 1 to 2, 5 of 5 are missing: shard 1/3, 3/3" in str(error.value)
    assert error.value.exit_code == 66
    assert "--shard 1/3" in error.value.hint
    assert (beside(here), output(here)) == (before, b"")


def test_what_is_missing_of_a_run_without_shards(here: Path) -> None:
    """A cluster began it."""
    assert attempt(here, Shard(2, 3)) == 0
    (here / "out" / "out.jsonl.run" / "shard-2-of-3").unlink()
    with pytest.raises(LlavaError) as error:
        join(here)
    assert str(error.value).endswith("rows 1 to 2, 5 of 5 are missing")
    assert (error.value.exit_code, "the command that began the run" in error.value.hint) == (66, True)


def test_a_single_run_leaves_a_shared_one_alone(here: Path, wanted: bytes) -> None:
    assert attempt(here, Shard(1, 2)) == 0
    for options in ({}, {"extend": True}, {"retry": True}):
        assert attempt(here, None, check="llava batch --merge", **options) == 65
    for options in ({"extend": True}, {"retry": True}, {"repair": True}):
        assert attempt(here, Shard(2, 2), check="does not go with --shard", **options) == 2
    assert attempt(here, Shard(2, 2)) == 0
    assert_joined(here, wanted)


def test_other_settings_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempt(here, Shard(1, 2)) == 0
    monkeypatch.setattr(module, "identify", lambda settings: {"model": "another"})
    assert attempt(here, Shard(2, 2), check='model was "told", is "another"') == 65


def test_only_the_first_lists_the_source(here: Path, wanted: bytes) -> None:
    assert attempt(here, Shard(1, 2)) == 0
    (here / "list.txt").write_text("\n".join([*NAMES, "new.png"]))
    assert attempt(here, Shard(2, 2)) == 0
    assert output(here) == wanted


def test_an_empty_source(tmp_path: Path) -> None:
    folder = begin(tmp_path / "empty", [])
    assert attempt(folder, Shard(1, 2), check="list.txt") == 66
    (folder / "list.txt").write_text("a.png")
    assert attempt(folder, Shard(1, 2)) == 0
    assert attempt(folder, Shard(2, 2)) == 0
    assert output(folder).count(b"\n") == 1


def test_rows_with_errors(here: Path, wanted: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their shard says so with its exit code, and so does the merge; then they are asked again as those of any run."""
    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "missing", frozenset({"bb.png"}))
        assert attempt(here, Shard(1, 2)) == 1
    assert attempt(here, Shard(2, 2)) == 1
    assert attempt(here, Shard(1, 2)) == 1  # once more, with nothing to do
    assert json.loads(output(here).splitlines()[1])["status"] == "error"
    assert attempt(here, None, retry=True) == 0
    assert output(here) == wanted


@for_each("sight", [1, 2, 4])
def test_the_sample_is_that_of_a_single_run(sight: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Told, "say", lambda self, question, name: name)
    asked = list[tuple[str, bool | None]]()
    conversation_of = module.answer_tasks.__globals__["conversation_of"]

    def noted(task: Any, picture: Any, settings: Any) -> Any:
        asked.append((task.image, task.sight))
        return conversation_of(task, picture, settings)

    monkeypatch.setitem(module.answer_tasks.__globals__, "conversation_of", noted)
    monkeypatch.setattr(Told, "check_options", lambda self, sampling: None)
    attempt(begin(tmp_path / f"single {sight}"), None, sight=sight)
    single = sorted(asked, key=str)
    asked.clear()
    folder = begin(tmp_path / f"shards {sight}")
    for number in (3, 1, 2):
        attempt(folder, Shard(number, 3), sight=sight)
    assert sorted(asked, key=str) == single


# Killed and disturbed at any moment.


@pytest.fixture(params=[(), (1,), (1, 3)], ids=["first", "second", "last"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Path]:
    """A folder in which some of three shards have ended, set again for each try."""
    template = begin(tmp_path / "template")
    for number in request.param:
        assert attempt(template, Shard(number, 3)) == 0

    def set_again() -> Path:
        shutil.rmtree(tmp_path / "now", ignore_errors=True)
        return Path(shutil.copytree(template, tmp_path / "now"))

    return set_again


def ends_well(folder: Path, wanted: bytes) -> None:
    for number in (2, 1, 3):
        assert attempt(folder, Shard(number, 3)) == 0
    assert_joined(folder, wanted)
    assert not list(folder.rglob("*.new"))


@for_each("power", [False, True])
def test_killed_at_any_moment(power: bool, stage: Callable[[], Path], wanted: bytes) -> None:
    assert attempt(stage(), Shard(2, 3), counted := Faults()) == 0  # noqa: RUF018
    assert len(counted.moments) > 20
    for at in range(len(counted.moments)):
        folder = stage()
        assert attempt(folder, Shard(2, 3), Faults(at, power=power)) == KILLED
        assert wanted.startswith(output(folder)[: output(folder).rfind(b"\n") + 1])
        ends_well(folder, wanted)


@for_each("number", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_disk_at_any_moment(number: int, stage: Callable[[], Path], wanted: bytes) -> None:
    attempt(stage(), Shard(2, 3), counted := Faults())
    for at in range(len(counted.moments)):
        folder = stage()
        assert attempt(folder, Shard(2, 3), Faults(at, number)) in (73, 74)
        ends_well(folder, wanted)


@for_each("seed", range(30))
def test_any_sequence_of_kills_and_errors(seed: int, tmp_path: Path) -> None:
    """Thirty rows, shards in any order and any numbers of them, each disturbed at some moment."""
    random = Random(seed)
    names = [f"{random.choice('aéß')}{n}.png" for n in range(30)]
    folder, whole = begin(tmp_path / "it", names), begin(tmp_path / "whole", names)
    attempt(whole, None)
    while not (folder / "out" / "out.jsonl").exists() or output(folder) != output(whole):
        count = random.choice((2, 3, 8))
        faults = Faults(
            at=random.randrange(random.choice((60, 250))),
            error=random.choice((0, 0, errno.EIO, errno.ENOSPC)),
            lasting=random.random() < 0.3,
            power=random.random() < 0.3,
            most=random.choice((None, None, 50)),
        )
        assert attempt(folder, Shard(random.randint(1, count), count), faults) in (0, KILLED, 73, 74)
    attempt(folder, ALL)
    assert_joined(folder, output(whole))


def test_rows_of_a_killed_shard_are_not_asked_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(here, ALL, counted := Faults())
    first_row = counted.moments.index("wrote", counted.moments.index("fsynced", 20))
    shutil.rmtree(here)
    begin(here)
    asked = list[str]()
    monkeypatch.setattr(Told, "say", lambda self, question, name: asked.append(name) or name)
    assert attempt(here, ALL, Faults(first_row)) == KILLED
    assert attempt(here, ALL) == 0
    assert len(asked) <= len(NAMES) + 1  # the row that was being written


def test_twice_at_once(here: Path, wanted: bytes) -> None:
    """The first attempt at a range wins, and the other one's rows are left out."""
    shards = [partial(run_shard, job_in(here), Shard(number, 2)) for number in (1, 2, 1, 2)]
    assert at_once(*shards) == [0, 0, 0, 0]
    assert attempt(here, ALL) == 0
    assert_joined(here, wanted)


def test_a_straggler_leaves_nothing(here: Path, wanted: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is answered and joined by others while it answers."""

    def say(self: Told, question: str, name: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(Told, "say", real)
            for number in (1, 2):
                assert attempt(here, Shard(number, 2)) == 0
        monkeypatch.setattr(Told, "say", real)
        return real(self, question, name)

    real = Told.say
    monkeypatch.setattr(Told, "say", say)
    assert attempt(here, Shard(1, 2)) == 0
    assert_joined(here, wanted)


def test_a_shard_waits_for_the_one_that_lists(here: Path, wanted: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[Thread]()
    listed = Source.tasks
    second = list[int | str]()

    def tasks(self: Source) -> Iterator[Any]:
        if not started:
            started.append(Thread(target=lambda: second.append(run_shard(job_in(here), Shard(2, 2)))))
            started[0].start()
        return listed(self)

    monkeypatch.setattr(Source, "tasks", tasks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.StopSignal, "__enter__", lambda self: None)
        patch.setattr(module.StopSignal, "__exit__", lambda self, *error: None)
        assert run_shard(job_in(here), Shard(1, 2)) == 0
        started[0].join()
    assert second == [0]
    assert_joined(here, wanted)


def test_an_attempt_that_ends_after_the_merge_is_no_range_of_the_next_run(here: Path, wanted: bytes) -> None:
    run_of_shards = FolderRun(here / "out" / "out.jsonl")
    attempt(here, Shard(1, 2))
    run_of_shards.grid = Grid(len(NAMES))
    straggler = run_of_shards.attempt(run_of_shards.grid.range(0))
    late = Path(straggler._path)
    kept = late.read_bytes()
    assert attempt(here, Shard(2, 2)) == 0
    assert_joined(here, wanted)
    late.parent.mkdir()
    late.write_bytes(kept)  # as if it had been begun a moment later than the merge has looked for attempts
    assert straggler.commit() is False
    assert beside(here) == ["lock", "manifest", "settings.json"]


def test_what_a_straggler_has_left_is_no_row_of_the_next_shards(here: Path) -> None:
    """Other rows have the numbers of its range once the source has grown."""
    assert attempt(here, None) == 0
    beside_it = here / "out" / "out.jsonl.run"
    (beside_it / "part-00002.jsonl").write_bytes(output(here).splitlines(keepends=True)[-1])
    (beside_it / "attempts").mkdir()
    (beside_it / "attempts" / "attempt-00003-00000000.jsonl").write_bytes(b"{")
    lines = output(here).splitlines(keepends=True)
    (here / "out" / "out.jsonl").write_bytes(b"".join(lines[:1]))
    assert attempt(here, Shard(1, 2)) == 0
    assert "part-00002.jsonl" not in beside(here)
    assert attempt(here, Shard(2, 2)) == 0
    assert_joined(here, b"".join(lines))


def test_a_damaged_row_of_the_output_is_left_to_repair(here: Path, wanted: bytes) -> None:
    lines = wanted.splitlines(keepends=True)
    assert attempt(here, None) == 0
    (here / "out" / "out.jsonl").write_bytes(lines[0] + b"damaged\n" + lines[2])
    assert attempt(here, Shard(1, 2)) == 0
    assert attempt(here, Shard(2, 2), check="line 2: damaged, or not about what it should be; all other rows are") == 65
    assert output(here) == lines[0] + b"damaged\n" + b"".join(lines[2:])
    assert attempt(here, Shard(1, 2), check="--repair") == 65
    assert attempt(here, None, repair=True) == 0
    assert_joined(here, wanted)


def test_more_rows_than_there_should_be_are_left_alone(here: Path, wanted: bytes) -> None:
    assert attempt(here, None) == 0
    (here / "out" / "out.jsonl").write_bytes(wanted * 2)
    assert attempt(here, Shard(1, 2), check="more rows than tasks") == 65
    assert output(here) == wanted * 2


def test_waiting_for_who_lists_opens_one_file_at_a_time(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_cli.batch.journal import Journal

    lister, waiting = Journal(here / "out" / "out.jsonl"), list[int]()
    lister.lock()

    def wait(seconds: float) -> None:
        waiting.append(psutil.Process().num_fds())
        if len(waiting) == 5:
            lister.close()

    monkeypatch.setattr(folder_run.time, "sleep", wait)
    assert attempt(here, ALL) == 0
    assert len(set(waiting)) == 1


def test_shards_wait_while_the_first_one_counts_the_rows_of_a_single_run(
    here: Path, wanted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attempt(here, None) == 0
    (here / "out" / "out.jsonl").write_bytes(wanted.splitlines(keepends=True)[0])
    counting = FolderRun._answered_now

    def count(self: FolderRun) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(FolderRun, "_answered_now", counting)
            assert attempt(here, Shard(2, 2)) == 0
        monkeypatch.setattr(FolderRun, "_answered_now", counting)
        return counting(self)

    monkeypatch.setattr(FolderRun, "_answered_now", count)
    assert attempt(here, Shard(1, 2)) == 0
    assert_joined(here, wanted)


def test_an_attempt_that_is_committed_as_the_next_one_reads_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(here, Shard(1, 2))
    shared = FolderRun(here / "out" / "out.jsonl")
    shared.grid = Grid(len(NAMES))
    rows = shared.grid.range(2)
    first = shared.attempt(rows)
    first.append(json.loads(output(begin_and_end(here.parent / "other")).splitlines()[4]))
    tasks = FolderRun.tasks

    def committed_now(self: FolderRun, rows: Any) -> Iterator[Any]:
        first.commit()
        return tasks(self, rows)

    monkeypatch.setattr(FolderRun, "tasks", committed_now)
    second = shared.attempt(rows)
    assert second.done == 0
    second.close()


def begin_and_end(folder: Path) -> Path:
    attempt(begin(folder), None)
    return folder


def begins_meanwhile(other: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Has another shard begin the run just after the next one has seen that there is none."""
    precision = FolderRun.saved_precision

    def none_yet(self: FolderRun) -> str | None:
        found = precision(self)
        patch.setattr(FolderRun, "saved_precision", precision)
        other()
        return found

    patch.setattr(FolderRun, "saved_precision", none_yet)


def test_a_shard_that_waited_reads_what_must_be_listed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which names a source refuses is known only then."""
    listed = list[str]()
    monkeypatch.setattr(Source, "must_be_listed", True)
    real = Source.tasks

    def tasks(self: Source) -> Iterator[Any]:
        listed.append("once")
        return real(self)

    monkeypatch.setattr(Source, "tasks", tasks)
    begins_meanwhile(lambda: attempt(here, Shard(1, 2)), monkeypatch)
    assert attempt(here, Shard(2, 2)) == 0
    assert listed == ["once", "once"]


def test_another_machine_has_chosen_the_precision_meanwhile(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards begin at the same time where `auto` stands for different ones."""
    chosen = ["fp32", "bf16"]

    def settled(settings: Settings, saved: str | None, hint: Any) -> Settings:
        return replace(settings, load=replace(settings.load, precision=saved or chosen.pop()))

    monkeypatch.setattr(module, "with_one_precision", settled)
    monkeypatch.setattr(module, "identify", lambda settings: {"precision": settings.load.precision})
    begins_meanwhile(lambda: attempt(here, Shard(1, 2)), monkeypatch)
    assert attempt(here, Shard(2, 2)) == 0
    assert chosen == []


@for_each("shard", [None, ALL])
def test_a_shard_was_killed_as_it_listed(shard: Shard | None, tmp_path: Path, wanted: bytes) -> None:
    """A run of any kind begins anew."""
    folder = begin(tmp_path / str(shard))
    beside_it = folder / "out" / "out.jsonl.run"
    beside_it.mkdir()
    (beside_it / "shared").touch()
    assert attempt(folder, shard) == 0
    assert_joined(folder, wanted)


def test_another_kind_of_run_has_the_output(here: Path) -> None:
    from llava_cli.batch.journal import Journal

    journal = Journal(here / "out" / "out.jsonl")
    journal.lock()
    try:
        assert attempt(here, Shard(1, 2), check="another run is writing it") == 73
    finally:
        journal.close()


def test_a_shard_that_begins_as_the_last_one_joins(here: Path, wanted: bytes) -> None:
    """It has the output for a moment, and the last one waits for it."""
    from llava_cli.batch.journal import Journal

    attempt(here, Shard(1, 2))
    beginning, answering = Journal(here / "out" / "out.jsonl"), FolderRun.merge

    def merge_late(self: FolderRun, on_row: Any) -> bool:
        beginning.lock()
        monkeypatch.setattr(folder_run.time, "sleep", lambda seconds: beginning.close())
        return answering(self, on_row)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(FolderRun, "merge", merge_late)
        assert attempt(here, Shard(2, 2)) == 0
    assert_joined(here, wanted)


def test_the_folder_of_attempts_goes_as_one_is_begun(here: Path, wanted: bytes) -> None:
    attempt(here, Shard(1, 2))
    made = folder_run.files.make_folder

    def make_folder(path: Path, *arguments: Any, **options: Any) -> None:
        made(path, *arguments, **options)
        if path.name == "attempts":
            path.rmdir()
            patch.setattr(folder_run.files, "make_folder", made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_run.files, "make_folder", make_folder)
        assert attempt(here, Shard(2, 2)) == 0
    assert_joined(here, wanted)


def test_joined_by_another_process(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last shard leaves the merge to who is at it."""

    def merging(self: FolderRun, on_row: Any) -> bool:
        raise OutputLocked("out.jsonl", "another run is writing it")

    monkeypatch.setattr(FolderRun, "merge", merging)
    assert attempt(here, ALL) == 0
    assert "part-00000.jsonl" in beside(here)


# Files that come from elsewhere, or are damaged.


def test_machines_that_share_no_folder(tmp_path: Path, wanted: bytes) -> None:
    """Each has a run of its own, and the files are brought together."""
    folders = [begin(tmp_path / str(number)) for number in (1, 2, 3)]
    for number, folder in enumerate(folders, 1):
        assert attempt(folder, Shard(number, 3)) == 0
    for folder in folders[1:]:
        for path in (folder / "out" / "out.jsonl.run").glob("part-*"):
            shutil.copy(path, folders[0] / "out" / "out.jsonl.run")
    assert join(folders[0]) == 0
    assert_joined(folders[0], wanted)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-9],
    "one row": lambda data: data.splitlines(keepends=True)[0],
    "empty": lambda data: b"",
    "another's": lambda data: data.replace(b"ccc.png", b"xxx.png"),
    "more": lambda data: data * 2,
    "zeros": lambda data: bytes(len(data)),
}


@for_each("kind", DAMAGE)
def test_a_damaged_file_is_named(kind: str, tmp_path: Path, wanted: bytes) -> None:
    folder = begin(tmp_path / kind)
    for number in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FolderRun, "merge", lambda self, on_row: True)
            attempt(folder, Shard(number, 3))
    path = folder / "out" / "out.jsonl.run" / "part-00001.jsonl"
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    with pytest.raises(LlavaError) as error:
        join(folder)
    assert (error.value.exit_code, "part-00001.jsonl, line" in str(error.value)) == (65, True)
    assert f"rm {quoted(path)}" in error.value.hint
    path.unlink()
    assert attempt(folder, Shard(2, 3)) == 0
    assert_joined(folder, wanted)


@for_each("damage", [b"", b"\0" * 40, os.urandom(64)])
def test_an_index_is_made_anew(damage: bytes, tmp_path: Path, wanted: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(tmp_path / str(len(damage)))
    assert attempt(folder, Shard(1, 2)) == 0
    (folder / "out" / "out.jsonl.run" / ManifestIndex.NAME).write_bytes(damage)
    assert attempt(folder, Shard(2, 2)) == 0
    assert_joined(folder, wanted)


def test_an_index_that_is_too_large_to_be_one(here: Path, wanted: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MANIFEST_INDEX_BYTES", 20)
    for number in (1, 2):
        assert attempt(here, Shard(number, 2)) == 0
    assert_joined(here, wanted)


def test_a_file_system_without_links(here: Path, wanted: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(old: Any, new: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for number in (1, 2):
        assert attempt(here, Shard(number, 2)) == 0
    assert_joined(here, wanted)


# Through the command.


def test_the_command(run: Run, drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name in "abc":
        (drawing.parent / "pictures").mkdir(exist_ok=True)
        shutil.copy(drawing, drawing.parent / "pictures" / f"{name}.png")
    out = tmp_path / "out.jsonl"
    folder = drawing.parent / "pictures"
    single = tmp_path / "single.jsonl"
    assert run("batch", folder, "what is this?", "-q", "-o", single).exit_code == 0
    first = run("batch", folder, "what is this?", "-o", out, "--shard", "1/2")
    assert first.exit_code == 0
    assert "shard 1/2:" in first.stderr and "rows of other shards are missing" in first.stderr
    missing = run("batch", "--merge", out)
    assert missing.exit_code == 66
    assert "are missing: shard 2/2" in missing.stderr
    last = run("batch", folder, "what is this?", "-o", out, "--shard", "2/2")
    assert (last.exit_code, out.read_bytes()) == (0, single.read_bytes())
    again = run("batch", "--merge", out)
    assert again.exit_code == 0
    assert run("batch", folder, "what?", "--shard", "1/2").exit_code == 2
    assert run("batch", folder, "--merge", out).exit_code == 2
    for other in (["--shard", "1/2"], ["-m", "builtin"], ["--dry-run"], ["--retry-errors"]):
        refused = run("batch", "--merge", out, *other)
        assert (refused.exit_code, "does not go with --merge" in refused.stderr) == (2, True)
    for other in (["--shard", "1/2", "-o", out], ["--ray", "local", "-o", out], ["-o", "s3://bucket/out.jsonl"]):
        refused = run("batch", folder, "what?", "--dry-run", *other)
        assert (refused.exit_code, "--dry-run" in refused.stderr) == (2, True)
    assert run("batch", folder, "what?", "-o", out, "--shard", "3/2").exit_code == 2
