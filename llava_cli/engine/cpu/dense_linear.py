"""Linear layers with weights in bf16 or fp32, as a checkpoint has them, for few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.jit import GEMV_ROWS, MAX_DECODE_ROWS, VECTOR_COLUMNS
from llava_cli.engine.cpu.jit.compiler import Kernel, KernelLaunch, Run, addresses, supported_isas, threads_for

if TYPE_CHECKING:
    import torch


def gemv_kernel(bf16: bool) -> Kernel:
    from llava_cli.engine.cpu.jit.dense_gemv import build

    return Kernel(build, bf16, _self_test)


class DenseGemv:
    """A layer that reads its weights as fast as memory delivers them: oneDNN reads bf16 at two thirds of that.

    Its result for a token does not depend on the tokens beside it.
    """

    def __init__(self, layer: torch.nn.Linear) -> None:
        import torch

        self._original_forward, self._weight = layer.forward, layer.weight.data
        no_bias = torch.zeros(layer.out_features, dtype=torch.float32, device="cpu")
        self._bias = no_bias if layer.bias is None else layer.bias.data.float()

    @classmethod
    def for_layer(cls, layer: Any) -> DenseGemv | None:
        """None where the kernel does not suit the layer, or this CPU has none."""
        import torch

        if type(layer) is not torch.nn.Linear or not supported_isas() or layer.weight.device.type != "cpu":
            return None
        known = layer.weight.dtype in (torch.bfloat16, torch.float32) and layer.weight.is_contiguous()
        aligned = layer.out_features % GEMV_ROWS == layer.in_features % VECTOR_COLUMNS == 0
        return cls(layer) if known and aligned else None

    def bind(self, x: torch.Tensor, out: torch.Tensor) -> KernelLaunch:
        """What computes x [tokens, in_features], contiguous -> out [tokens, out_features], which may have a stride."""
        import torch

        from llava_cli.engine.cpu.jit.dense_gemv import KernelArgs

        tokens, dtype, (rows, columns) = len(x), self._weight.dtype, self._weight.shape
        tensors = {"x": x, "out": out, "weight": self._weight, "bias": self._bias}
        layout = {
            "x": (dtype, (tokens, columns)),
            "out": (dtype, (tokens, rows)),
            "weight": (dtype, (rows, columns)),
            "bias": (torch.float32, (rows,)),
        }
        sizes = {"tokens": tokens, "out_stride": out.stride(0), "rows": rows, "columns": columns}
        threads = threads_for(tokens * rows * columns)
        args = KernelArgs(**addresses(tensors, layout, strided=("out",)), **sizes, threads=threads)
        return KernelLaunch(gemv_kernel(dtype == torch.bfloat16), args, tensors)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]"""
        if x.numel() > MAX_DECODE_ROWS * self._weight.shape[1] or x.dtype != self._weight.dtype:
            result: torch.Tensor = self._original_forward(x)
            return result
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        out = tokens.new_empty(len(tokens), len(self._weight))
        self.bind(tokens, out)()
        return out.view(*x.shape[:-1], -1)


def _self_test(kernel: Kernel, run: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    from llava_cli.engine.cpu.jit.dense_gemv import reference

    tokens, rows, columns = 7, 3 * GEMV_ROWS, 2 * VECTOR_COLUMNS
    layer = torch.nn.Linear(columns, rows, device="meta")
    layer.weight = torch.nn.Parameter(kernel.sample(rows, columns))
    layer.bias = torch.nn.Parameter(kernel.sample(rows))
    x = kernel.sample(tokens, columns)
    out = torch.empty(tokens, rows, dtype=x.dtype, device="cpu")
    DenseGemv(layer).bind(x, out).run_as(run)
    yield out, reference(x, layer.weight, layer.bias)
