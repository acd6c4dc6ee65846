"""Reads the header of a safetensors file, and checks it for consistency.

The format is 8 bytes of header length (little-endian), the header in JSON, then the tensors' bytes:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava_cli import limits
from llava_cli.bounded_json import Bounds, Scanner
from llava_cli.regular_files import open_regular

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_LARGEST_SIZE = 2**63 - 1


class BadHeader(ValueError):
    """A file has no header, an inconsistent one, or another size than the header says."""


class StoredTensor(NamedTuple):
    """A tensor in a file, which occupies the bytes [begin, end)."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numbers(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class Header(dict[str, StoredTensor]):
    """The tensors of a file by name, and its metadata."""

    def __init__(self, tensors: Mapping[str, StoredTensor], metadata: dict[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = metadata


def read_header(path: Path) -> Header:
    """The header of a file. Raises `BadHeader`, and `OSError` if it cannot be read."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, limits.HEADER_BYTES):
            raise BadHeader("no safetensors header")
        text = file.read(length)
    header = _parse(text)
    metadata = _check_metadata(header.pop("__metadata__", {}))
    tensors = {name: _tensor(entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin < end:
            raise BadHeader("tensors overlap")
        end = tensor.end
    if end != size:
        raise BadHeader("cut off, or too long")
    return Header(tensors, metadata)


def _parse(text: bytes) -> dict[str, Any]:
    """The JSON of a header, within bounds."""
    try:
        Scanner(Bounds(limits.HEADER_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)).feed(text)
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except ValueError as error:
        raise BadHeader("no safetensors header") from error
    if not isinstance(header, dict):
        raise BadHeader("no safetensors header")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):  # another reader may take the other one
        raise BadHeader("a name that is there twice")
    return members


def _check_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadHeader("metadata that are no texts")
    return metadata


def _tensor(entry: Any, data_start: int) -> StoredTensor:
    """The tensor that an entry describes; its offsets count from byte `data_start`."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadHeader("an entry that describes no tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS or not _are_sizes(shape) or not _are_sizes(offsets):
        raise BadHeader("an entry that describes no tensor")
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != _element_count(shape) * _BITS[dtype]:
        raise BadHeader("a shape that its bytes do not have")
    return StoredTensor(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(numbers: Any) -> bool:
    """Whether a value is a list of sizes; `type`, because True is an int for Python."""
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number <= _LARGEST_SIZE for number in numbers)


def _element_count(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
        if product > _LARGEST_SIZE:
            raise BadHeader("a shape that no tensor has")
    return product
