"""How far a run is: what is told about it on stderr, and how fast the nodes of a cluster are."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command import Run
from helpers.screen import Screen
from helpers.tables import for_each

from llava_cli import render
from llava_cli.batch.cluster.progress import WINDOW_SECONDS, ClusterProgress, Counts

FIELDS = ("rows", "total", "failed", "pictures", "tokens", "pictures_per_second", "tokens_per_second", "seconds")
FAST = render.Progress(40, 1, 40, 80, 22.4, 180.0, 12.0, (render.NodeProgress("a", 4, 12.1),))


class Clock:
    """Time that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@for_each("options", [["--json-progress"], ["--json-progress", "-q"], ["--json-progress", "-q", "--shard", "1/1"]])
def test_programs_are_told_in_lines_of_json(options: list[str], run: Run, drawing: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "none.png"
    damaged.write_bytes(b"not a picture")
    result = run("batch", drawing, damaged, "what?", "-o", tmp_path / "out.jsonl", *options)
    assert result.exit_code == 1
    lines = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    assert lines and all(tuple(line) == FIELDS for line in lines)
    last = lines[-1]
    assert (last["rows"], last["total"], last["failed"], last["pictures"]) == (2, 2, 1, 2)
    assert last["seconds"] > 0 and last["tokens_per_second"] > 0
    if "-q" in options:
        assert len(lines) == len(result.stderr.splitlines())


def test_a_stream_of_rows_has_no_total(run: Run, drawing: Path) -> None:
    result = run("batch", drawing, "what?", "--json-progress", "-q")
    assert json.loads(result.stderr.splitlines()[-1])["total"] is None
    assert json.loads(result.stdout)["status"] == "ok"


def drawn(progress: render.Progress, columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines on a terminal so wide, and 12 lines high."""
    for name, value in {"COLUMNS": str(columns), "LINES": "12", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", screen := Screen())
    with render.counting(100, lambda: progress):
        pass
    last = screen.getvalue().rpartition("\x1b[1A\x1b[2K")[2] or screen.getvalue()
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", last).splitlines() if line.strip()]


@for_each("columns", [60, 120])
def test_a_terminal_has_a_line_for_each_node_of_a_cluster(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = render.NodeProgress("a", 4, 12.14), render.NodeProgress("gpu-node-017.rack-4.example" * 3, 1, 10.3)
    bar, words, first, second = drawn(replace(FAST, nodes=nodes), columns, monkeypatch)
    assert "40/100" in bar and len(bar) <= columns
    assert words == "1 failed · 22.4 pictures/s · 180.0 tokens/s"
    assert first.split() == ["a", "4", "workers", "12.1", "pictures/s"]
    assert "gpu-node-017" in second and "1 worker " in second and second.endswith("10.3 pictures/s")
    assert len(second) <= columns


def test_nodes_that_a_terminal_has_no_line_for_share_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = tuple(render.NodeProgress(f"node-{number:02}", 2, 1.5) for number in range(20))
    lines = drawn(replace(FAST, nodes=nodes), 80, monkeypatch)
    assert len(lines) == 10
    assert lines[-1].split() == ["13", "more", "nodes", "26", "workers", "19.5", "pictures/s"]


def test_one_machine_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = drawn(replace(FAST, nodes=None), 120, monkeypatch)
    assert "40/100 1 failed · 22.4 pictures/s · 180.0 tokens/s · left" in line


def test_a_node_is_as_fast_as_its_workers_have_been_lately() -> None:
    progress = ClusterProgress(100, 1000, clock := Clock())
    assert progress.read().rows == 100 and progress.read().nodes == ()
    clock.now = 50.0
    progress.joined("first", "a")
    progress.joined("second", "a")
    progress.joined("other", "b")
    for second in range(1, 41):
        clock.now = 50.0 + second
        for worker in ("first", "second"):
            progress.report(worker, Counts(rows=second, pictures=second, tokens=2 * second))
        slow = max(0, second - 10)  # the other one begins later
        progress.report("other", Counts(slow, 1, slow, slow))
        found = progress.read()
    assert found.nodes == (render.NodeProgress("a", 2, 2.0), render.NodeProgress("b", 1, 1.0))
    assert (found.rows, found.failed, found.pictures, found.tokens) == (210, 1, 110, 190)
    assert found.pictures_per_second == 3.0 and found.seconds == 90.0
    assert progress.speed() == "1.2 pictures/s · 2.1 tokens/s · 90.0 s"


def test_a_slow_node_s_rate_is_taken_over_more_time() -> None:
    progress = ClusterProgress(0, 1000, clock := Clock())
    progress.joined("w", "a")
    rates = []
    for second in range(1, 601):
        clock.now = float(second)
        progress.report("w", Counts(pictures=second // 20))
        rates.append(progress.read().pictures_per_second)
    assert all(0.044 < rate < 0.056 for rate in rates[400:]), "not the 0.033 or 0.067 of a short window"
    assert WINDOW_SECONDS < 200


def test_what_gone_workers_have_answered_counts_and_their_nodes_are_not_shown() -> None:
    progress = ClusterProgress(0, 30, clock := Clock())
    progress.joined("w", "a")
    progress.report("w", Counts(20, 2, 20, 40))
    progress.report("w", Counts(10, 1, 10, 20))  # an older report
    progress.left("w")
    progress.left("never there")
    clock.now = 10.0
    found = progress.read()
    assert (found.rows, found.failed, found.nodes) == (20, 2, ())
    progress.joined("v", "a")
    progress.report("v", Counts(20, 0, 20, 40))
    assert progress.read().rows == 30, "some of the first one's were answered again"


def test_all_rows_are_there_at_the_end() -> None:
    progress = ClusterProgress(0, 30, Clock())
    progress.end()
    assert progress.read().rows == 30
