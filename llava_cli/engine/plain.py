"""Linear layers with weights in bf16, for one token."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine.kernels import COLUMNS, ROWS
from llava_cli.engine.kernels.compiled import compiled, kinds_here, threads_for

if TYPE_CHECKING:
    import torch


class Plain:
    """A layer that reads its weights as fast as memory gives them: oneDNN reads bf16 at two thirds of that."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        import torch

        self._plain, self._weight = layer.forward, layer.weight.data
        none = torch.zeros(layer.out_features, dtype=torch.float32, device="cpu")
        self._bias = none if layer.bias is None else layer.bias.data.float()

    @classmethod
    def of(cls, layer: Any) -> Plain | None:
        """None where there is none for such a layer, on this CPU."""
        import torch

        if type(layer) is not torch.nn.Linear or not kinds_here() or layer.weight.device.type != "cpu":
            return None
        known = layer.weight.dtype == torch.bfloat16 and layer.weight.is_contiguous()
        return cls(layer) if known and layer.out_features % ROWS == layer.in_features % COLUMNS == 0 else None

    def bound(self, x: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
        """Writes to `out` [1, outputs] what becomes of `x` [1, inputs] at the time that it is called."""

        from llava_cli.engine.kernels.rows import Task, write

        rows, columns = self._weight.shape
        tensors = {"x": x, "out": out, "weights": self._weight, "bias": self._bias}
        places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        task = Task(**places, rows=rows, columns=columns, threads=threads_for(rows * columns))
        task.tensors = tensors  # as long as it is told where they are
        return partial(compiled(write, kinds_here()[0], True), byref(task))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]"""
        if x.numel() != self._weight.shape[1] or x.dtype != self._weight.dtype:
            many: torch.Tensor = self._plain(x)
            return many
        given = x.contiguous()
        out = given.new_empty(*x.shape[:-1], len(self._weight))
        self.bound(given, out)()
        return out
