"""What a process finds with a `Job`; run as a script, with one that another process has pickled."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_cli.batch.run import Job, fill_of, loader_of
from llava_cli.batch.tasks import Task
from llava_cli.errors import LlavaError

Found = list[tuple[str, str]]
"""Of each task, its picture's SHA-256, and its question as it is asked; or two parts of the error."""


def found_with(job: Job, lines: Sequence[bytes]) -> Found:
    """What a job finds for lines of its manifest."""
    loader, fill = loader_of(job, 1), fill_of(job)
    try:
        found = []
        for task, picture in loader.load_all(map(Task.from_line, lines)):
            if isinstance(picture, LlavaError):
                found.append((str(picture), picture.hint))
            else:
                digest = hashlib.sha256(repr(picture.image.size).encode() + picture.image.tobytes()).hexdigest()
                found.append((digest, fill(task, picture).wording))
        return found
    finally:
        loader.close()
        if job.templates:
            job.templates.close()


def main(sent: Path, answer: Path) -> None:
    job, lines = pickle.loads(sent.read_bytes())
    left = job.source.missing_here(), found_with(job, lines)
    answer.write_bytes(pickle.dumps((*left, sys.stdin.read())))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
