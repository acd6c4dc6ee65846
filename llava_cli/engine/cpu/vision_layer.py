"""A vision tower's layers on a CPU, those of CLIP and of SigLIP, with few operations around their matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.attention import attend
from llava_cli.engine.cpu.jit.compiler import supported_isas
from llava_cli.engine.cpu.projection import FuseLinear, Projection
from llava_cli.engine.cpu.quantized_linear import Workspace

if TYPE_CHECKING:
    import torch

_CLASSES = ("CLIPEncoderLayer", "SiglipEncoderLayer")
_GELU = {"quick_gelu": (1.702, 0.0), "gelu_pytorch_tanh": (1.5957691216057308, 0.07135481282052137)}
"""Activation -> (a, b) of x * sigmoid(a * x + b * x**3). (1 + tanh(y)) / 2 is sigmoid(2 * y)."""
_ROWS_AT_ONCE = 64
"""Rows of activations that stay in a core's cache in fp32."""


def suits(layer: Any) -> bool:
    """Whether a layer is one of those, and this CPU has kernels."""
    import torch

    if type(layer).__name__ not in _CLASSES or not supported_isas():
        return False
    weight = layer.layer_norm1.weight
    known = weight.dtype in (torch.bfloat16, torch.float32) and weight.device.type == "cpu"
    return known and bool(layer.mlp.config.hidden_act in _GELU)


class VisionLayer:
    """Replaces a layer's `forward`: [images, patches, hidden_size] -> like it."""

    def __init__(self, layer: Any, fuse: FuseLinear) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._original_forward, self._attention = layer.forward, attention
        self._norm1, self._norm2 = layer.layer_norm1, layer.layer_norm2
        self._qkv_proj = Projection([attention.q_proj, attention.k_proj, attention.v_proj], fuse)
        self._out_proj = Projection([attention.out_proj], fuse)
        self._fc1, self._fc2 = Projection([mlp.fc1], fuse), Projection([mlp.fc2], fuse)
        self._gelu = _GELU[mlp.config.hidden_act]

    def __call__(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        import torch

        if attention_mask is not None or hidden_states.dtype != self._norm1.weight.dtype:
            return self._original_forward(hidden_states, attention_mask=attention_mask, **options)
        with torch.no_grad():  # kernels have no gradients
            return self._forward(hidden_states)

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        workspace, attention = Workspace(), self._attention

        def project(projection: Projection, x: torch.Tensor) -> torch.Tensor:
            out = x.new_empty(*x.shape[:-1], sum(projection.out_features))
            for launch in projection.bind(x, out, workspace):
                launch()
            return out

        qkv = project(self._qkv_proj, _norm(self._norm1, hidden_states))
        query, key, value = qkv.view(*qkv.shape[:-1], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn_out, _ = attend(attention, query, key, value, None, attention.scale, is_causal=False)
        residual = hidden_states + project(self._out_proj, attn_out.flatten(2))
        ffn_hidden = project(self._fc1, _norm(self._norm2, residual))
        _gelu(ffn_hidden, *self._gelu)
        return residual.add_(project(self._fc2, ffn_hidden))


def _norm(norm: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """In fp32, and rounded once."""
    from torch.nn.functional import layer_norm

    return layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps).to(x.dtype)


def _gelu(x: torch.Tensor, linear: float, cubic: float) -> None:
    """In place, computed in fp32 and rounded once, a few rows at a time."""
    import torch

    for rows in torch.split(x.flatten(end_dim=-2), _ROWS_AT_ONCE):
        fp32 = rows.float()
        gate = fp32.square().mul_(cubic).add_(linear).mul_(fp32).sigmoid_()
        rows.copy_(gate.mul_(fp32))
