"""Finds checkpoints on disk by name: which models are here, and which is the default.

A name is an alias, a Hub repo ("owner/name") or a local folder. Nothing here loads a model.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from llava_cli import bounded_json, files, limits, regular_files
from llava_cli.errors import ModelUnusable, os_reason
from llava_cli.models.aliases import ALIASES, repo_of
from llava_cli.paths import data_folder, expand_user, hub_cache
from llava_cli.settings import LoadOptions

BUILTIN = "builtin"


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine."""

    name: str
    """What the user calls it."""
    folder: Path
    adapter: Path | None = None
    """The folder of an adapter to merge into its weights."""


def builtin_folder() -> Path:
    return Path(__file__).parents[1] / "builtin"


def find(name: str) -> Checkpoint:
    """The checkpoint with this name.

    Raises `ModelUnusable` if it is unknown (with the closest names) or not on this machine, or if the Hub's cache does
    not say which snapshot is current.
    """
    if name == BUILTIN:
        return Checkpoint(BUILTIN, builtin_folder())
    if name not in ALIASES and os.path.isfile(file := os.path.expanduser(name)):
        from llava_cli.models import other_formats  # a large table, which a folder's name does not need

        raise ModelUnusable(name, *(other_formats.describe_file(file) or ("is a file", "-m takes a model's folder")))
    if is_folder(name):
        folder = expand_user(name)
        if not os.path.isdir(folder):
            raise ModelUnusable(name, _missing_folder_reason(folder))
        return Checkpoint(name, folder)
    if snapshot := _snapshot(name):
        return Checkpoint(name, snapshot)
    if name not in ALIASES and "/" not in name:
        close = difflib.get_close_matches(name, [BUILTIN, *ALIASES], 3, 0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "llava models lists what there is"
        raise ModelUnusable(name, "unknown model", hint)
    alias = ALIASES.get(name)
    details = f" ({alias.repo}, {alias.bytes / 1e9:.1f} GB)" if alias else ""
    raise ModelUnusable(name, f"not on this machine{details}", f"llava models pull {name}")


def _missing_folder_reason(folder: Path) -> str:
    try:
        os.stat(folder)
    except PermissionError as error:
        return os_reason(error)
    except (OSError, ValueError):
        pass
    return "no such folder"


def is_folder(name: str) -> bool:
    """Whether a name means a local folder: one that exists, or a path that cannot be a repo."""
    is_path = name.startswith((".", "/", "~")) or (os.sep != "/" and os.sep in name)
    return is_path or (name not in (BUILTIN, *ALIASES) and os.path.isdir(name))


def on_disk(name: str) -> Path | None:
    """The folder in the Hub's cache with a complete copy of this alias or repo; None if there is none."""
    try:
        return _snapshot(name)
    except ModelUnusable:
        return None


def _snapshot(name: str) -> Path | None:
    """As `on_disk`. Raises `ModelUnusable` if the cache's current commit is malformed: it becomes part of a path."""
    cache = repo_cache(name)
    try:
        commit = regular_files.read(cache / "refs" / "main", limits.COMMIT_BYTES).decode("utf-8", "replace").strip()
        if is_commit(commit):
            folder = cache / "snapshots" / commit
            return folder if _is_complete(folder) else None
    except (regular_files.NotRegular, regular_files.TooLarge):
        pass
    except (OSError, ValueError):
        return None
    raise ModelUnusable(name, f"{cache / 'refs' / 'main'} does not contain a commit", f"llava models pull {name}")


def is_commit(text: str) -> bool:
    """Whether a text is a full commit hash of git, SHA-1 or SHA-256, and so safe as part of a path."""
    return re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", text) is not None


def _is_complete(folder: Path) -> bool:
    """Whether all weights are there: they are downloaded last, and other tools download a config alone."""
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.exists() and not (folder / "model.safetensors").exists():
        bounds = bounded_json.Bounds(limits.CONFIG_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)
        try:
            shards = bounded_json.loads(regular_files.read(index, bounds.bytes), bounds)["weight_map"].values()
            weights = {os.fspath(shard) for shard in shards}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return True  # damaged, not absent: the loader says so
    return all((folder / name).exists() for name in weights)


def repo_cache(name: str) -> Path:
    """The folder of an alias or repo in the Hub's cache."""
    return hub_cache() / f"models--{repo_of(name).replace('/', '--')}"


def default_name(options: LoadOptions) -> str:
    """The model that the options name, else the first one that was pulled, else the built-in one."""
    if options.model:
        return options.model
    return next((name for name in pulled() if on_disk(name)), BUILTIN)


def pulled() -> list[str]:
    """Names that `llava models pull` has downloaded, the earliest first."""
    try:
        return regular_files.read(data_folder() / "pulled", limits.SETTINGS_BYTES).decode().split()
    except (OSError, ValueError):
        return []


def record_pulled(name: str) -> None:
    """Appends a name to `pulled`. Raises `OSError`."""
    names = dict.fromkeys([*pulled(), name])
    folder = files.follow_links(data_folder())
    files.make_folder(folder, 0o700)
    files.atomic_write(folder / "pulled", ["".join(f"{name}\n" for name in names).encode()], files.SECRET)
