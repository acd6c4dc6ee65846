"""`llava batch --merge OUTPUT`: joins the files that shards or a cluster have left beside an output."""

from __future__ import annotations

from pathlib import Path


def merge(output: Path | str, quiet: bool) -> None:
    """Raises as `SharedRun.merge`, and `InputMissing` where no run is."""
    raise NotImplementedError
