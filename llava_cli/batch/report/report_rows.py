"""A file of rows that is read twice: to check all of it before any work is done, and to do it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llava_cli.batch.lines import bounded_lines, is_too_long, parse_line
from llava_cli.batch.rows import parse_row
from llava_cli.bounded_json import TooMuch
from llava_cli.errors import BadData, InputMissing, os_reason
from llava_cli.regular_files import NotRegular, open_regular
from llava_cli.untrusted_text import printable

_HINT = "llava batch photos/ QUESTION -o out.jsonl"


@dataclass
class RowsFile:
    """The rows in a file: `check` it, then iterate over it."""

    path: Path
    total: int = 0
    is_torn: bool = False
    """Whether the last line has no end, and is left out."""

    def check(self) -> None:
        """Counts the rows. Raises `InputMissing`, or `BadData` with the number of a line that is not a row."""
        for number, line in self._lines():
            if parse_row(line) is None:
                self.is_torn = line.startswith(b"{") and not line.endswith(b"\n") and not is_too_long(line)
                if not self.is_torn:
                    raise BadData(f"{printable(str(self.path))}, line {number}", _problem(line), _HINT)
            else:
                self.total = number

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, row) of the rows that were checked; a running batch may have appended more since."""
        for number, line in islice(self._lines(), self.total):
            if (row := parse_row(line)) is None:
                raise BadData(f"{printable(str(self.path))}, line {number}", "has changed just now", "try again")
            yield number, row

    def beside(self, ending: str) -> Path:
        """The path with another ending. Raises `InputMissing` for `.` and `/`, which have no name."""
        if not self.path.name:
            raise InputMissing(printable(str(self.path)), "is a directory", _HINT)
        name = self.path.stem if self.path.suffix == ".jsonl" else self.path.name
        return self.path.with_name(name + ending)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with open_regular(self.path) as file:  # a pipe could not be read twice
                yield from enumerate(bounded_lines(file), 1)
        except NotRegular:
            reason = "is a directory" if self.path.is_dir() else "not a regular file"
            raise InputMissing(printable(str(self.path)), reason, _HINT) from None
        except (OSError, ValueError) as error:
            raise InputMissing(printable(str(self.path)), os_reason(error), _HINT) from None


def _problem(line: bytes) -> str:
    """Why a line is not a row."""
    try:
        parse_line(line)
    except TooMuch as error:
        return str(error)
    except ValueError:
        pass
    return "not a row of llava batch"
