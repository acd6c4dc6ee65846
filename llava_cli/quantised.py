"""Quantised copies of checkpoints: quantising takes minutes, and is done once.

A copy is a folder in the user's cache that transformers loads like any checkpoint. Its name says what it was made of
and how, so that another version of the weights, or other settings, have another one. All of it can be deleted at any
time: it is made again when it is wanted.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_cli.checkpoint import check_weights, fingerprint
from llava_cli.errors import ModelUnusable
from llava_cli.registry import Checkpoint, quantised_cache

FORMAT = 1
"""Changes with which layers are quantised, or how."""
SHARD = "500MB"
"""Files are no larger: each stands in memory once more while it is written."""
SPARE = 1 << 30  # bytes that the disk keeps


def path_of(checkpoint: Checkpoint, how: str) -> Path:
    """Where the copy of a checkpoint is that is quantised `how`."""
    name = re.sub(r"[^\w.]+", "-", Path(checkpoint.name).name).strip("-.") or "model"
    return quantised_cache() / f"{name}-{how}-{FORMAT}-{fingerprint(checkpoint)[:16]}"


def find(checkpoint: Checkpoint, path: Path) -> tuple[Checkpoint, list[Path]] | None:
    """The copy, by the name of what it is one of, and its weight files; None where there is none that is whole."""
    copy = Checkpoint(checkpoint.name, path)
    try:
        if not (path / "config.json").exists():
            return None
        return copy, check_weights(copy)
    except ModelUnusable:  # cut off: a disk that lost power
        shutil.rmtree(path, ignore_errors=True)
        return None


def keep(model: Any, path: Path) -> bool:
    """Writes the copy, whole or not at all, and says whether. Without room for it the next start quantises again.

    Before the model's first forward pass: bitsandbytes then arranges weights for the processor, and rounds scales.
    """
    new = path.with_name(f".{path.name}-{os.getpid()}")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < size + SPARE:
            return False
        model.save_pretrained(new, max_shard_size=SHARD)
        for file in new.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.rename(new, path)
    except OSError:  # no room after all, or another process was first
        return path.exists()
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return True


def copies() -> Iterator[tuple[Path, int]]:
    """All that is in the cache, what was begun and never finished too, and how many bytes each takes."""
    with suppress(FileNotFoundError):
        for path in sorted(quantised_cache().iterdir()):
            yield path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def prune() -> Iterator[tuple[str, int]]:
    """Deletes all copies: the name of each, and how many bytes it took."""
    for path, size in copies():
        shutil.rmtree(path, ignore_errors=True)
        yield path.name, size
