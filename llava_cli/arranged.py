"""Weights in the order in which this processor multiplies them: made once, and then mapped from files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llava_cli.checkpoint import header
from llava_cli.memory import forget
from llava_cli.quantised import SPARE

if TYPE_CHECKING:
    import torch

LAYOUT = 1
"""Changes with the order."""
_KINDS = {"U8": "uint8", "I8": "int8", "F16": "float16", "F32": "float32"}
"""Of numbers: safetensors' names and torch's."""


class Tensors(dict[str, "torch.Tensor"]):
    """Tensors by name. Those of a file come into memory as they are used, and out of it when they are let go."""

    def __init__(self, tensors: dict[str, torch.Tensor], file: torch.Tensor | None = None) -> None:
        super().__init__(tensors)
        self._file = file

    @classmethod
    def of(cls, path: Path) -> Tensors:
        """Those of a file that `_write` has written. Raises `OSError`, and `ValueError` where it is damaged."""
        import torch

        size = path.stat().st_size
        try:
            names, begin = header(path)
            # Private, and never written to: what were written would be lost with what is let go.
            file = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            numbers, tensors = file[begin:], {}
            for name, its in names.items():
                part = numbers[slice(*its["data_offsets"])]
                tensors[name] = part.view(getattr(torch, _KINDS[its["dtype"]])).view(its["shape"])
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
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

    def __call__(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> Tensors:
        """The tensors of that name; `make` makes them where there are none."""
        if not self._folder:
            return Tensors(make())
        path = self._folder / f"{name}.safetensors"
        with suppress(OSError, ValueError):
            return Tensors.of(path)
        tensors, new = Tensors(make()), path.with_suffix(f".{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder).free < sum(part.nbytes for part in tensors.values()) + SPARE:
                return tensors
            _write(tensors, new)
            os.rename(new, path)
            return Tensors.of(path)  # of which no more is in memory than is used
        except (OSError, ValueError):
            return tensors
        finally:
            new.unlink(missing_ok=True)


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Like safetensors, but with numbers at multiples of 64 bytes: else a processor reads them at half the speed."""
    import torch

    kinds, names, end = {getattr(torch, kind): name for name, kind in _KINDS.items()}, {}, 0
    for name, tensor in tensors.items():
        begin = end + -end % 64
        end = begin + tensor.nbytes
        names[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(names).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(bytes(-file.tell() % 64))
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())  # a file that lost power would be whole by its size, and full of zeros
