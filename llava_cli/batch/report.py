"""A batch's rows as one HTML page to search and go through; it holds all it shows and asks nothing of a network.

5,000 rows open fast because the page draws 50 at a time and keeps the others, thumbnails too, as plain objects that
never were in its DOM. Turning pages is less code than a window that follows the scrolling, and the browser's own
search, printing and screen readers work on what is drawn. Rows are untrusted: `report.html` shows them as text only,
its policy lets no script run but its own, and `_json` writes nothing that could end the element it stands in.

The rows are read twice, to be sure of all before the first picture is opened, and written as they are read: memory
does not grow with them.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import os
import re
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llava_cli import render
from llava_cli.batch import files
from llava_cli.batch.opener import Opener
from llava_cli.batch.tasks import Task
from llava_cli.conversation import Picture
from llava_cli.errors import BadData, InputMissing, LlavaError, OutputError, OutputTaken, UsageError, printable
from llava_cli.images import is_url

THUMBNAILS = 5_000
"""Rows of a page that have a thumbnail: some 20 MB of them."""
ROWS = 100_000
"""Rows of a page; a browser takes a few seconds for these, and fails at millions."""
SIDE = 160
LINE = 64_000_000
"""Bytes of a row: what has longer lines is another kind of file."""
_BLOCK = 1_000
_RUN = "llava batch photos/ QUESTION -o out.jsonl"
# What would not be seen, or would turn the text around it.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


@dataclass
class Rows:
    """A file of rows: `check` it, then take them from it."""

    path: Path
    total: int = 0
    torn: bool = False
    """Whether a last line has not been written to its end, and is left out."""

    def check(self) -> None:
        """Raises `InputMissing` or `BadData`, with the number of a line that is no row."""
        for number, line in self._lines():
            if _row(line) is None:
                self.torn = line.startswith(b"{") and not line.endswith(b"\n")
                if not self.torn:
                    raise BadData(f"{printable(str(self.path))}, line {number}", "not a row of llava batch", _RUN)
            else:
                self.total = number

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Those that were checked, with their numbers; a run may be writing more of them."""
        for number, line in islice(self._lines(), self.total):
            if (row := _row(line)) is None:
                raise BadData(f"{printable(str(self.path))}, line {number}", "has changed just now", "try again")
            yield number, row

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with open(self.path, "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it is read twice
                    raise InputMissing(printable(str(self.path)), "not a regular file", _RUN)
                yield from enumerate(iter(lambda: file.readline(LINE), b""), 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputMissing(printable(str(self.path)), reason[:1].lower() + reason[1:], _RUN) from None


@dataclass
class Places:
    """Where the pictures of a file of rows are: where its run had them, else beside the file, else right here."""

    folders: list[str] = field(default_factory=list)
    allow_truncated: bool = False

    @classmethod
    def of(cls, rows: Path) -> Places:
        here = cls([str(rows.parent), ""])
        try:
            settings = json.loads((rows.with_name(rows.name + ".run") / "settings.json").read_bytes())
            here.folders.insert(0, os.fspath(settings["root"]))
            here.allow_truncated = settings.get("allow_truncated") is True
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # rows of another machine, or that were piped into a file: they have no folder of settings
        return here

    def path(self, image: str) -> str:
        if is_url(image):
            return image
        paths = [os.path.join(folder, image) for folder in self.folders]
        return next((path for path in paths if os.path.lexists(path)), paths[0])


def default_output(rows: Path) -> Path:
    return rows.with_suffix(".html") if rows.suffix == ".jsonl" else rows.with_name(rows.name + ".html")


def report(source: Path, output: Path, first: int = 1, quiet: bool = False) -> None:
    """Writes the page of the rows from number `first` on, and says so on stderr."""
    rows = Rows(source)
    rows.check()
    _check_output(output, source)
    if first > max(rows.total, 1):
        raise UsageError("--from", f"the last row is {rows.total:,}", "llava report --help")
    if rows.torn and not quiet:
        render.note(f"{printable(str(source))}: its last line is not whole and left out; the batch will go on there")
    seen = Counts()
    try:
        with render.spinner("making thumbnails", quiet):
            files.put(Path(os.path.realpath(output)), _page(rows, first, seen))
    except OSError as error:
        kind = OutputError if error.errno in _FULL else OutputTaken
        raise kind(printable(str(output)), (error.strerror or str(error)).lower(), "give another file to -o") from None
    if not quiet:
        without = f", {seen.without:,} without their picture" if seen.without else ""
        render.note("\n  ".join([f"{printable(str(output))}: {seen.rows:,} rows{without}", *_notes(rows, first)]))


@dataclass
class Counts:
    """What there is to say about a page that was written."""

    rows: int = 0
    without: int = 0


def _check_output(output: Path, source: Path) -> None:
    """Raises where the page would have to go in the place of its own rows, or of a folder or device."""
    name, path = printable(str(output)), Path(os.path.realpath(output))
    if path == Path(os.path.realpath(source)):
        raise UsageError("-o", f"{name} is the file of rows", "give another file to -o")
    reason = ""
    if path.exists() and not path.is_file():
        reason = "is a directory" if path.is_dir() else "not a regular file"
    elif not path.parent.is_dir():
        reason = "no such folder"
    elif not os.access(path.parent, os.W_OK):
        reason = "permission denied"
    if reason:
        raise OutputTaken(name, reason, "give another file to -o")


def _notes(rows: Rows, first: int) -> list[str]:
    """What is not on the page, and how to come to it."""
    found, last = [], min(rows.total, first + ROWS - 1)
    command = f"llava report {printable(rows.path.name)} --from"
    if first > 1 or last < rows.total:
        rest = f"; {command} {last + 1} begins behind them" if last < rows.total else ""
        found.append(f"Rows {first:,} to {last:,} of {rows.total:,}{rest}.")
    if last >= first + THUMBNAILS:
        after = first + THUMBNAILS
        found.append(f"Rows from {after:,} on are without thumbnails; {command} {after} makes a page that has them.")
    return found


def _page(rows: Rows, first: int, seen: Counts) -> Iterator[bytes]:
    """The template, with the rows where it has room for them and the hashes of what may run."""
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    for name in ("style", "script"):
        inside = template.rpartition(f"<{name}>")[2].partition(f"</{name}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        template = template.replace(f"{{{name}}}", f"sha256-{digest}", 1)
    before, _, after = template.partition("<!-- rows -->")
    about = {"file": printable(rows.path.name), "notes": _notes(rows, first)}
    yield f'{before}<script type="application/json" id="about">{_json(about)}</script>\n'.encode()
    begin, end = b'<script type="application/json" class="rows">\n', b"</script>\n"
    yield begin
    for shown in _shown(rows, first):
        yield _json(shown).encode() + b"\n"
        seen.rows += 1
        seen.without += "why" in shown and seen.rows <= THUMBNAILS
        if seen.rows % _BLOCK == 0:  # no browser takes strings of any length
            yield end + begin
    yield end + after.encode()


def _shown(rows: Rows, first: int) -> Iterator[dict[str, Any]]:
    """Rows as the page has them: with a thumbnail, or why there is none, or `same` as the row before."""
    given = islice(rows, first - 1, first - 1 + ROWS)
    places, waiting = Places.of(rows.path), deque[tuple[int, dict[str, Any]]]()

    def tasks() -> Iterator[Task]:
        for number, row in islice(given, THUMBNAILS):
            waiting.append((number, row))
            yield Task(places.path(row["image"]), "")

    with closing(Opener(allow_truncated=places.allow_truncated, shrink=SIDE)) as opener:
        before: Any = None
        for _, picture in opener.opened(tasks()):
            number, row = waiting.popleft()
            what = picture, row.get("sha256")
            same = before is not None and what[0] is before[0] and what[1] == before[1]
            yield {**_fields(number, row), **({"same": True} if same else _thumbnail(picture, row))}
            before = what
    why = {"why": f"no thumbnails after row {first + THUMBNAILS - 1:,}"}
    for number, row in given:
        yield {**_fields(number, row), **why}


def _row(line: bytes) -> dict[str, Any] | None:
    """A line's row; None where it is none."""
    try:
        row = json.loads(line)
        kinds = {"image": str, "question": str, "answer": str if row["status"] == "ok" else object}
        right = row["status"] in ("ok", "error") and all(isinstance(row[name], kind) for name, kind in kinds.items())
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return row if right else None


def _fields(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a row, each as the text that it shows; nothing else of it comes there."""
    error, flags, right, expected = (row.get(name) for name in ("error", "flags", "right", "expected"))
    shown: dict[str, Any] = {"n": number, "image": printable(row["image"]), "question": visible(row["question"])}
    if row["status"] == "error":
        words = [str(error[name]) for name in ("type", "message") if error.get(name)] if isinstance(error, dict) else []
        shown["error"] = visible(": ".join(words) or "error")
    else:
        shown["answer"] = visible(row["answer"])
    if isinstance(flags, list):
        shown["flags"] = [visible(str(flag)) for flag in flags]
    if isinstance(right, bool):
        shown["right"] = right
    if expected is not None:
        shown["expected"] = visible(" / ".join(map(str, expected)) if isinstance(expected, list) else str(expected))
    facts = {"id": row.get("id"), "model": row.get("model"), "tokens": row.get("answer_tokens")}
    facts["sha256"] = row.get("sha256")
    return shown | {name: visible(str(value)) for name, value in facts.items() if value is not None}


def _thumbnail(picture: Picture | LlavaError, row: dict[str, Any]) -> dict[str, str]:
    if isinstance(picture, LlavaError):
        if is_url(row["image"]):
            return {"why": "a URL: not fetched"}
        what = "missing" if isinstance(picture, InputMissing) else "cannot be opened"
        return {"why": f"{what}: {visible(picture.reason)}"}
    if row.get("sha256") not in (None, picture.sha256):
        return {"why": "changed since it was asked about"}
    data = io.BytesIO()
    picture.image.save(data, "WEBP", quality=70, method=2)
    return {"thumb": base64.b64encode(data.getvalue()).decode()}


def visible(text: str) -> str:
    """Text as it is shown: what would be hidden, or turn the text around it, is spelt out."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))


def _json(value: Any) -> str:
    """JSON that stays within its element: ASCII, and without the sign that begins an end or a comment."""
    return json.dumps(value).replace("<", "\\u003c")
