"""Quantised copies of checkpoints: quantising takes minutes, and is done once.

A copy is a folder in the user's cache that transformers loads like any checkpoint. It says in itself what it was made
of and how, so that another version of the weights, or other settings, have another one. All of it can be deleted at any
time: it is made again when it is wanted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_cli import cache_files, files, limits
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import ModelUnusable
from llava_cli.models.registry import Checkpoint, quantised_cache
from llava_cli.models.validate import Weights, check_weights, fingerprint

FORMAT = 1
"""Changes with which layers are quantised, or how."""
SHARD = "500MB"
"""Files are no larger: each stands in memory once more while it is written."""
SPARE = 1 << 30  # bytes that the disk keeps
LABEL = "made_of.json"


@dataclass(frozen=True)
class Recipe:
    """What a copy is made of, and how."""

    fingerprint: str
    """Of the checkpoint."""
    how: str
    format: int = FORMAT


@dataclass(frozen=True)
class Copy:
    """Where a quantised copy is, or would be, and what it must be one of."""

    path: Path
    recipe: Recipe


def copy_of(checkpoint: Checkpoint, how: str) -> Copy:
    """The copy of a checkpoint that is quantised `how`. Raises `ModelUnusable` where its files cannot be read."""
    name = re.sub(r"[^\w.]+", "-", Path(checkpoint.name).name).strip("-.") or "model"
    recipe = Recipe(fingerprint(checkpoint), how)
    return Copy(quantised_cache() / f"{name}-{how}-{FORMAT}-{recipe.fingerprint[:16]}", recipe)


def find(checkpoint: Checkpoint, copy: Copy) -> tuple[Checkpoint, Weights] | None:
    """The copy, by the name of what it is one of, and its weight files; None where there is none that is whole.

    One that is of something else, or that another user may have written, is none.
    """
    found = Checkpoint(checkpoint.name, copy.path)
    try:
        if _is_there(copy) and (copy.path / "config.json").exists():
            return found, check_weights(found)
    except ModelUnusable:  # cut off: a disk that lost power
        pass
    shutil.rmtree(copy.path, ignore_errors=True)
    return None


def claim(copy: Copy) -> bool:
    """Whether a copy's folder is there for what else is kept of its model; it is made where there is none."""
    if _is_there(copy):
        return True
    shutil.rmtree(copy.path, ignore_errors=True)
    try:
        cache_files.make_folder(copy.path.parent)
        files.make_new_folder(copy.path, 0o700)
        _label(copy.path, copy.recipe)
    except OSError:
        return False
    return True


def keep(model: Any, copy: Copy) -> bool:
    """Writes the copy, whole or not at all, and says whether. Without room for it the next start quantises again.

    Before the model's first forward pass: bitsandbytes then arranges weights for the processor, and rounds scales.
    """
    new = copy.path.with_name(f".{copy.path.name}-{os.getpid()}")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    try:
        cache_files.make_folder(new.parent)
        if shutil.disk_usage(new.parent).free < size + SPARE:
            return False
        shutil.rmtree(new, ignore_errors=True)  # of a process of that number, long ago
        files.make_new_folder(new, 0o700)
        model.save_pretrained(new, max_shard_size=SHARD)
        _label(new, copy.recipe)
        for file in new.iterdir():
            file.chmod(0o600)  # whatever the umask is
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.rename(new, copy.path)
    except OSError:  # no room after all, or another process was first
        return _is_there(copy)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return True


def _label(folder: Path, recipe: Recipe) -> None:
    cache_files.put(folder / LABEL, [json.dumps(asdict(recipe)).encode()])


def _is_there(copy: Copy) -> bool:
    """Whether there is a folder that says that it is this copy, and that this user alone may have written."""
    bounds = Bounds(limits.CACHE_FILE_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)
    try:
        label = loads(cache_files.read(copy.path / LABEL, bounds.bytes), bounds)
        ours = all(cache_files.is_ours(path) for path in (copy.path, *copy.path.iterdir()))
    except (OSError, ValueError):
        return False
    return ours and label == asdict(copy.recipe)


def copies() -> Iterator[tuple[Path, int]]:
    """All that is in the cache, what was begun and never finished too, and how many bytes each takes."""
    with suppress(OSError):  # none, or in a home that this user cannot enter
        for path in sorted(quantised_cache().iterdir()):
            yield path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def prune() -> Iterator[tuple[str, int]]:
    """Deletes all copies: the name of each, and how many bytes it took."""
    for path, size in copies():
        shutil.rmtree(path, ignore_errors=True)
        yield path.name, size
