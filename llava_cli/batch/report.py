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
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llava_cli import files, limits, render
from llava_cli.batch.lines import bounded, is_too_long, parse
from llava_cli.batch.opener import Opener
from llava_cli.batch.roots import is_signed, resolved_below
from llava_cli.batch.tasks import Task
from llava_cli.bounded_json import Bounds, TooMuch, loads
from llava_cli.conversation import Picture
from llava_cli.errors import BadData, InputMissing, LlavaError, OutputError, OutputTaken, UsageError
from llava_cli.images.reader import is_url, local_path
from llava_cli.regular_files import NotRegular, open_regular
from llava_cli.untrusted_text import for_page, printable

THUMBNAILS = 5_000
"""Rows of a page that have a thumbnail: some 20 MB of them."""
ROWS = 100_000
"""Rows of a page; a browser takes a few seconds for these, and fails at millions."""
SIDE = 160
_BLOCK = 1_000
_RUN = "llava batch photos/ QUESTION -o out.jsonl"
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
                self.torn = line.startswith(b"{") and not line.endswith(b"\n") and not is_too_long(line)
                if not self.torn:
                    raise BadData(f"{printable(str(self.path))}, line {number}", _reason(line), _RUN)
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
            with open_regular(self.path) as file:  # it is read twice
                yield from enumerate(bounded(file), 1)
        except NotRegular:
            reason = "is a directory" if self.path.is_dir() else "not a regular file"
            raise InputMissing(printable(str(self.path)), reason, _RUN) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputMissing(printable(str(self.path)), reason[:1].lower() + reason[1:], _RUN) from None


class Outside(InputMissing):
    """A picture is not where rows may have theirs."""


@dataclass
class Places:
    """Where the pictures of a file of rows are. Only what is below one of the `roots` is opened, wherever links lead.

    Rows and the settings beside them may be a stranger's, and name any file of this machine. So what may be seen is
    below the rows' own folder, and below the one that a run of this user's own had its pictures in; with `--root` it is
    that folder alone.
    """

    roots: list[str]
    starts: list[str]
    """Where relative paths may begin."""
    allow_truncated: bool = False
    outside: set[str] = field(default_factory=set)
    """The folders of pictures that were not opened."""

    @classmethod
    def of(cls, rows: Path, root: str | None = None) -> Places:
        beside = str(rows.parent)
        here = cls([beside], [beside])
        bounds = Bounds(limits.SETTINGS_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS)
        try:
            with open_regular(Path(f"{rows}.run") / "settings.json", follow=False) as file:
                settings = loads(file.read(bounds.bytes + 1), bounds)
            here.starts.insert(0, os.fspath(settings["root"]))
            here.allow_truncated = settings.get("allow_truncated") is True
            if is_signed(rows, settings["root"], settings.get("signed")):
                here.roots.append(settings["root"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # rows of another machine, or that were piped into a file: they have no folder of settings
        if root is not None:
            here.roots = [root]
            here.starts.insert(0, root)
        return here

    def locate(self, image: str) -> str:
        """The path of a row's picture. Raises `Outside`."""
        paths = [os.path.join(start, local_path(image)) for start in self.starts]
        inside = [self._inside(path) for path in paths]
        found = next((path for path in inside if path and os.path.lexists(path)), inside[0])
        if found is None:
            self.outside.add(os.path.dirname(os.path.abspath(paths[0])))
            raise Outside(printable(image), f"outside {printable(self.roots[0])}")
        return found

    def _inside(self, path: str) -> str | None:
        return next(filter(None, (resolved_below(path, root) for root in self.roots)), None)


def default_output(rows: Path) -> Path:
    return rows.with_suffix(".html") if rows.suffix == ".jsonl" else rows.with_name(rows.name + ".html")


def report(source: Path, output: Path, first: int = 1, quiet: bool = False, root: str | None = None) -> None:
    """Writes the page of the rows from number `first` on, and says so on stderr.

    Pictures are shown that are below `root`; None is where `Places` says.
    """
    rows = Rows(source)
    rows.check()
    _check_output(output, source)
    if first > max(rows.total, 1):
        raise UsageError("--from", f"the last row is {rows.total:,}", "llava report --help")
    if rows.torn and not quiet:
        render.note(f"{printable(str(source))}: its last line is not whole and left out; the batch will go on there")
    seen, places = Counts(), Places.of(source, root)
    try:
        with render.spinner("making thumbnails", quiet):
            files.put(output, _page(rows, first, seen, places))
    except OSError as error:
        kind = OutputError if error.errno in _FULL else OutputTaken
        raise kind(printable(str(output)), (error.strerror or str(error)).lower(), "give another file to -o") from None
    if not quiet:
        without = f", {seen.without:,} without their picture" if seen.without else ""
        notes = [f"{printable(str(output))}: {seen.rows:,} rows{without}", *_notes(rows, first)]
        if places.outside:
            common = os.path.commonpath(places.outside)
            notes.append(f"Pictures outside {printable(places.roots[0])}: --root {files.quoted(common)} shows them.")
        render.note("\n  ".join(notes))


@dataclass
class Counts:
    """What there is to say about a page that was written."""

    rows: int = 0
    without: int = 0


def _check_output(output: Path, source: Path) -> None:
    """Raises where the page would have to go in the place of its own rows, or of a folder or device."""
    name, hint = printable(str(output)), "give another file to -o"
    if os.path.realpath(output) == os.path.realpath(source):
        raise UsageError("-o", f"{name} is the file of rows", hint)
    reason = ""
    if output.exists() and not output.is_file():
        reason = "is a directory" if output.is_dir() else "not a regular file"
    elif not output.parent.is_dir():
        reason = "no such folder"
    elif not os.access(output.parent, os.W_OK):
        reason = "permission denied"
    try:
        files.refuse_link(output)
    except files.IsLink as error:
        reason, hint = printable(str(error.strerror)), f"-o {files.quoted(error.target)} writes there"
    if reason:
        raise OutputTaken(name, reason, hint)


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


def _page(rows: Rows, first: int, seen: Counts, places: Places) -> Iterator[bytes]:
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
    for shown in _shown(rows, first, places):
        yield _json(shown).encode() + b"\n"
        seen.rows += 1
        seen.without += "why" in shown and seen.rows <= THUMBNAILS
        if seen.rows % _BLOCK == 0:  # no browser takes strings of any length
            yield end + begin
    yield end + after.encode()


def _shown(rows: Rows, first: int, places: Places) -> Iterator[dict[str, Any]]:
    """Rows as the page has them: with a thumbnail, or why there is none, or `same` as the row before."""
    given = islice(rows, first - 1, first - 1 + ROWS)
    waiting = deque[tuple[int, dict[str, Any]]]()

    def tasks() -> Iterator[Task]:
        for number, row in islice(given, THUMBNAILS):
            waiting.append((number, row))
            yield Task(row["image"], "")

    with closing(Opener(places.locate, places.allow_truncated, shrink=SIDE)) as opener:
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
        row = parse(line)
        kinds = {"image": str, "question": str, "answer": str if row["status"] == "ok" else object}
        right = row["status"] in ("ok", "error") and all(isinstance(row[name], kind) for name, kind in kinds.items())
    except (ValueError, KeyError, TypeError):
        return None
    return row if right else None


def _reason(line: bytes) -> str:
    """Why a line is no row."""
    try:
        parse(line)
    except TooMuch as error:
        return str(error)
    except ValueError:
        pass
    return "not a row of llava batch"


def _fields(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a row, each as the text that it shows; nothing else of it comes there."""
    error, flags, right, expected = (row.get(name) for name in ("error", "flags", "right", "expected"))
    shown: dict[str, Any] = {"n": number, "image": printable(row["image"]), "question": for_page(row["question"])}
    if row["status"] == "error":
        words = [str(error[name]) for name in ("type", "message") if error.get(name)] if isinstance(error, dict) else []
        shown["error"] = for_page(": ".join(words) or "error")
    else:
        shown["answer"] = for_page(row["answer"])
    if isinstance(flags, list):
        shown["flags"] = [for_page(str(flag)) for flag in flags]
    if isinstance(right, bool):
        shown["right"] = right
    if expected is not None:
        shown["expected"] = for_page(" / ".join(map(str, expected)) if isinstance(expected, list) else str(expected))
    facts = {"id": row.get("id"), "model": row.get("model"), "tokens": row.get("answer_tokens")}
    facts["sha256"] = row.get("sha256")
    return shown | {name: for_page(str(value)) for name, value in facts.items() if value is not None}


def _thumbnail(picture: Picture | LlavaError, row: dict[str, Any]) -> dict[str, str]:
    if isinstance(picture, LlavaError):
        if is_url(row["image"]):
            return {"why": "a URL: not fetched"}
        if isinstance(picture, Outside):
            return {"why": f"not opened: {picture.reason}"}
        what = "missing" if isinstance(picture, InputMissing) else "cannot be opened"
        return {"why": f"{what}: {for_page(picture.reason)}"}
    if row.get("sha256") not in (None, picture.sha256):
        return {"why": "changed since it was asked about"}
    data = io.BytesIO()
    picture.image.save(data, "WEBP", quality=70, method=2)
    return {"thumb": base64.b64encode(data.getvalue()).decode()}


def _json(value: Any) -> str:
    """JSON that stays within its element: ASCII, and without the sign that begins an end or a comment."""
    return json.dumps(value).replace("<", "\\u003c")
