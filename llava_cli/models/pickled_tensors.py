"""Reads tensors from torch's own files (`.bin`), which are pickles, with `weights_only=True`: it runs no code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llava_cli.errors import LlavaError, ModelUnusable, message_line
from llava_cli.regular_files import open_regular

if TYPE_CHECKING:
    import torch

_ZIP_MAGIC = b"PK\x03\x04"


def read_tensors(name: str, path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file of the model `name`, by their names; most are memory-mapped.

    Raises `ModelUnusable` if it is damaged, holds anything but tensors, or would run code.
    """
    import torch

    try:
        with open_regular(path) as file:
            is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC  # files of torch before 1.6 cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except MemoryError:
        raise
    except Exception as error:
        raise _unusable(name, path, error) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tensors.items()
    ):
        raise ModelUnusable(name, f"{path.name} does not hold tensors by name", "take a copy in safetensors")
    return tensors


def _unusable(name: str, path: Path, error: Exception) -> LlavaError:
    import pickle

    words = "is damaged or cut off"
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        words = "is a pickle with more than tensors in it, which is never run"
    elif isinstance(error, OSError):
        words = f"cannot be read ({message_line(error)})"
    return ModelUnusable(name, f"{path.name} {words}", "take a copy in safetensors")
