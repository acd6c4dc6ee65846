"""A language model's decoder in few operations, on a CPU: layers of Llama's kind.

Around its matrix products a layer of transformers takes 0.4 ms of Python and small operations a token: 9 of the 45 ms
that a 1B in 4 bits needed for one. Here queries, keys and values come from one product where their weights allow, so do
gate and up, and behind the last layer's keys and values only a prompt's last token is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.decoder_passes import DecoderLayer, DecodeStep, prefill
from llava_cli.engine.cpu.jit import HEAD_DIM_STEP, MAX_DECODE_ROWS, VECTOR_COLUMNS
from llava_cli.engine.cpu.jit.compiler import Kernel, supported_isas
from llava_cli.engine.cpu.projection import FuseLinear
from llava_cli.engine.kv_cache import RoomyCache

if TYPE_CHECKING:
    import torch

_CLASSES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen2VLTextModel", "Qwen2_5_VLTextModel")
"""Decoders around which a model only looks up embeddings before, and multiplies by its head behind."""

_PARTS = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
"""The parts of a layer and of its parts: one that has any other computes something else."""


def suits(decoder: Any) -> bool:
    """Whether a decoder is of Llama's kind, and this CPU has kernels for it."""
    import torch

    known = (
        type(decoder).__name__ in _CLASSES
        and all(_has_parts(layer, name, parts) for layer in decoder.layers for name, parts in _PARTS.items())
        and decoder.config.hidden_act == "silu"
        and "sliding_attention" not in (getattr(decoder.config, "layer_types", None) or [])
        and decoder.norm.weight.dtype in (torch.bfloat16, torch.float32)
    )
    if not known or not supported_isas():
        return False
    shapes = {_shape(layer.self_attn, layer.mlp) for layer in decoder.layers}
    head_dim, query_size, key_size, ffn_size, hidden_size = next(iter(shapes))
    evenly_shared = key_size > 0 and query_size % key_size == 0
    aligned = head_dim % (2 * HEAD_DIM_STEP) == hidden_size % VECTOR_COLUMNS == ffn_size % HEAD_DIM_STEP == 0
    return len(shapes) == 1 and evenly_shared and aligned


def _has_parts(layer: Any, name: str, parts: set[str]) -> bool:
    return {part for part, _ in layer.get_submodule(name).named_children()} == parts


def _shape(attention: Any, mlp: Any) -> tuple[int, ...]:
    """head_dim, query_size, key_size, ffn_size, hidden_size"""
    down = mlp.down_proj
    return (
        attention.head_dim,
        attention.q_proj.out_features,
        attention.k_proj.out_features,
        down.in_features,
        down.out_features,
    )


def kernels(config: Any, bf16: bool) -> list[Kernel]:
    """The kernels of a decoder with this text config, besides those of attention and products."""
    epsilon = getattr(config, "rms_norm_eps", None)
    if epsilon is None:
        return []
    from llava_cli.engine.cpu.jit.decoder_ops import norm_kernel, rope_kernel, swiglu_kernel

    return [norm_kernel(bf16, epsilon), rope_kernel(bf16), swiglu_kernel(bf16)]


class Decoder:
    """Replaces a decoder's `forward`: [rows, tokens, hidden_size] -> of the last token alone [rows, 1, hidden_size].

    Of all tokens where each has a mask of its own (`attention_mask` [rows, 1, tokens, columns]).
    Calls that it does not serve, for example with another cache than `RoomyCache`, go to the original `forward`.
    """

    def __init__(self, decoder: Any, fuse: FuseLinear) -> None:
        self._original_forward, self._norm = decoder.forward, decoder.norm
        self._rope = RopeTable(decoder.rotary_emb)
        self._sliding_window: int | None = getattr(decoder.config, "sliding_window", None)
        self._layers = [DecoderLayer(layer, fuse) for layer in decoder.layers]
        self._steps: dict[int, DecodeStep] = {}

    def __call__(
        self,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPast

        cache, x = past_key_values, inputs_embeds
        # Only the last token's logits can be had, so logits_to_keep says nothing new.
        unknown = {name for name, value in options.items() if value} - {"logits_to_keep"}
        if x is None or unknown or not isinstance(cache, RoomyCache) or self._exceeds_window(cache, x):
            return self._original_forward(
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                inputs_embeds=x,
                use_cache=use_cache,
                **options,
            )
        rows, tokens, _ = x.shape
        end = cache.get_seq_length() + tokens
        if position_ids is None:
            position_ids = torch.arange(end - tokens, end)[None]
        mask = None if attention_mask is None or attention_mask.all() else attention_mask.bool().contiguous()
        cos, sin = self._rope(x, position_ids)
        if tokens == 1 < end and rows <= MAX_DECODE_ROWS:
            x = self._step(rows)(x, cos, sin, cache, mask)
        else:
            x = prefill(self._layers, self._norm, x, cos, sin, cache, mask)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache)

    def _step(self, rows: int) -> DecodeStep:
        if rows not in self._steps:
            self._steps[rows] = DecodeStep(self._layers, self._norm, rows)
        return self._steps[rows]

    def _exceeds_window(self, cache: RoomyCache, x: torch.Tensor) -> bool:
        """Whether a sliding window would hide some tokens."""
        return self._sliding_window is not None and cache.get_seq_length() + x.shape[1] > self._sliding_window


class RopeTable:
    """cos and sin of the rotary embedding, from a table where one position says it all.

    With M-RoPE (arXiv 2409.12191) a part of the angles follows the position on each axis; a token of text has the same
    one on all of them, and so the angles of the plain embedding.
    """

    _STEP = 2048
    """Positions that the table grows by."""

    def __init__(self, rotary_emb: Any) -> None:
        self._rotary_emb = rotary_emb
        self._depends_on_length = rotary_emb.rope_type in ("dynamic", "longrope")
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [rows or 1, tokens] -> cos, sin [rows or 1, tokens, head_dim / 2] in x's dtype.

        Positions on several axes [axes, rows or 1, tokens] end with those of a picture: its frames, rows and columns.
        """
        import torch

        if self._depends_on_length:
            return self._compute(x, positions)
        if positions.dim() > 2:
            return self._compute(x, positions[-3:])
        length = int(positions.max()) + 1
        if self._table is None or len(self._table[0]) < length:
            cos, sin = self._compute(x, torch.arange(-(-length // self._STEP) * self._STEP)[None])
            self._table = cos[0].contiguous(), sin[0].contiguous()
        cos, sin = self._table
        return cos[positions], sin[positions]

    def _compute(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers repeats the angles for both halves of a head; one is enough."""
        cos, sin = self._rotary_emb(x, positions)
        half = cos.shape[-1] // 2
        return cos[..., :half], sin[..., :half]
