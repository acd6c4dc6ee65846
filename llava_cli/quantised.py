"""Quantised copies of checkpoints: quantising takes minutes, and is done once.

A copy is a folder in the user's cache that transformers loads like any checkpoint. Its name says what it was made of
and how, so that another version of the weights, or other settings, have another one. All of it can be deleted at any
time: it is made again when it is wanted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli.checkpoint import check_weights, fingerprint
from llava_cli.errors import ModelUnusable
from llava_cli.registry import Checkpoint, quantised_cache

if TYPE_CHECKING:
    import torch

FORMAT = 1
"""Changes with which layers are quantised, or how."""
SHARD = "500MB"
"""Files are no larger: each stands in memory once more while it is written."""
_SPARE = 1 << 30  # bytes that the disk keeps


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
        if shutil.disk_usage(path.parent).free < size + _SPARE:
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


class Arranged:
    """Tensors in the order in which this processor multiplies them: made once, and then mapped from files.

    They stand in a folder beside a copy's weights, one file for each name; or in memory, without a folder.
    """

    def __init__(self, copy: Path | None = None) -> None:
        self._folder = copy and copy / f"arranged-{_processor()}"

    def __call__(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors of that name; `make` makes them where there are none."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not self._folder:
            return make()
        path = self._folder / f"{name}.safetensors"
        with suppress(OSError, SafetensorError):
            return load_file(path)
        tensors, new = make(), path.with_suffix(f".{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder).free < sum(part.nbytes for part in tensors.values()) + _SPARE:
                return tensors
            _write(tensors, new)
            os.rename(new, path)
            return load_file(path)  # of which no more is in memory than is used
        except OSError:
            return tensors
        finally:
            new.unlink(missing_ok=True)


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """As safetensors, but with all numbers at multiples of 64 bytes: else a processor reads them at half the speed."""
    import torch

    names = {torch.uint8: "U8", torch.int8: "I8", torch.bfloat16: "BF16", torch.float32: "F32"}
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # a file that lost power would be whole by its size, and full of zeros


def _processor() -> str:
    """What the order of weights depends on."""
    from importlib.metadata import version

    import torch

    able = {"bf16": torch.cpu._is_avx512_bf16_supported(), "vnni": torch.cpu._is_vnni_supported()}
    return "-".join([version("bitsandbytes"), *(name for name, has in able.items() if has)])


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
