"""Finds folders of models in any format on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llava_cli import limits
from llava_cli.errors import ModelUnusable
from llava_cli.files import quoted
from llava_cli.models.registry import is_commit, is_folder, repo_cache
from llava_cli.paths import expand_user
from llava_cli.regular_files import read

_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def find_folder(name: str) -> Path:
    """The folder with this path, or the snapshot of this Hub repo. Raises `ModelUnusable` if there is neither."""
    path = expand_user(name)
    if os.path.isdir(path):
        return path
    if is_folder(name) or not (snapshot := hub_snapshot(name)):
        hint = "" if is_folder(name) or "/" not in name else f"hf download {quoted(name)}"
        raise ModelUnusable(name, "no such folder", hint)
    return snapshot


def hub_snapshot(repo: str) -> Path | None:
    """The current snapshot of a repo in the Hub's cache, in whatever format; None if there is none."""
    if not is_repo(repo):
        return None
    cache = repo_cache(repo)
    try:
        commit = read(cache / "refs" / "main", limits.COMMIT_BYTES).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    folder = cache / "snapshots" / commit
    return folder if is_commit(commit) and folder.is_dir() else None


def is_repo(name: str) -> bool:
    """Whether a name could be that of a Hub repo."""
    return _REPO.fullmatch(name) is not None
