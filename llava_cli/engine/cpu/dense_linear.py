"""Linear layers with weights as a checkpoint has them, for few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.jit import COLUMNS, FEW, ROWS
from llava_cli.engine.cpu.jit.compiler import Kernel, addresses, compiled, kinds_here, threads_for

if TYPE_CHECKING:
    import torch


class Plain:
    """A layer that reads its weights as fast as memory gives them: oneDNN reads bf16 at two thirds of that.

    What it makes of a token does not depend on those beside it.
    """

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
        known = layer.weight.dtype in (torch.bfloat16, torch.float32) and layer.weight.is_contiguous()
        return cls(layer) if known and layer.out_features % ROWS == layer.in_features % COLUMNS == 0 else None

    def bound(self, x: torch.Tensor, out: torch.Tensor) -> Kernel:
        """Writes to `out` [tokens, outputs] what becomes of `x` [tokens, inputs], in one piece, when it is called."""
        import torch

        from llava_cli.engine.cpu.jit.dense_gemv import Task, write

        tokens, dtype, (rows, columns) = len(x), self._weight.dtype, self._weight.shape
        tensors = {"x": x, "out": out, "weights": self._weight, "bias": self._bias}
        layout = {
            "x": (dtype, (tokens, columns)),
            "out": (dtype, (tokens, rows)),
            "weights": (dtype, (rows, columns)),
            "bias": (torch.float32, (rows,)),
        }
        places = addresses(tensors, layout, strided=("out",))
        threads = threads_for(tokens * rows * columns)
        task = Task(**places, tokens=tokens, apart=out.stride(0), rows=rows, columns=columns, threads=threads)
        return Kernel(compiled(write, kinds_here()[0], x.dtype == torch.bfloat16), task, tensors)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]"""
        if x.numel() > FEW * self._weight.shape[1] or x.dtype != self._weight.dtype:
            many: torch.Tensor = self._plain(x)
            return many
        given = x.reshape(-1, x.shape[-1]).contiguous()
        out = given.new_empty(len(given), len(self._weight))
        self.bound(given, out)()
        return out.view(*x.shape[:-1], -1)
