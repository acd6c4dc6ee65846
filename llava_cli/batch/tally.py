"""What is counted over the rows of a run, and which of them are asked again in the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

from llava_cli.batch.tasks import Task
from llava_cli.untrusted_text import one_line


@dataclass
class Tally:
    """Counts rows as they come; keeps `sample` of those that were answered, each with the same chance."""

    sample: int = 0
    rows: int = 0
    failed: int = 0
    tokens: int = 0
    judged: int = 0
    """Rows of which the right answer is known."""
    right: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    drawn: list[tuple[Task, str]] = field(default_factory=list)
    """Tasks with the answers that they got."""

    def __post_init__(self) -> None:
        self._random, self._seen = Random(), 0

    def see(self, task: Task, row: dict[str, Any]) -> None:
        self.rows += 1
        self.flags.update(row.get("flags", ()))
        if "right" in row:
            self.judged += 1
            self.right += row["right"]
        if row["status"] == "error":
            self.failed += 1
            self.errors[row["error"]["type"]] += 1
            return
        self.tokens += row["answer_tokens"]
        self._seen += 1
        if len(self.drawn) < self.sample:
            self.drawn.append((task, row["answer"]))
        elif (place := self._random.randrange(self._seen)) < self.sample:
            self.drawn[place] = task, row["answer"]

    def summary(self) -> str:
        """One line."""
        parts = [f"{self.rows} rows", f"{self.failed} failed"]
        if self.errors:
            parts[1] += f" ({_most(self.errors)})"
        if self.judged:
            parts.append(f"{self.right} of {self.judged} right, {self.right / self.judged:.2%}")
        if self.flags:
            parts.append(f"flagged: {_most(self.flags)}")
        return " · ".join(parts)


def _most(found: Counter[str]) -> str:
    """The most frequent, and all that we know of. A file of rows may have any others."""
    return ", ".join(f"{one_line(name)} {count}" for name, count in found.most_common(12))
