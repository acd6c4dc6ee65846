"""Reads tensors from weight files, one at a time: safetensors and torch's own, in one file or in shards."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_cli.errors import ModelUnusable
from llava_cli.models.checkpoint_files import read_json
from llava_cli.models.pickled_tensors import read_tensors
from llava_cli.models.registry import Checkpoint
from llava_cli.safetensors_header import BadHeader, read_header
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    import torch

_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("model_state_dict.bin", None),
)
"""Names of a single weight file and of an index of shards, in their order of precedence."""
_WEIGHT_FILE = re.compile(r"[\w-][\w.-]{0,200}\.(safetensors|bin)")


class StoredTensor(NamedTuple):
    """A tensor that is not in memory yet."""

    shape: tuple[int, ...]
    bytes: int
    read: Callable[[], torch.Tensor]


Tensors = dict[str, StoredTensor]


def tensors_of(checkpoint: Checkpoint) -> Tensors:
    """All tensors of a folder's weights by name; empty if it has no weights. Of duplicates the last shard's counts.

    Raises `ModelUnusable` for a file that is missing, damaged, or holds more than tensors.
    """
    tensors: Tensors = {}
    for path in _weight_files(checkpoint):
        tensors |= tensors_of_file(checkpoint.name, path)
    return tensors


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    folder = checkpoint.folder
    for single, index in _LAYOUTS:
        if (folder / single).exists():
            return [folder / single]
        if index and (folder / index).exists():
            return [folder / shard for shard in _shards(checkpoint, index)]
    return []


def _shards(checkpoint: Checkpoint, index: str) -> list[str]:
    """The files that an index names, if they are in its folder: it could name any file on this machine."""
    weight_map = read_json(checkpoint, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelUnusable(checkpoint.name, f"{index} is damaged")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if not _WEIGHT_FILE.fullmatch(shard):
            raise ModelUnusable(checkpoint.name, f"{index} names {one_line(shard)!r}, which is not a weight file")
        if not (checkpoint.folder / shard).exists():
            raise ModelUnusable(checkpoint.name, f"{shard} is missing", "copy or download it again")
    return shards


def tensors_of_file(name: str, path: Path) -> Tensors:
    """The tensors in a file of the checkpoint called `name`."""
    if path.suffix == ".bin":
        return {
            key: StoredTensor(tuple(tensor.shape), tensor.nbytes, lambda tensor=tensor: tensor)  # type: ignore[misc]
            for key, tensor in read_tensors(name, path).items()
        }
    try:
        header = read_header(path)
    except (OSError, BadHeader):
        raise ModelUnusable(name, f"{path.name} is damaged or cut off", "copy or download it again") from None
    from safetensors import safe_open

    file: Any = safe_open(path, framework="pt")
    return {
        key: StoredTensor(entry.shape, entry.end - entry.begin, lambda key=key: file.get_tensor(key))  # type: ignore[misc]
        for key, entry in header.items()
    }


def computed_tensor(
    like: StoredTensor, compute: Callable[[], torch.Tensor], shape: tuple[int, ...] | None = None
) -> StoredTensor:
    """A tensor that is computed when it is read, in the dtype of another, and in its shape unless one is given."""
    shape = shape or like.shape
    size = like.bytes * math.prod(shape) // max(math.prod(like.shape), 1)
    return StoredTensor(shape, size, compute)
