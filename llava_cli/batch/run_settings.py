"""`settings.json` beside the rows of a run: what all of its rows have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_cli import limits, regular_files
from llava_cli.batch.roots import signature
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import BadData
from llava_cli.untrusted_text import one_line, printable

_SIGNATURE = "signed"
"""The key of the signature of the run's root, which is not a setting."""
_MAX_CHANGES = 20
"""Changes that are listed. There are fewer, but a damaged file may have any number."""


def to_json(settings: dict[str, Any], rows: Path) -> bytes:
    """The file's content; `rows` is the output that it is beside."""
    settings = {**settings, _SIGNATURE: signature(rows, str(settings.get("root")))}
    # Surrogates, which UTF-8 cannot encode, become JSON's escapes.
    return json.dumps(settings, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read(path: Path) -> dict[str, Any]:
    """Raises `BadData`, or `OSError`."""
    bounds = Bounds(limits.SETTINGS_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS)
    try:
        with regular_files.open_regular(path, follow=False) as file:
            settings = loads(file.read(bounds.bytes + 1), bounds)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise BadData(printable(str(path)), "damaged", "give another file to -o")
    return settings


def changes(saved: dict[str, Any], settings: dict[str, Any]) -> str:
    """How the settings differ from saved ones, in one line; empty if they are the same."""
    new = json.loads(json.dumps(settings))  # as they are read again: tuples become lists
    old = {"fast": new.get("fast"), **saved}  # earlier versions did not save it
    names = [name for name in {**new, **old} if old.get(name) != new.get(name) and name != _SIGNATURE]
    parts = [
        f"{one_line(name)} was {_abbreviated(old.get(name))}, is {_abbreviated(new.get(name))}"
        for name in names[:_MAX_CHANGES]
    ]
    more = f"; and {len(names) - _MAX_CHANGES:,} more" if len(names) > _MAX_CHANGES else ""
    return "; ".join(parts) + more


def _abbreviated(value: Any) -> str:
    text = printable(json.dumps(value, ensure_ascii=False)[:61])
    return text if len(text) <= 60 else text[:57] + "…"
