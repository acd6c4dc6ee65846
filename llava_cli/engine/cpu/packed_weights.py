"""Weights in the order in which this CPU's kernels read them: packed once, then mapped from files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llava_cli import cache_files
from llava_cli.hardware import allocator
from llava_cli.safetensors_header import read_header

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit import Layout

FORMAT = 1
"""Changes with the order of weights, or with the names of tensors in files."""
_NAMES_IN_FILES = {"codebook": "codes", "row_scale": "worth", "q_weight": "whole"}
"""Tensors that format 1 has under other names."""
_DTYPES = {"uint8": "U8", "int8": "I8", "float16": "F16", "float32": "F32"}
"""torch's names of dtypes -> those of safetensors."""
_ALIGNMENT = 64
"""Bytes. A processor reads tensors that begin elsewhere at half the speed."""
_CHUNK = 1 << 20


class PackedTensors(dict[str, "torch.Tensor"]):
    """Tensors by name. Those of a file enter memory as they are used, and can be released again."""

    def __init__(self, tensors: dict[str, torch.Tensor], file: torch.Tensor | None = None) -> None:
        super().__init__(tensors)
        self._file = file

    @classmethod
    def map_file(cls, path: Path, layout: Layout) -> PackedTensors:
        """Maps a file that `_write` has written.

        Raises `OSError`, also where another user may have written it, and `ValueError` where it is not of `layout`.
        """
        import torch

        cache_files.check(path)
        header = read_header(path)
        expected = {_name_in_file(name): (_dtype_name(dtype), shape) for name, (dtype, shape) in layout.items()}
        if {name: (entry.dtype, entry.shape) for name, entry in header.items()} != expected:
            raise ValueError(f"{path} has other tensors")
        tensors = {}
        try:
            # Private and never written to: changes would be lost with the pages that are released.
            file = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            for name, (dtype, shape) in layout.items():
                entry = header[_name_in_file(name)]
                tensors[name] = file[entry.begin : entry.end].view(dtype).view(shape)
        except RuntimeError as error:  # deleted meanwhile, or with offsets that the dtype does not allow
            raise ValueError(f"{path} is damaged") from error
        return cls(tensors, file)

    def release_pages(self) -> None:
        """Drops what is mapped from this process's memory; the system keeps it cached while it has memory to spare."""
        if self._file is not None:
            allocator.release_pages(self._file.data_ptr(), self._file.nbytes)


class PackedWeightStore:
    """Packed weights, one file a layer in a folder beside a quantized copy; in memory where there is no such folder."""

    def __init__(self, copy: Path | None = None) -> None:
        self.on_disk = copy is not None
        self._folder = copy and copy / f"arranged-{FORMAT}"

    def load_or_pack(self, name: str, layout: Layout, pack: Callable[[], dict[str, torch.Tensor]]) -> PackedTensors:
        """The tensors of this name, of this layout; `pack` makes them where no file has them yet."""
        if not self._folder:
            return PackedTensors(pack())
        path = self._folder / f"{name}.safetensors"
        with suppress(OSError, ValueError):
            return PackedTensors.map_file(path, layout)
        tensors = PackedTensors(pack())
        try:
            cache_files.make_folder(self._folder)
            size = sum(tensor.nbytes for tensor in tensors.values())
            if shutil.disk_usage(self._folder).free < size + cache_files.DISK_RESERVE:
                return tensors
            _write(tensors, path)
            return PackedTensors.map_file(path, layout)  # of which memory only holds what is used
        except (OSError, ValueError):
            return tensors


def _name_in_file(name: str) -> str:
    return _NAMES_IN_FILES.get(name, name)


def _dtype_name(dtype: torch.dtype) -> str:
    return _DTYPES[str(dtype).removeprefix("torch.")]


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file whose tensors are aligned."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        begin = end + -end % _ALIGNMENT
        end = begin + tensor.nbytes
        entry = {"dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [begin, end]}
        entries[_name_in_file(name)] = entry
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    cache_files.atomic_write(path, _file_bytes(header, tensors))


def _file_bytes(header: bytes, tensors: dict[str, torch.Tensor]) -> Iterator[bytes]:
    import torch

    yield len(header).to_bytes(8, "little") + header
    end = 0
    for tensor in tensors.values():
        yield bytes(-end % _ALIGNMENT)
        end += -end % _ALIGNMENT + tensor.nbytes
        for chunk in torch.split(tensor.contiguous().view(-1).view(torch.uint8), _CHUNK):
            yield chunk.numpy().tobytes()
