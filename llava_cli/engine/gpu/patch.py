"""What a GPU does faster than transformers would; the only way into this package.

accelerate(model, patch)      # once its weights are on the card; `patch.undo()` takes it back
describe(model)               # how it makes tokens, in words
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_cli.engine.gpu.decode_graphs import DecodeGraphs, obstacle, uses_torchs_attention

if TYPE_CHECKING:
    from llava_cli.engine.model_patch import ModelPatch

__all__ = ["accelerate", "describe"]


def accelerate(model: Any, patch: ModelPatch) -> None:
    """Makes tokens by a step that is captured where that is possible, else in the same fixed buffers."""
    import torch

    from llava_cli.engine.gpu.cuda import cuda_capture

    # On an H100 and later torch prefers cuDNN's attention, which makes a plan for each new length: 30 ms a token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if model.dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False  # who asks for 32 bits wants them in convolutions, too
    if not uses_torchs_attention(model):
        return
    problem = obstacle(model)
    graphs = DecodeGraphs(model, None if problem else cuda_capture())
    graphs.problem = problem
    patch.set_attribute(model, "decode_graphs", graphs)


def describe(model: Any) -> str:
    """Whether steps are captured, and in how many shapes; or that they are launched kernel by kernel, and why."""
    graphs: DecodeGraphs | None = getattr(model, "decode_graphs", None)
    if graphs is None:
        return "launched kernel by kernel: as transformers does"
    if graphs.problem:
        return f"launched kernel by kernel: {graphs.problem}"
    shapes = f"{graphs.captured} shape{'s' * (graphs.captured > 1)}"
    return f"captured, {shapes}" if graphs.captured else "captured after a few tokens"
