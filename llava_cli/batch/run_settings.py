"""`settings.json` beside the rows of a run: what all of its rows have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_cli import limits, regular_files
from llava_cli.batch.roots import signature
from llava_cli.bounded_json import Bounds, loads
from llava_cli.engine.remote.local_server_engine import serving_precision
from llava_cli.errors import BadData
from llava_cli.loader import engine_identity, find_checkpoint, open_engine
from llava_cli.models.checkpoint_files import CONFIG
from llava_cli.models.fingerprint import fingerprint
from llava_cli.models.footprint import sizes_of
from llava_cli.models.precision import one_precision
from llava_cli.models.validate import check_files, check_visual_tokens
from llava_cli.models.weight_files import check_weights
from llava_cli.paths import socket_path
from llava_cli.settings import Settings, is_fast
from llava_cli.untrusted_text import one_line, printable

_SIGNATURE = "signed"
"""The key of the signature of the run's root, which is not a setting."""
_MAX_CHANGES = 20
"""Changes that are listed. There are fewer, but a damaged file may have any number."""


def identify(settings: Settings) -> dict[str, Any]:
    """What answers will depend on besides what is asked: the very model, and how it is run. Loads no weights."""
    if settings.remote.server:
        engine = open_engine(settings, lambda line: None)
        return {"model": engine.model, "server": engine.where}
    from llava_cli.hardware.device import choose_plan
    from llava_cli.prompts.chat_template import read_template

    options = settings.load
    checkpoint = find_checkpoint(options)
    configs = check_files(checkpoint)
    if options.visual_tokens:
        check_visual_tokens(checkpoint, configs[CONFIG], options.visual_tokens)
    plan = choose_plan(options.device, options.precision, options.attention)
    template = options.template or ""
    if template not in ("", "hub", "native"):  # which the checkpoint decides
        template = read_template(template)
    return {
        "model": checkpoint.name,
        "checkpoint": fingerprint(checkpoint),
        "precision": plan.precision + ", double quantised" * options.double_quant * (plan.precision == "4bit"),
        "device": plan.device,
        "template": template,
        "fast": is_fast(),
    }


def with_one_precision(settings: Settings, saved: str | None, hint: Callable[[str], None]) -> Settings:
    """The settings of a run, in which `auto` has become the precision that it stands for in all of its rows.

    `saved` is that of the run which is resumed. Raises and hints as `one_precision`.
    """
    options = settings.load
    if settings.remote.server or options.precision != "auto":
        return settings
    checkpoint = find_checkpoint(options)
    sizes = sizes_of(checkpoint, check_weights(checkpoint), check_files(checkpoint)[CONFIG])

    def serving() -> str | None:
        return serving_precision(engine_identity(options), socket_path())

    precision = one_precision(checkpoint, sizes, options, saved, serving, hint)
    return replace(settings, load=replace(options, precision=precision))


def to_json(settings: dict[str, Any], rows: Path) -> bytes:
    """The file's content; `rows` is the output that it is beside."""
    return dumps({**settings, _SIGNATURE: signature(rows, str(settings.get("root")))})


def dumps(settings: dict[str, Any]) -> bytes:
    """Settings as JSON."""
    # Surrogates, which UTF-8 cannot encode, become JSON's escapes.
    return json.dumps(settings, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read(path: Path) -> dict[str, Any]:
    """Raises `BadData`, or `OSError`."""
    with regular_files.open_regular(path, follow=False) as file:
        return parse(file.read(limits.SETTINGS_BYTES + 1), str(path))


def parse(data: bytes, name: str) -> dict[str, Any]:
    """Settings from JSON. Raises `BadData` about their file."""
    try:
        settings = loads(data, Bounds(limits.SETTINGS_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise BadData(printable(name), "damaged", "give another file to -o")
    return settings


def precision_of(saved: dict[str, Any]) -> str:
    """The precision of all rows, as `--precision` names it."""
    return str(saved.get("precision")).partition(",")[0]


def rows_of_no_run(name: str) -> BadData:
    """The error for an output that has rows, and no settings beside it."""
    reason = "it has rows already, and no folder .run beside it that says what made them"
    return BadData(name, reason, "give another file to -o")


def refuse_changes(name: str, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises `BadData` about an output whose rows were made with other settings."""
    if found := changes(saved, settings):
        raise BadData(name, f"other settings made its rows: {found}", "give another file to -o")


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
