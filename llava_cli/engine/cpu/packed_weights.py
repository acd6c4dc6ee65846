"""Weights in the order in which this processor multiplies them: made once, and then mapped from files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llava_cli import cache_files
from llava_cli.hardware.memory import forget
from llava_cli.models.quantized_cache import SPARE
from llava_cli.safetensors_header import read_header

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit import Layout

LAYOUT = 1
"""Changes with the order."""
_DTYPES = {"uint8": "U8", "int8": "I8", "float16": "F16", "float32": "F32"}
"""torch's names of number types, and those of safetensors."""
_PIECE = 1 << 20


class Tensors(dict[str, "torch.Tensor"]):
    """Tensors by name. Those of a file come into memory as they are used, and out of it when they are let go."""

    def __init__(self, tensors: dict[str, torch.Tensor], file: torch.Tensor | None = None) -> None:
        super().__init__(tensors)
        self._file = file

    @classmethod
    def of(cls, path: Path, layout: Layout) -> Tensors:
        """Those of a file that `_write` has written.

        Raises `OSError`, also where it may be another user's, and `ValueError` where its tensors are not of `layout`.
        """
        import torch

        cache_files.check(path)
        header = read_header(path)
        expected = {name: (_dtype_name(dtype), shape) for name, (dtype, shape) in layout.items()}
        if {name: (its.dtype, its.shape) for name, its in header.items()} != expected:
            raise ValueError(f"{path} has other tensors")
        try:
            # Private, and never written to: what were written would be lost with what is let go.
            file = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            tensors = {
                name: file[its.begin : its.end].view(layout[name][0]).view(its.shape) for name, its in header.items()
            }
        except RuntimeError as error:  # gone by now, or not at places that numbers may begin at
            raise ValueError(f"{path} is damaged") from error
        return cls(tensors, file)

    def let_go(self) -> None:
        """Takes what is mapped out of this process' memory; the system keeps it as long as it has room."""
        if self._file is not None:
            forget(self._file.data_ptr(), self._file.nbytes)


class Arranged:
    """Tensors in the order in which this processor multiplies them: made once, and then mapped from files.

    They stand in a folder beside a copy's weights, one file for each name; or in memory, without a folder.
    """

    def __init__(self, copy: Path | None = None) -> None:
        self.kept = copy is not None
        self._folder = copy and copy / f"arranged-{LAYOUT}"

    def __call__(self, name: str, layout: Layout, make: Callable[[], dict[str, torch.Tensor]]) -> Tensors:
        """The tensors of that name, of this layout; `make` makes them where there are none."""
        if not self._folder:
            return Tensors(make())
        path = self._folder / f"{name}.safetensors"
        with suppress(OSError, ValueError):
            return Tensors.of(path, layout)
        tensors = Tensors(make())
        try:
            cache_files.make_folder(self._folder)
            if shutil.disk_usage(self._folder).free < sum(part.nbytes for part in tensors.values()) + SPARE:
                return tensors
            _write(tensors, path)
            return Tensors.of(path, layout)  # of which no more is in memory than is used
        except (OSError, ValueError):
            return tensors


def _dtype_name(dtype: torch.dtype) -> str:
    return _DTYPES[str(dtype).removeprefix("torch.")]


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Like safetensors, but with numbers at multiples of 64 bytes: else a processor reads them at half the speed."""
    names, end = {}, 0
    for name, tensor in tensors.items():
        begin = end + -end % 64
        end = begin + tensor.nbytes
        names[name] = {"dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(names).encode()
    text += b" " * (-(8 + len(text)) % 64)
    cache_files.put(path, _bytes(text, tensors))


def _bytes(text: bytes, tensors: dict[str, torch.Tensor]) -> Iterator[bytes]:
    """A file's, in pieces."""
    import torch

    yield len(text).to_bytes(8, "little") + text
    end = 0
    for tensor in tensors.values():
        yield bytes(-end % 64)
        end += -end % 64 + tensor.nbytes
        for piece in torch.split(tensor.contiguous().view(-1).view(torch.uint8), _PIECE):
            yield piece.numpy().tobytes()
