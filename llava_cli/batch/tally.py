"""What is counted over the rows of a run, and which of them are asked again in the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

from llava_cli.batch.tasks import Task


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
            parts[1] += f" ({', '.join(f'{name} {n}' for name, n in self.errors.most_common())})"
        if self.judged:
            parts.append(f"{self.right} of {self.judged} right, {self.right / self.judged:.2%}")
        if self.flags:
            parts.append("flagged: " + ", ".join(f"{name} {n}" for name, n in self.flags.most_common()))
        return " · ".join(parts)
