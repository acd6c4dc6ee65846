"""Writes a converted checkpoint: its folder, completely or not at all, and its weights, a shard at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli import files
from llava_cli.convert.tensors import Tensors
from llava_cli.errors import OutputTaken, plain_message

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2 << 30
"""The size of a weight file, all of which is in memory at a time."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that is renamed to `out` at the end. Raises `OutputTaken` if it cannot be written."""
    new = out.with_name(f".{out.name[:200]}.{os.urandom(4).hex()}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.make_new_folder(new)
        yield new
        os.rename(new, out)
        files.sync_folder(out.parent)
    except OSError as error:
        raise OutputTaken(str(out), plain_message(error), "-o names another folder") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_space(folder: Path, tensors: Tensors) -> None:
    """Raises `OutputTaken` if there is too little space for the tensors."""
    size, free = sum(tensor.bytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if size > free:
        words = f"needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there"
        raise OutputTaken(str(folder.parent), words, "-o names a folder on another disk")


def write_json(path: Path, content: Any) -> None:
    """Raises `OSError`."""
    files.atomic_write(path, [json.dumps(content, indent=2).encode()])


def write_weights(folder: Path, tensors: Tensors, progress: Callable[[int, int], None]) -> None:
    """Writes all tensors, and an index if there are several files. Raises `OSError`.

    `progress` is called with (bytes written, bytes in all).
    """
    shards = list(shards_of(tensors, SHARD_BYTES))
    total, done = sum(tensor.bytes for tensor in tensors.values()), 0
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, {name: tensors[name].read() for name in names})
        index |= dict.fromkeys(names, file)
        done += sum(tensors[name].bytes for name in names)
        progress(done, total)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def shards_of(tensors: Tensors, most: int) -> Iterator[list[str]]:
    """Names of tensors, in their order, for files of at most `most` bytes; a larger tensor has a file of its own."""
    shard: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.bytes > most:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.bytes
    yield shard


def _write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors refuses tensors that share memory: views of something larger are copied.
    separate: dict[str, torch.Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        is_separate = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in used
        separate[name] = tensor.contiguous() if is_separate else tensor.clone().contiguous()
        used.add(storage.data_ptr())
    try:
        save_file(separate, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(plain_message(error)) from None
    with open(path, "rb") as file:
        os.fsync(file.fileno())
