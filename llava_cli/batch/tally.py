"""Counts over the rows of a run, and a random sample of them for `--verify`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from llava_cli.batch.rows import escalation_error
from llava_cli.batch.tasks import Task
from llava_cli.untrusted_text import one_line

_MOST_COMMON = 12
"""As many as we write ourselves; a file of rows may have any others."""


@dataclass
class Tally:
    """Counts rows; keeps `sample_size` of the answered ones, each with the same probability (reservoir sampling)."""

    sample_size: int = 0
    rows: int = 0
    failed: int = 0
    tokens: int = 0
    judged: int = 0
    """Rows whose right answer is known."""
    right: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    escalated: int = 0
    """Rows that a larger model was asked about."""
    escalation_errors: Counter[str] = field(default_factory=Counter)
    sample: list[tuple[Task, str]] = field(default_factory=list)
    """Tasks with their answers."""

    def __post_init__(self) -> None:
        self._random, self._answered = Random(), 0

    def add(self, task: Task, row: dict[str, Any]) -> None:
        self.rows += 1
        self.flags.update(row.get("flags", ()))
        if "right" in row:
            self.judged += 1
            self.right += row["right"]
        if "escalated" in row:
            self.escalated += 1
            if error := escalation_error(row):
                self.escalation_errors[error["type"]] += 1
        if row["status"] == "error":
            self.failed += 1
            self.errors[row["error"]["type"]] += 1
            return
        self.tokens += row["answer_tokens"]
        self._answered += 1
        if self.sample_size:
            task = replace(task, asked=row.get("asked"))
        if len(self.sample) < self.sample_size:
            self.sample.append((task, row["answer"]))
        elif (index := self._random.randrange(self._answered)) < self.sample_size:
            self.sample[index] = task, row["answer"]

    def summary(self) -> str:
        """One line."""
        parts = [f"{self.rows} rows", f"{self.failed} failed"]
        if self.errors:
            parts[1] += f" ({_most_common(self.errors)})"
        if self.judged:
            parts.append(f"{self.right} of {self.judged} right, {self.right / self.judged:.2%}")
        if self.escalated:
            parts.append(f"{self.escalated} escalated")
        if self.escalation_errors:
            parts[-1] += f", of which failed: {_most_common(self.escalation_errors)}"
        if self.flags:
            parts.append(f"flagged: {_most_common(self.flags)}")
        return " · ".join(parts)


def _most_common(counter: Counter[str]) -> str:
    return ", ".join(f"{one_line(name)} {count}" for name, count in counter.most_common(_MOST_COMMON))
