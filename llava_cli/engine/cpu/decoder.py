"""A language model's decoder in few operations, on a CPU: layers of Llama's kind.

Around its products a layer of transformers takes 0.4 ms of Python and small operations a token: 9 of the 45 ms that a
1B in 4 bits needed for one. Here queries, keys and values come from one product where their weights allow, so do the
two halves of a gated product, and after the last layer's keys and values only a prompt's last token is gone on with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.decoder_passes import Step, read
from llava_cli.engine.cpu.dense_linear import Plain
from llava_cli.engine.cpu.jit import COLUMNS, FEW, WIDTH
from llava_cli.engine.cpu.jit.compiler import kinds_here
from llava_cli.engine.kv_cache import RoomyCache

if TYPE_CHECKING:
    import torch

Product = Callable[["torch.Tensor"], "torch.Tensor"]
Join = Callable[[list[Any]], "Product | None"]
"""Layers that multiply the same input -> their outputs side by side, or None if that is nothing for them."""

_KINDS = ("LlamaModel", "MistralModel", "Qwen2Model")
"""Around which a model does nothing to tokens alone but look them up before and multiply by its head behind."""


_LAYER = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
"""The parts of a layer and of its parts: one that has any other computes something else."""


def suits(decoder: Any) -> bool:
    """Whether a decoder has layers that are known here, and kernels for them are there on this CPU."""
    import torch

    known = (
        type(decoder).__name__ in _KINDS
        and all(_has_parts(layer, name, parts) for layer in decoder.layers for name, parts in _LAYER.items())
        and decoder.config.hidden_act == "silu"
        and "sliding_attention" not in (getattr(decoder.config, "layer_types", None) or [])
        and decoder.norm.weight.dtype in (torch.bfloat16, torch.float32)
    )
    if not known or not kinds_here():
        return False
    shapes = {_shape(layer.self_attn, layer.mlp) for layer in decoder.layers}
    width, queries, keys, inner, size = next(iter(shapes))
    shared = keys > 0 and queries % keys == 0  # each head of keys by as many of queries
    return len(shapes) == 1 and shared and width % (2 * WIDTH) == size % COLUMNS == inner % WIDTH == 0


def _has_parts(layer: Any, name: str, parts: set[str]) -> bool:
    return {part for part, _ in layer.get_submodule(name).named_children()} == parts


def _shape(attention: Any, mlp: Any) -> tuple[int, ...]:
    """A head's width; numbers of queries, of keys, within the gated product and of a token."""
    both, down = (attention.q_proj.out_features, attention.k_proj.out_features), mlp.down_proj
    return attention.head_dim, *both, down.in_features, down.out_features


class Decoder:
    """In place of a decoder's forward pass, which goes on serving those who bring another cache than ours.

    [rows, tokens, hidden size] -> of the last token alone [rows, 1, hidden size].
    """

    def __init__(self, decoder: Any, join: Join) -> None:
        self._plain, self._norm, self._angles = decoder.forward, decoder.norm, Angles(decoder.rotary_emb)
        self._window: int | None = getattr(decoder.config, "sliding_window", None)
        self._layers = [Layer(layer, join) for layer in decoder.layers]
        self._steps: dict[int, Step] = {}

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

        cache = past_key_values
        wanted = {name for name, value in options.items() if value} - {"logits_to_keep"}  # there is no other way
        if inputs_embeds is None or wanted or not isinstance(cache, RoomyCache) or self._slides(cache, inputs_embeds):
            return self._plain(
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **options,
            )
        x, (_, tokens, _) = inputs_embeds, inputs_embeds.shape
        keys = cache.get_seq_length() + tokens
        if position_ids is None:
            position_ids = torch.arange(keys - tokens, keys)[None]
        seen = None if attention_mask is None or attention_mask.all() else attention_mask.bool().contiguous()
        cos, sin = self._angles(x, position_ids)
        if tokens == 1 < keys and len(x) <= FEW:
            x = self._step(len(x))(x, cos, sin, cache, seen)
        else:
            x = read(self._layers, self._norm, x, cos, sin, cache, seen)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache)

    def _step(self, rows: int) -> Step:
        if rows not in self._steps:
            self._steps[rows] = Step(self._layers, self._norm, rows)
        return self._steps[rows]

    def _slides(self, cache: RoomyCache, x: torch.Tensor) -> bool:
        """Whether a window of tokens would leave some behind."""
        return self._window is not None and cache.get_seq_length() + x.shape[1] > self._window


class Angles:
    """What tokens' heads are turned by; from a table, where that does not depend on how long a prompt is."""

    def __init__(self, compute: Any) -> None:
        self._compute = compute
        self._varies = compute.rope_type in ("dynamic", "longrope")
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [rows or 1, tokens] -> cos, sin [rows or 1, tokens, half of a head's width], of x's type."""
        import torch

        if self._varies:
            return self._of(x, positions)
        most = int(positions.max()) + 1
        if self._table is None or len(self._table[0]) < most:
            cos, sin = self._of(x, torch.arange(-(-most // _AT_A_TIME) * _AT_A_TIME)[None])
            self._table = cos[0].contiguous(), sin[0].contiguous()
        cos, sin = self._table
        return cos[positions], sin[positions]

    def _of(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._compute(x, positions)
        half = cos.shape[-1] // 2
        return cos[..., :half], sin[..., :half]


_AT_A_TIME = 2048
"""Positions that the table grows by."""


class Group:
    """Linear layers that multiply the same input: `joined`, or each alone, for few tokens by what `few` has for it."""

    def __init__(self, layers: list[Any], join: Join) -> None:
        self.layers, self.joined = layers, join(layers)
        self.few = [None if self.joined else Plain.of(layer) for layer in layers]
        self.outputs: list[int] = [layer.out_features for layer in layers]


class Layer:
    """One of the decoder's: what it is made of."""

    def __init__(self, layer: Any, join: Join) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.number, self.width, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.sources = Group([attention.q_proj, attention.k_proj, attention.v_proj], join)
        self.out, self.gated = Group([attention.o_proj], join), Group([mlp.gate_proj, mlp.up_proj], join)
        self.down = Group([mlp.down_proj], join)
        self.heads = [outputs // self.width for outputs in self.sources.outputs[:2]]
        self.hidden_size, self.inner_size = mlp.down_proj.out_features, mlp.down_proj.in_features
        self.attention = attention
