"""`llava batch --merge OUTPUT`: joins the files that shards or a cluster have left beside an output."""

from __future__ import annotations

from pathlib import Path

from llava_cli import render
from llava_cli.batch.ranges import open_run
from llava_cli.batch.ranges.shared_run import SharedRun
from llava_cli.batch.tally import Tally


def merge(output: Path | str, quiet: bool) -> int:
    """Joins the rows beside an output and returns the exit code. Raises as `SharedRun.merge`."""
    return merge_run(open_run(output), quiet)


def merge_run(run: SharedRun, quiet: bool) -> int:
    """As `merge`: 1 if some rows have failed."""
    tally = Tally()
    with render.spinner("joining the rows", quiet):
        is_joined = run.merge(tally.add)
    if not quiet:
        render.note(f"{run.name}: {tally.summary()}" + ("" if is_joined else " (joined before)"))
    return 1 if tally.failed or tally.escalation_errors else 0
