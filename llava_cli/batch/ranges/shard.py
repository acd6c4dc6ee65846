"""`llava batch --shard I/N`: answers its part of a shared run, and joins the rows of all parts if it is the last."""

from __future__ import annotations

from llava_cli.batch.ranges.row_range import Shard
from llava_cli.batch.run import Job


def run_shard(job: Job, shard: Shard) -> int:
    """Runs the job's part and returns the exit code. Raises as `run`, and as `SharedRun.begin`."""
    raise NotImplementedError
