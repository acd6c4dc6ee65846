"""Tokens through a decoder's layers, in buffers that all layers share: a prompt's, or one more token a row.

A 1B in 4 bits computes 30 ms for a token, in 22 layers. What Python and torch do around two dozen operations of each,
to make their outputs and to look at their inputs, was a fifth of that. Here there are about ten, most of them compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from llava_cli.engine.cpu.attention import attend
from llava_cli.engine.cpu.jit import Launch
from llava_cli.engine.cpu.projection import FuseLinear, Projection
from llava_cli.engine.cpu.quantized_linear import Workspace
from llava_cli.engine.kv_cache import RoomyCache, RoomyLayer
from llava_cli.hardware import allocator

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit.decode_attention import DecodeAttention

_TRIM_MIN_TOKENS = 64
"""Tokens from which a prompt takes long enough to return, layer by layer, what its keys and values have moved out of:
smaller holes than the next layer needs, as much in all as a talk has been so far."""


class DecoderLayer:
    """The parts of one of transformers' layers: two norms, four projections, and the sizes of its heads."""

    def __init__(self, layer: Any, fuse: FuseLinear) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention, self.index, self.scaling = attention, attention.layer_idx, attention.scaling
        self.input_norm, self.post_attention_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv_proj = Projection([attention.q_proj, attention.k_proj, attention.v_proj], fuse)
        self.o_proj = Projection([attention.o_proj], fuse)
        self.gate_up_proj = Projection([mlp.gate_proj, mlp.up_proj], fuse)
        self.down_proj = Projection([mlp.down_proj], fuse)
        self.head_dim = attention.head_dim
        self.heads, self.kv_heads = (size // self.head_dim for size in self.qkv_proj.out_features[:2])
        self.hidden_size, self.ffn_size = mlp.down_proj.out_features, mlp.down_proj.in_features


class Activations:
    """Buffers [rows * tokens, size] for what layers of one shape compute on the way."""

    def __init__(self, layer: DecoderLayer, rows: int, tokens: int, dtype: torch.dtype) -> None:
        import torch

        def buffer(size: int) -> torch.Tensor:
            return torch.empty(rows * tokens, size, dtype=dtype, device="cpu")

        heads, kv_heads, head_dim = layer.heads, layer.kv_heads, layer.head_dim
        self.rows, self.tokens = rows, tokens
        self.residual, self.residual_delta, self.normed = (buffer(layer.hidden_size) for _ in range(3))
        """The residual stream, what the last block adds to it, and the norm of their sum."""
        self.cos, self.sin = buffer(head_dim // 2), buffer(head_dim // 2)
        self.qkv, self.attn_out = buffer((heads + 2 * kv_heads) * head_dim), buffer(heads * head_dim)
        self.gate_up, self.ffn_hidden = buffer(2 * layer.ffn_size), buffer(layer.ffn_size)
        self._workspace = Workspace()

    def begin(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Starts with x [rows, tokens, hidden_size]; cos, sin [rows or 1, tokens, head_dim / 2]."""
        self.residual.view(x.shape).copy_(x)
        self.residual_delta.zero_()
        for buffer, angles in ((self.cos, cos), (self.sin, sin)):
            buffer.view(self.rows, self.tokens, -1).copy_(angles)

    def norm(self, norm: Any) -> Launch:
        """Adds residual_delta to residual, and norms that."""
        from llava_cli.engine.cpu.jit.decoder_ops import add_rms_norm

        return add_rms_norm(self.residual, self.residual_delta, norm.weight.data, self.normed, norm.variance_epsilon)

    def before_attention(self, layer: DecoderLayer) -> list[Launch]:
        return [self.norm(layer.input_norm), *self._project(layer.qkv_proj, self.normed, self.qkv)]

    def after_attention(self, layer: DecoderLayer) -> list[Launch]:
        from llava_cli.engine.cpu.jit.decoder_ops import swiglu

        return [
            *self._project(layer.o_proj, self.attn_out, self.residual_delta),
            self.norm(layer.post_attention_norm),
            *self._project(layer.gate_up_proj, self.normed, self.gate_up),
            swiglu(self.gate_up, self.ffn_hidden),
            *self._project(layer.down_proj, self.ffn_hidden, self.residual_delta),
        ]

    def _project(self, projection: Projection, x: torch.Tensor, out: torch.Tensor) -> list[Launch]:
        shape = self.rows, self.tokens, -1
        return projection.bind(x.view(shape), out.view(shape), self._workspace)


class DecodeStep:
    """One more token of each row through all layers and the final norm, every launch bound once for all steps.

    For one thread at a time; it uses as many threads as torch had when it was made.
    """

    def __init__(self, layers: list[DecoderLayer], norm: Any, rows: int) -> None:
        from llava_cli.engine.cpu.jit.decode_attention import DecodeAttention

        first = layers[0]
        self._buffers = buffers = Activations(first, rows, 1, norm.weight.dtype)
        grouped_out = buffers.attn_out.view(rows, first.kv_heads, first.heads // first.kv_heads, -1)
        # Shaped like the key that each layer's cache gets.
        self._new_key = buffers.qkv.view(rows, -1, 1, first.head_dim)[:, : first.kv_heads]
        self._attention: list[tuple[int, DecodeAttention]] = []
        self._launches: list[Launch] = []
        for layer in layers:
            attention = DecodeAttention(buffers.qkv, grouped_out, layer.scaling, (buffers.cos, buffers.sin))
            self._attention.append((layer.index, attention))
            self._launches += buffers.before_attention(layer)
            self._launches += [attention.launch, *buffers.after_attention(layer)]
        self._launches.append(buffers.norm(norm))

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: RoomyCache, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """x [rows, 1, hidden_size], cos and sin [rows or 1, 1, head_dim / 2] -> normed [rows, 1, hidden_size].

        `mask` [rows, cached tokens + 1] is True where a token is, and False for padding; None is all tokens.
        """
        tokens, buffers = cache.get_seq_length() + 1, self._buffers
        buffers.begin(x, cos, sin)
        for index, attention in self._attention:
            keys, values = cast("RoomyLayer", cache.layers[index]).grow(self._new_key, self._new_key)
            attention.attend_to(keys, values, tokens, mask)
        _run(self._launches)
        return buffers.normed.view(x.shape).clone()


def prefill(
    layers: list[DecoderLayer],
    norm: Any,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: RoomyCache,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Many tokens through all layers: x [rows, tokens, hidden_size] -> the last ones, normed [rows, 1, hidden_size].

    cos and sin [rows or 1, tokens, head_dim / 2]; `mask` [rows, cached + new tokens] is True where a token is, None is
    all tokens. In the last layer only the last tokens go beyond keys and values. With a mask of each token's own
    [rows, 1, tokens, cached + new tokens] all tokens are computed and returned.
    """
    from llava_cli.engine.cpu.jit.decoder_ops import apply_rope

    (rows, tokens, _), first, cached = x.shape, layers[0], cache.get_seq_length()
    buffers = Activations(first, rows, tokens, norm.weight.dtype)
    buffers.begin(x, cos, sin)
    qkv_heads = buffers.qkv.view(rows, tokens, -1, first.head_dim).transpose(1, 2)
    query, new_key = qkv_heads[:, : first.heads], qkv_heads[:, : first.kv_heads]
    after, last_only = buffers, tokens > 1 and (mask is None or mask.dim() == 2)
    attention_mask = mask[:, None, None] if mask is not None and mask.dim() == 2 else mask
    for layer in layers:
        _run(buffers.before_attention(layer))
        layer_cache = _layer_cache(cache, layer.index)
        keys, values = layer_cache.grow(new_key, new_key)
        if cached and tokens >= _TRIM_MIN_TOKENS:
            allocator.trim_heap()
        apply_rope(buffers.qkv, buffers.cos, buffers.sin, keys, values, layer.heads, rows, cached)()
        if layer is layers[-1] and last_only:
            after, query = Activations(layer, rows, 1, norm.weight.dtype), query[:, :, -1:]
            after.residual.copy_(buffers.residual.view(rows, tokens, -1)[:, -1])
        attn_out, _ = attend(
            layer.attention, query, layer_cache.keys, layer_cache.values, attention_mask, layer.scaling, is_causal=True
        )
        after.attn_out.copy_(attn_out.view(after.attn_out.shape))
        _run(after.after_attention(layer))
    after.norm(norm)()
    return after.normed.view(rows, after.tokens, -1)


def _layer_cache(cache: RoomyCache, index: int) -> Any:
    while len(cache.layers) <= index:
        cache.layers.append(RoomyLayer())
    return cache.layers[index]


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        launch()
