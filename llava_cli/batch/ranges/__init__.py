"""A run that several machines share: its rows in ranges, each of which somebody answers into a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_cli.batch.ranges.shared_run import SharedRun


def open_run(output: Path | str) -> SharedRun:
    """The run of an output: a path, or the URL of an object in a bucket."""
    if isinstance(output, str):
        from llava_cli.batch.ranges.bucket_run import BucketRun

        return BucketRun(output)
    from llava_cli.batch.ranges.folder_run import FolderRun

    return FolderRun(output)
