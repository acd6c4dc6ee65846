"""What `llava export` is asked for, and what became of each row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from llava_cli import files
from llava_cli.batch.report.report_rows import RowsFile
from llava_cli.errors import OutputTaken, UsageError, os_reason, output_failure
from llava_cli.untrusted_text import one_line, printable


class Reason(NamedTuple):
    """Why a row was left out."""

    words: str
    is_failure: bool = True
    """Whether it should have been exported: then the exit code is 1."""
    hint: str = ""


FAILED = Reason("failed, without an answer", is_failure=False)
EMPTY = Reason("an empty answer", is_failure=False)
CHANGED = Reason("the picture has changed since it was asked about")
MISSING = Reason("the picture is not there")
ELSEWHERE = Reason("the picture is no file of its own on this disk", is_failure=False)
OUTSIDE = Reason("the picture is outside the folders that may be used", hint="--root FOLDER names another")


@dataclass
class Outcome:
    """Counts of what was done, and of rows that were left out, each with the first that was."""

    done: Counter[files.Change] = field(default_factory=Counter)
    left_out: Counter[Reason] = field(default_factory=Counter)
    examples: dict[Reason, str] = field(default_factory=dict)

    def leave_out(self, reason: Reason, example: str) -> None:
        self.left_out[reason] += 1
        self.examples.setdefault(reason, printable(example))

    @property
    def exit_code(self) -> int:
        return int(any(reason.is_failure for reason in self.left_out))

    def changes(self, what: str) -> str:
        """Such as `12 captions written, 3 unchanged` for `caption`."""
        written = self.done[files.Change.NEW] + self.done[files.Change.REPLACED]
        same = self.done[files.Change.NONE]
        named = f"{what}{'s' * ((written or same) != 1)}"
        if not written and same:
            return f"{same:,} {named} unchanged, nothing written"
        return f"{written:,} {named} written" + f", {same:,} unchanged" * bool(same)

    def lines(self) -> Iterator[str]:
        """Why rows were left out, the most frequent reason first."""
        for reason, count in self.left_out.most_common():
            hint = f"; {reason.hint}" if reason.hint else ""
            yield f"{count:,} left out: {reason.words} ({self.examples[reason]}{', …' * (count > 1)}){hint}"


@dataclass
class Job:
    """What the command line asks for; `rows` are checked before anything else is done."""

    rows: RowsFile
    to: str
    output: Path | None = None
    question: str | None = None
    """Only the answers to this one."""
    root: str | None = None
    embed: bool = False
    force: bool = False
    quiet: bool = False
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def option(self) -> str:
        return f"--to {self.to}"

    def chosen_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, row) of the rows about the question."""
        for number, row in self.rows:
            if self.question in (None, row["question"]):
                yield number, row

    def answered_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Those that have an answer; the others are counted."""
        for number, row in self.chosen_rows():
            if row["status"] == "error":
                self.outcome.leave_out(FAILED, row["image"])
            elif not row["answer"].strip():
                self.outcome.leave_out(EMPTY, row["image"])
            else:
                yield number, row

    def check_question(self, only_one: bool) -> None:
        """Raises `UsageError` if no row has the question, or with `only_one` if rows have several."""
        if self.question is None and not only_one:
            return
        first: str | None = None
        for _, row in self.rows:
            question = row["question"]
            first = question if first is None else first
            hint = f"--question {files.quoted(first) if one_line(first) == first else 'TEXT'}"
            if question == self.question:
                return
            if self.question is None and question != first:
                raise UsageError(self.option, "a picture has one text, and these rows have several questions", hint)
        if self.question is not None and first is not None:
            raise UsageError("--question", f"no row asks {one_line(self.question)!r}", hint)

    def need(self, module: str, extra: str) -> None:
        """Raises `UsageError` if an extra's module is not installed."""
        if find_spec(module) is None:
            option = "--embed" if self.embed else self.option
            raise UsageError(option, f"needs an extra ({module} is missing)", f"pip install 'llava-cli[{extra}]'")

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Translates the errors of writing the only output."""
        try:
            yield
        except FileExistsError as error:
            raise OutputTaken(printable(str(path)), os_reason(error), "--force replaces it") from None
        except OSError as error:
            raise output_failure(printable(str(path)), error) from None


def is_elsewhere(image: str) -> bool:
    """Whether a row names a URL, whose picture is not fetched."""
    return re.match("[A-Za-z][A-Za-z0-9+.-]+://", image) is not None and not image.lower().startswith("file:")
