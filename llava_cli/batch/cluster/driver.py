"""`llava batch --ray`: hires workers, hands out ranges of the run, tells the progress, and joins the rows."""

from __future__ import annotations

from llava_cli.batch.run import Job


def run_on_cluster(job: Job, address: str, workers: int | None) -> int:
    """Runs the job on a cluster and returns the exit code; `workers` is None for as many as there is room for.

    Raises as `run`, as `SharedRun.begin`, and as `connect`.
    """
    raise NotImplementedError
