"""Checks the files of a checkpoint's weights by their headers, before a tensor is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from llava_cli import limits
from llava_cli.errors import ModelUnusable
from llava_cli.models import incomplete, other_formats
from llava_cli.models.checkpoint_files import pull_command, read_json, unreadable
from llava_cli.models.geometry import geometry_of_tensors
from llava_cli.models.registry import Checkpoint
from llava_cli.regular_files import NotRegular
from llava_cli.safetensors_header import BadHeader, Header, read_header
from llava_cli.untrusted_text import one_line

_SINGLE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLE = r"(pytorch_model|model|consolidated|weights)\b.*\.(bin|pt|pth|ckpt)"
"""Weights as torch saves them."""
_SCALES = (".absmax", ".nested_absmax", ".SCB")
"""Endings of the tensors that bitsandbytes stores beside a layer's weights."""
_FLOATS = {"F32", "F16", "BF16"}
_WEIGHTS_PER_VALUE = {"U8": 2, "F4": 2}
"""Weights in one stored value: two of 4 bits in a byte."""


class Weights(list[Path]):
    """The weight files of a checkpoint, and what their headers say."""

    def __init__(self, paths: Iterable[Path], headers: Iterable[Header] = ()) -> None:
        super().__init__(paths)
        headers = list(headers)
        tensors = {name: tensor for header in headers for name, tensor in header.items()}
        dtypes = {tensor.dtype for tensor in tensors.values()}
        self.float_dtypes = dtypes & _FLOATS
        """By their names in safetensors."""
        self.bytes_per_weight = 4.0 if dtypes == {"F32"} else 2.0
        """In the files."""
        self.are_quantized = bool(dtypes & {"U8", "I8"}) and any(name.endswith(_SCALES) for name in tensors)
        """By bitsandbytes."""
        self.are_of_mlx = any(header.metadata.get("format") == "mlx" for header in headers)
        """Whether MLX wrote them: it has some axes in another order."""
        packed = {name.removesuffix(_SCALES[0]) for name in tensors if name.endswith(_SCALES[0])}
        self.stored_precision = ("4bit" if packed else "8bit") if self.are_quantized else None
        """In which bitsandbytes has stored them."""
        counts = {
            name: 2 * (tensor.end - tensor.begin)
            if name in packed
            else tensor.numbers * _WEIGHTS_PER_VALUE.get(tensor.dtype, 1)
            for name, tensor in tensors.items()
        }
        self.numbers = sum(counts.values())
        """The number of weights."""
        self.geometry = geometry_of_tensors(tensors, counts)


def check_weights(checkpoint: Checkpoint) -> Weights:
    """The weight files of a checkpoint. Raises `ModelUnusable`, which names a file that is missing or damaged."""
    paths = _weight_paths(checkpoint)
    if unfinished := next((path.name for path in paths if path.with_name(f"{path.name}.aria2").exists()), None):
        raise ModelUnusable(checkpoint.name, f"the download of {one_line(unfinished)} has not ended", "end it first")
    return Weights(paths, [_header(checkpoint, path) for path in paths])


def _header(checkpoint: Checkpoint, path: Path) -> Header:
    try:
        return read_header(path)
    except NotRegular as error:
        raise unreadable(checkpoint, path.name, error) from None
    except (OSError, BadHeader):
        words = f"{path.name} is damaged or cut off"
        raise ModelUnusable(checkpoint.name, words, pull_command(checkpoint.name)) from None


def _weight_paths(checkpoint: Checkpoint) -> list[Path]:
    """The files that transformers would load: a single file has precedence over shards."""
    name, folder = checkpoint.name, checkpoint.folder
    paths = [folder / _SINGLE_FILE]
    if not paths[0].exists() and (folder / _INDEX).exists():
        weight_map = read_json(checkpoint, _INDEX).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(shard, str) for shard in weight_map.values())
        ):
            raise ModelUnusable(name, f"{_INDEX} is damaged", pull_command(name))
        paths = [folder / _checked_shard_name(checkpoint, shard) for shard in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.exists():
            raise _missing_weights(checkpoint, path.name)
    return paths


def _missing_weights(checkpoint: Checkpoint, missing: str) -> ModelUnusable:
    """The error for a folder without one of its weight files, which names what is there instead."""
    name, folder = checkpoint.name, checkpoint.folder
    if missing == _SINGLE_FILE:
        if shards := sorted(folder.glob("model-*-of-*.safetensors")):
            words = f"{missing} is missing, and of the shards ({one_line(shards[0].name)} …) {_INDEX}"
            return incomplete.missing_file(checkpoint, words, pull_command(name))
        if pickle := next((file for file in sorted(os.listdir(folder)) if re.fullmatch(_PICKLE, file)), None):
            hint = "convert it to safetensors, or take another model"
            return ModelUnusable(name, f"{one_line(pickle)} is a pickle, which is never loaded", hint)
        if reason_and_hint := other_formats.describe_folder(os.listdir(folder), os.fspath(folder)):
            return ModelUnusable(name, *reason_and_hint)
    return incomplete.missing_file(checkpoint, f"{one_line(missing)} is missing", pull_command(name))


def _checked_shard_name(checkpoint: Checkpoint, name: str) -> str:
    """A shard's name, if it is a file name: an index could name any file on this machine. Raises `ModelUnusable`."""
    is_file_name = len(name) <= limits.NAME_CHARACTERS and not any(character in name for character in "/\\\0")
    if not is_file_name or name.startswith(".") or not name.endswith(".safetensors"):
        words = f"{_INDEX} names {one_line(name)!r}, which is not a safetensors file in its folder"
        raise ModelUnusable(checkpoint.name, words, pull_command(checkpoint.name))
    return name
