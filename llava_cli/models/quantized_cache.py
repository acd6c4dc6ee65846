"""Quantized copies of checkpoints: quantizing takes minutes, and is done once.

A copy is a folder in the user's cache that transformers loads like any checkpoint. A label in it says which weights it
was made of and how, so other weights or other settings get another copy. All of it can be deleted at any time; the
next start that needs it makes it again.
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
from typing import TYPE_CHECKING, Any

from llava_cli import cache_files, files, limits
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import ModelUnusable
from llava_cli.hardware.allocator import read_once
from llava_cli.models.fingerprint import fingerprint
from llava_cli.models.registry import Checkpoint
from llava_cli.models.weight_files import Weights, check_weights
from llava_cli.paths import quantized_cache

if TYPE_CHECKING:
    import torch

FORMAT = 1
"""Changes with which layers are quantized, or how."""
SHARD = 64_000_000
"""Bytes. No file is larger before its weights get more bits, for which they are in memory twice."""
LABEL = "made_of.json"


@dataclass(frozen=True)
class Recipe:
    """What a copy is made of, and how."""

    fingerprint: str
    """The checkpoint's."""
    how: str
    """Precision and device."""
    format: int = FORMAT


@dataclass(frozen=True)
class QuantizedCopy:
    """Where a quantized copy is, or would be, and what it has to be made of."""

    path: Path
    recipe: Recipe


def copy_of(checkpoint: Checkpoint, how: str) -> QuantizedCopy:
    """A checkpoint's copy that is quantized `how`. Raises `ModelUnusable` where its files cannot be read."""
    recipe = Recipe(fingerprint(checkpoint), how)
    return QuantizedCopy(quantized_cache() / f"{_prefix(checkpoint, how)}{recipe.fingerprint[:16]}", recipe)


def _prefix(checkpoint: Checkpoint, how: str) -> str:
    """What the name of a copy begins with."""
    name = re.sub(r"[^\w.]+", "-", Path(checkpoint.name).name).strip("-.") or "model"
    return f"{name}-{how}-{FORMAT}-"


def is_kept(checkpoint: Checkpoint, how: str) -> bool:
    """Whether there is a checkpoint's copy that is quantized `how`.

    Where no copy has its name, none of its files is read. Raises as `copy_of`.
    """
    try:
        has_its_name = any(quantized_cache().glob(f"{_prefix(checkpoint, how)}*"))
    except OSError:  # a cache that cannot be read
        return False
    return has_its_name and _exists(copy_of(checkpoint, how))


def find(checkpoint: Checkpoint, copy: QuantizedCopy) -> tuple[Checkpoint, Weights] | None:
    """The copy as a checkpoint under the original's name; None, and nothing is left, where no valid one exists.

    A copy of something else, or one that another user may have written, is not valid.
    """
    stored = Checkpoint(checkpoint.name, copy.path)
    try:
        if _exists(copy) and (copy.path / "config.json").exists():
            return stored, check_weights(stored)
    except ModelUnusable:  # cut short: a disk that lost power
        pass
    shutil.rmtree(copy.path, ignore_errors=True)
    return None


def claim(copy: QuantizedCopy) -> bool:
    """Makes sure that a copy's folder exists, for other files that are derived from the model; says whether it does."""
    if _exists(copy):
        return True
    shutil.rmtree(copy.path, ignore_errors=True)
    try:
        cache_files.make_folder(copy.path.parent)
        files.make_new_folder(copy.path, 0o700)
        _write_label(copy.path, copy.recipe)
    except OSError:
        return False
    return True


def keep(model: Any, copy: QuantizedCopy, dtype: torch.dtype) -> bool:
    """Writes the copy, all of it or nothing, and says whether it exists. Without space the next start quantizes again.

    Weights that are not quantized are in `dtype` there, or in more bits, so that they are mapped as they are. Call it
    before the model's first forward pass, in which bitsandbytes rearranges weights for the CPU and rounds scales.
    """
    new = copy.path.with_name(f".{copy.path.name}-{os.getpid()}")
    if not has_space(copy, sum(tensor.numel() * _itemsize(tensor, dtype) for tensor in model.state_dict().values())):
        return False
    try:
        shutil.rmtree(new, ignore_errors=True)  # left by an earlier process with this number
        files.make_new_folder(new, 0o700)
        model.save_pretrained(new, max_shard_size=SHARD)
        with read_once(shards := list(new.glob("*.safetensors"))):
            for path in shards:
                _widen(path, dtype)
        _write_label(new, copy.recipe)
        for file in new.iterdir():
            file.chmod(0o600)  # whatever the umask is
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.rename(new, copy.path)
    except OSError:  # no space after all, or another process was first
        return _exists(copy)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return True


def has_space(copy: QuantizedCopy, size: int) -> bool:
    """Whether a copy of so many bytes can be kept."""
    try:
        cache_files.make_folder(copy.path.parent)
        return shutil.disk_usage(copy.path.parent).free >= size + cache_files.DISK_RESERVE
    except OSError:
        return False


def _itemsize(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes of one of a tensor's values where those in floating point have at least as many as `dtype`."""
    return max(tensor.itemsize, dtype.itemsize) if tensor.is_floating_point() else tensor.itemsize


def _widen(path: Path, dtype: torch.dtype) -> None:
    """Rewrites a file whose weights in floating point have fewer bits than `dtype`."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)  # mapped
    wide = {name: t.to(dtype) if _itemsize(t, dtype) > t.itemsize else t for name, t in tensors.items()}
    if any(wide[name] is not tensors[name] for name in tensors):
        new = path.with_suffix(".wide")
        save_file(wide, new, {"format": "pt"})
        new.replace(path)


def _write_label(folder: Path, recipe: Recipe) -> None:
    cache_files.atomic_write(folder / LABEL, [json.dumps(asdict(recipe)).encode()])


def _exists(copy: QuantizedCopy) -> bool:
    """Whether the folder exists, its label names this recipe, and nobody but this user may have written it."""
    bounds = Bounds(limits.CACHE_FILE_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)
    try:
        label = loads(cache_files.read(copy.path / LABEL, bounds.bytes), bounds)
        is_ours = all(cache_files.is_private(path) for path in (copy.path, *copy.path.iterdir()))
    except (OSError, ValueError):
        return False
    return is_ours and label == asdict(copy.recipe)


def copies() -> Iterator[tuple[Path, int]]:
    """Everything in the cache, unfinished copies too, and how many bytes each takes."""
    with suppress(OSError):  # none, or in a home that this user cannot enter
        for path in sorted(quantized_cache().iterdir()):
            yield path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def prune() -> Iterator[tuple[str, int]]:
    """Deletes all copies; yields the name of each and how many bytes it took."""
    for path, size in copies():
        shutil.rmtree(path, ignore_errors=True)
        yield path.name, size
