"""What is beside the output of a shared run, in a folder and in a bucket alike: names, and the rows of ranges."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from llava_cli.batch.journal import row_of
from llava_cli.batch.ranges.row_range import RowRange, Shard
from llava_cli.batch.tasks import Task
from llava_cli.errors import InputMissing

_PART = re.compile(r"part-([0-9]{5,15})\.jsonl")
_SHARD = re.compile(r"shard-([0-9]{1,7})-of-([0-9]{1,7})")


def attempts_start(rows: RowRange) -> str:
    """What the names of all attempts at a range begin with."""
    return f"attempt-{rows.number:05d}-"


def new_attempt(rows: RowRange) -> str:
    """A name that nobody else has."""
    return f"{attempts_start(rows)}{os.urandom(4).hex()}.jsonl"


def new_token() -> str:
    """As `new_attempt`, of an empty file that tells whether a process sees the same ones."""
    return f"token-{os.urandom(4).hex()}"


def shard_name(shard: Shard) -> str:
    return f"shard-{shard.number}-of-{shard.count}"


def committed(names: Iterable[str]) -> set[int]:
    """The numbers of the ranges whose files are among these names."""
    return {int(found[1]) for name in names if (found := _PART.fullmatch(name))}


def shard_counts(names: Iterable[str]) -> list[int]:
    """Of how many shards there are some, the most frequent first."""
    found = (_SHARD.fullmatch(name) for name in names)
    return [count for count, _ in Counter(int(match[2]) for match in found if match).most_common()]


def whole_row(task: Task, line: bytes) -> dict[str, Any] | None:
    """The task's row from a line; None if the line has no end, or as `row_of`."""
    return row_of(task, line) if line.endswith(b"\n") else None


def leading_rows(tasks: Iterable[Task], lines: Iterable[bytes]) -> list[bytes]:
    """The first lines, as long as they are the rows of the tasks."""
    leading = []
    for task, line in zip(tasks, lines, strict=False):
        if whole_row(task, line) is None:
            break
        leading.append(line)
    return leading


def no_run(name: str) -> InputMissing:
    """The error for an output that no run is beside."""
    return InputMissing(name, "there is no run beside it", "llava batch SOURCE … --shard 1/8 begins one")
