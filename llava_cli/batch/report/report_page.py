"""Rows -> one HTML page that works offline.

5,000 rows open fast because the page draws 50 at a time and keeps the others, with their thumbnails, as plain objects
outside the DOM. Turning pages takes less code than a virtual list, and the browser's own search, printing and screen
readers work on what is drawn. Rows are untrusted: `report.html` shows them as text only, its content security policy
allows no script but its own, and `_to_json` cannot end the element that it is in.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from heapq import nlargest
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from llava_cli.batch.picture_loader import PictureLoader
from llava_cli.batch.report.report_pictures import PictureFolders, task_of, thumbnail
from llava_cli.batch.report.report_rows import RowsFile
from llava_cli.batch.rows import escalation_error, is_number
from llava_cli.batch.tasks import Task
from llava_cli.conversation import Picture
from llava_cli.images.resize import Resize
from llava_cli.untrusted_text import for_page, printable

MAX_THUMBNAILS = 5_000
"""Rows of a page that have a thumbnail; so many take about 20 MB."""
MAX_ROWS = 100_000
"""Rows of a page; a browser takes a few seconds for these, and fails at millions."""
THUMBNAIL_SIDE = 160
MAX_BARS = 16
"""Choices of a row that are shown, the likeliest ones."""
_RANGES = {"threshold": (0, 1), "answer_probability": (0, 1), "sight": (-1e9, 1e9)}
"""Of a row's numbers; JSON cannot tell the page of others, such as infinity."""
_ROWS_PER_ELEMENT = 1_000
"""A browser does not parse JSON of any length at once."""


@dataclass
class PageCounts:
    rows: int = 0
    without_picture: int = 0


def page(rows: RowsFile, first: int, folders: PictureFolders, counts: PageCounts, path: Path) -> Iterator[bytes]:
    """The page with the rows from number `first` on, in pieces, so that memory does not grow with the rows.

    Its links are relative to `path`, where it will be.
    """
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    for name in ("style", "script"):  # their hashes are in the content security policy
        element = template.rpartition(f"<{name}>")[2].partition(f"</{name}>")[0]
        digest = base64.b64encode(hashlib.sha256(element.encode()).digest()).decode()
        template = template.replace(f"{{{name}}}", f"sha256-{digest}", 1)
    before, _, after = template.partition("<!-- rows -->")
    about = {"file": printable(rows.path.name), "notes": notes(rows, first)}
    yield f'{before}<script type="application/json" id="about">{_to_json(about)}</script>\n'.encode()
    begin, end = b'<script type="application/json" class="rows">\n', b"</script>\n"
    yield begin
    for page_row in _page_rows(rows, first, folders, path):
        yield _to_json(page_row).encode() + b"\n"
        counts.rows += 1
        counts.without_picture += "why" in page_row and counts.rows <= MAX_THUMBNAILS
        if counts.rows % _ROWS_PER_ELEMENT == 0:
            yield end + begin
    yield end + after.encode()


def notes(rows: RowsFile, first: int) -> list[str]:
    """What is not on the page, and the commands that show it."""
    lines, last = [], min(rows.total, first + MAX_ROWS - 1)
    command = f"llava report {printable(rows.path.name)} --from"
    if first > 1 or last < rows.total:
        rest = f"; {command} {last + 1} begins behind them" if last < rows.total else ""
        lines.append(f"Rows {first:,} to {last:,} of {rows.total:,}{rest}.")
    if last >= first + MAX_THUMBNAILS:
        after = first + MAX_THUMBNAILS
        lines.append(f"Rows from {after:,} on are without thumbnails; {command} {after} makes a page that has them.")
    return lines


def _page_rows(rows: RowsFile, first: int, folders: PictureFolders, path: Path) -> Iterator[dict[str, Any]]:
    """Rows as the page has them: with a thumbnail, with `why` there is none, or with `same` for the one before.

    What was opened has a link to its file.
    """
    selected = islice(rows, first - 1, first - 1 + MAX_ROWS)
    waiting = deque[tuple[int, dict[str, Any]]]()

    def tasks() -> Iterator[Task]:
        for number, row in islice(selected, MAX_THUMBNAILS):
            waiting.append((number, row))
            yield task_of(row)

    side, dpi = THUMBNAIL_SIDE, folders.dpi
    # One reader: an archive may be a stream.
    with closing(PictureLoader(folders.find, folders.allow_truncated, dpi=dpi, readers=1)) as loader:
        previous: Any = None
        for task, picture in loader.load_all(tasks(), Resize.within(side)):
            number, row = waiting.popleft()
            current = picture, row.get("sha256")
            is_same = previous is not None and current[0] is previous[0] and current[1] == previous[1]
            link = folders.link(task, path) if isinstance(picture, Picture) else None
            shown = {"same": True} if is_same else thumbnail(picture, row, side)
            yield {**page_fields(number, row), **shown, **({"link": link} if link else {})}
            previous = current
    why = {"why": f"no thumbnails after row {first + MAX_THUMBNAILS - 1:,}"}
    for number, row in selected:
        yield {**page_fields(number, row), **why}


def page_fields(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a row, as text that is safe to show; nothing else of the row is in the page."""
    error, flags, right, expected = (row.get(name) for name in ("error", "flags", "right", "expected"))
    fields: dict[str, Any] = {"n": number, "image": printable(row["image"]), "question": for_page(row["question"])}
    if isinstance(row.get("asked"), str) and row["asked"] != row["question"]:
        fields["asked"] = for_page(row["asked"])
    fields |= _place(task_of(row))
    if row["status"] == "error":
        words = [str(error[name]) for name in ("type", "message") if error.get(name)] if isinstance(error, dict) else []
        fields["error"] = for_page(": ".join(words) or "error")
    else:
        fields["answer"] = for_page(row["answer"])
    if isinstance(flags, list):
        fields["flags"] = [for_page(str(flag)) for flag in flags]
    if isinstance(right, bool):
        fields["right"] = right
    if expected is not None:
        fields["expected"] = for_page(" / ".join(map(str, expected)) if isinstance(expected, list) else str(expected))
    fields |= scores(row)
    facts = {"id": row.get("id"), "model": row.get("model"), "tokens": row.get("answer_tokens")}
    facts["sha256"] = row.get("sha256")
    return fields | {name: for_page(str(value)) for name, value in facts.items() if value is not None}


def _place(task: Task) -> dict[str, str]:
    """What of its file a task is about, in words."""
    words = {"page": task.page, "time": None if task.time is None else clock(task.time), "region": task.region}
    return {name: str(word) for name, word in words.items() if word is not None}


def clock(seconds: float) -> str:
    """`12.5` -> `0:12.5`, `3661` -> `1:01:01`."""
    minutes, rest = divmod(round(seconds, 3), 60)
    shown = f"{rest:06.3f}".rstrip("0").rstrip(".")
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{shown}" if hours else f"{minutes}:{shown}"


def scores(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says of its certainty, as far as these are numbers in their ranges, and texts."""
    probabilities, confidence, escalated = (row.get(name) for name in ("probabilities", "confidence", "escalated"))
    fields = {name: row[name] for name, bounds in _RANGES.items() if is_number(row.get(name), *bounds)}
    if isinstance(probabilities, dict):
        numbers = [(choice, p) for choice, p in probabilities.items() if is_number(p, 0, 1)]
        likeliest = nlargest(MAX_BARS, numbers, key=itemgetter(1))
        fields["bars"] = [(for_page(choice), p) for choice, p in likeliest]
    if isinstance(confidence, dict) and all(is_number(confidence.get(name), 0, 1) for name in ("mean", "lowest")):
        fields |= {"mean": confidence["mean"], "lowest": confidence["lowest"]}
        fields["token"] = for_page(str(confidence.get("lowest_token", "")))
    if isinstance(escalated, dict):
        error = escalation_error(row)
        words = f"failed: {error.get('message')}" if error else str(escalated.get("answer"))
        fields["escalated"] = [for_page(str(escalated.get("model"))), for_page(words)]
    if isinstance(row.get("guess"), str):
        fields["guess"] = for_page(row["guess"])
    return fields


def _to_json(value: Any) -> str:
    """ASCII without `<`, which could end the element or begin a comment."""
    return json.dumps(value).replace("<", "\\u003c")
