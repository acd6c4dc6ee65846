"""Tensors of torch's own files (`.bin`), which are pickles: read by torch's reader of weights, which runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llava_cli.errors import LlavaError, ModelUnusable, brief
from llava_cli.regular_files import open_regular

if TYPE_CHECKING:
    import torch

_ZIP = b"PK\x03\x04"


def read_tensors(name: str, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of a model's, by name; the pages of most come into memory as they are used.

    Raises `ModelUnusable` where it is damaged, holds anything but tensors, or would run code.
    """
    import torch

    try:
        with open_regular(path) as file:
            mapped = file.read(len(_ZIP)) == _ZIP  # files of torch before 1.6 cannot be
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:
        raise _unusable(name, path, error) from None
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in found.items()
    ):
        raise ModelUnusable(name, f"{path.name} does not hold tensors by name", "take a copy in safetensors")
    return found


def _unusable(name: str, path: Path, error: Exception) -> LlavaError:
    import pickle

    words = "is damaged or cut off"
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        words = "is a pickle with more than tensors in it, which is never run"
    elif isinstance(error, OSError):
        words = f"cannot be read ({brief(error)})"
    return ModelUnusable(name, f"{path.name} {words}", "take a copy in safetensors")
