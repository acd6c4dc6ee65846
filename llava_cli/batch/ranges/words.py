"""Errors about the rows of a shared run: what is missing, and of which shards it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from llava_cli.batch.ranges.row_range import Grid, RowRange, Shard
from llava_cli.errors import BadData, InputMissing
from llava_cli.files import quoted
from llava_cli.images.remote_names import shown
from llava_cli.untrusted_text import printable

_MOST = 5
"""Spans or shards that a message lists."""


def missing_rows(
    name: str, grid: Grid, missing: Sequence[RowRange], answered: int, shard_counts: Sequence[int]
) -> InputMissing:
    """The error for ranges that nobody has answered, of a run whose shards were parts of `shard_counts`."""
    spans = _joined(missing)
    spans[0] = max(spans[0][0], answered), spans[0][1]
    rows = _listed([f"{begin + 1:,}" if end == begin + 1 else f"{begin + 1:,} to {end:,}" for begin, end in spans])
    shards = [Shard(number, count) for count in shard_counts[:1] for number in range(1, count + 1)]
    lacking = {rows.number for rows in missing}
    of = [str(shard) for shard in shards if any(rows.number in lacking for rows in grid.of_shard(shard))]
    reason = f"rows {rows} of {grid.total:,} are missing" + (f": shard {_listed(of)}" if of else "")
    hint = "the command that began the run goes on with them"
    if of:
        hint = f"llava batch SOURCE … -o {quoted(name)} --shard {of[0]} answers them"
    return InputMissing(name, reason, hint)


def damaged(path: Path, line: int) -> BadData:
    """The error for a range's file that has not the rows that it should have, from this line on, counted from 0."""
    hint = f"rm {quoted(path)}, and its shard answers them again"
    return BadData(f"{printable(str(path))}, line {line + 1}", "not the row that should be there", hint)


def damaged_rows(name: str, numbers: Sequence[int]) -> BadData:
    """The error for rows of an output, counted from 0, that are none, after all others are joined."""
    lines = _listed([f"{number + 1:,}" for number in numbers])
    reason = "damaged, or not about what it should be; all other rows are joined"
    hint = f"llava batch SOURCE … -o {quoted(name)} --repair, without --shard and --ray, answers it again"
    return BadData(f"{name}, line {lines}", reason, hint)


def damaged_object(url: str, line: int) -> BadData:
    """As `damaged`, of an object in a bucket."""
    return BadData(f"{shown(url)}, line {line + 1}", "not the row that should be there", "delete it, and run its shard")


def _joined(ranges: Sequence[RowRange]) -> list[tuple[int, int]]:
    """Neighbors as one span of rows."""
    ends = [a.end for a, b in pairwise(ranges) if a.end != b.begin]
    begins = [b.begin for a, b in pairwise(ranges) if a.end != b.begin]
    return list(zip([ranges[0].begin, *begins], [*ends, ranges[-1].end], strict=True))


def _listed(words: Sequence[str]) -> str:
    more = len(words) - _MOST
    return ", ".join(words[:_MOST]) + (f" and {more:,} more" if more > 0 else "")
