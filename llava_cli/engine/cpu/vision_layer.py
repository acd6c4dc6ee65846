"""A vision tower's layers in few operations, on a CPU: those of CLIP and of SigLIP.

Around its products a layer of the built-in model's tower takes as long as in them, one of CLIP-L/336 a tenth of that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.attention import attend
from llava_cli.engine.cpu.decoder import Group, Join
from llava_cli.engine.cpu.decoder_passes import bound, task_of
from llava_cli.engine.cpu.jit import COLUMNS, WIDTH
from llava_cli.engine.cpu.jit.compiler import Kernel, compiled, kinds_here
from llava_cli.engine.cpu.quantized_linear import Room

if TYPE_CHECKING:
    import torch

_KINDS = ("CLIPEncoderLayer", "SiglipEncoderLayer")
ACTIVATIONS = {"quick_gelu": (1.702, 0.0), "gelu_pytorch_tanh": (1.5957691216057308, 0.07135481282052137)}
"""x is multiplied by the sigmoid of so many x and x^3; 1 + tanh(y) is twice that of 2 y."""


def suits(layer: Any) -> bool:
    """Whether it is one of those, and kernels for it are there on this CPU."""
    import torch

    if type(layer).__name__ not in _KINDS or not kinds_here():
        return False
    norm, known = layer.layer_norm1, layer.mlp.config.hidden_act in ACTIVATIONS
    known = known and norm.weight.dtype in (torch.bfloat16, torch.float32) and norm.weight.device.type == "cpu"
    return bool(known and len(norm.weight) % COLUMNS == layer.mlp.fc1.out_features % WIDTH == 0)


class TowerLayer:
    """In place of a layer's forward pass: [pictures, patches, hidden size] -> like it."""

    def __init__(self, layer: Any, join: Join) -> None:
        its, mlp = layer.self_attn, layer.mlp
        self._plain, self._attention, self._norms = layer.forward, its, (layer.layer_norm1, layer.layer_norm2)
        self._sources, self._out = Group([its.q_proj, its.k_proj, its.v_proj], join), Group([its.out_proj], join)
        self._first, self._second = Group([mlp.fc1], join), Group([mlp.fc2], join)
        self._gelu = ACTIVATIONS[mlp.config.hidden_act]

    def __call__(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        if attention_mask is not None or hidden_states.dtype != self._norms[0].weight.dtype:
            return self._plain(hidden_states, attention_mask=attention_mask, **options)
        (*shape, size), its, room = hidden_states.shape, self._attention, Room()
        x = hidden_states.contiguous()
        whole, read, more, sources, inner = (
            x.new_empty(*shape, numbers) for numbers in (size, size, size, 3 * size, *self._first.outputs)
        )

        def multiply(group: Group, given: torch.Tensor, out: torch.Tensor) -> None:
            for call in bound(group, given, out, room):
                call()

        self._norm(self._norms[0], x, read)
        multiply(self._sources, read, sources)
        query, key, value = sources.view(*shape, 3, its.num_heads, -1).permute(2, 0, 3, 1, 4)
        found, _ = attend(its, query, key, value, None, its.scale, is_causal=False)
        multiply(self._out, found.flatten(2), more)
        self._norm(self._norms[1], x, read, more, whole)
        multiply(self._first, read, inner)
        self._activate(inner)
        multiply(self._second, inner, more)
        return whole.add_(more)

    def _norm(
        self,
        norm: torch.nn.LayerNorm,
        x: torch.Tensor,
        out: torch.Tensor,
        more: torch.Tensor | None = None,
        whole: torch.Tensor | None = None,
    ) -> None:
        import torch

        from llava_cli.engine.cpu.jit.vision_ops import NormTask, write_norm

        tensors, size = {"x": x, "weight": norm.weight.data, "bias": norm.bias.data, "out": out}, x.shape[-1]
        if more is not None and whole is not None:
            tensors |= {"more": more, "whole": whole}
        layout = dict.fromkeys(tensors, (x.dtype, tuple(x.shape)))
        layout |= dict.fromkeys(("weight", "bias"), (x.dtype, (size,)))
        task = task_of(NormTask, tensors, layout, tokens=x.shape[:-1].numel(), width=size)
        in_bf16 = x.dtype == torch.bfloat16
        Kernel(compiled(write_norm, kinds_here()[0], in_bf16, norm.eps, more is not None), task)()

    def _activate(self, inner: torch.Tensor) -> None:
        import torch

        from llava_cli.engine.cpu.jit.vision_ops import GeluTask, write_gelu

        layout = {"x": (inner.dtype, tuple(inner.shape))}
        task = task_of(GeluTask, {"x": inner}, layout, tokens=inner.shape[:-1].numel(), width=inner.shape[-1])
        Kernel(compiled(write_gelu, kinds_here()[0], inner.dtype == torch.bfloat16, *self._gelu), task)()
