"""Attention on a CPU: a kernel of ours, or torch's where that is faster or nothing can be compiled."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.jit import HEAD_DIM_STEP
from llava_cli.engine.cpu.jit.compiler import Kernel, supported_isas

if TYPE_CHECKING:
    import torch

OURS, SDPA = "llava", "sdpa"
"""transformers' names for our attention and for torch's."""
FP32_MAX_TOKENS = 2048
"""Keys of a head, transposed, that stay in a core's cache; for more torch's is faster in fp32, but not in bf16."""
_UNSUPPORTED = ("softcap", "position_bias", "s_aux")
"""Options of transformers' attention functions that the kernels lack."""


@cache
def has_amx() -> bool:
    """Whether torch's attention is the fastest in bf16: for 620 tokens of a 1B it takes 5 ms a layer."""
    import torch

    return torch.cpu._is_amx_tile_supported()


def kernels(config: Any, bf16: bool, decodes: bool = False) -> list[Kernel]:
    """The attention kernels of a part of a model with this config: prefill, and decode if it `decodes`."""
    if not (head_dim := _head_dim(config)):
        return []
    from llava_cli.engine.cpu.jit import decode_attention, prefill_attention

    scaling = head_dim**-0.5
    prefill = [] if bf16 and has_amx() else [prefill_attention.kernel(bf16, head_dim, scaling)]
    if not decodes:
        return prefill
    ropes = (True, False) if head_dim % (2 * HEAD_DIM_STEP) == 0 else (False,)  # RoPE's halves are whole registers
    return prefill + [decode_attention.kernel(bf16, head_dim, scaling, rope) for rope in ropes]


def _head_dim(config: Any) -> int:
    """0 if a config has no heads, or none that suit the kernels."""
    names = ("hidden_size", "num_attention_heads", "head_dim")
    hidden_size, heads, head_dim = (getattr(config, name, None) for name in names)
    if not head_dim and isinstance(hidden_size, int) and isinstance(heads, int):
        head_dim = hidden_size // heads
    return head_dim if isinstance(head_dim, int) and head_dim % HEAD_DIM_STEP == 0 else 0


def use_our_attention(model: Any) -> None:
    """Makes `attend` the attention of those parts of a model on a CPU that have torch's.

    Others keep what transformers chose for them: scores of Gemma 2 are capped, those of gpt-oss have sinks, which
    torch's and ours lack.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(OURS, attend)
    AttentionMaskInterface.register(OURS, sdpa_mask)
    _replace_attention(model, SDPA, OURS)


def uses_our_attention(module: Any) -> bool:
    """Whether `attend` is the attention of a part of a model that has a config."""
    return bool(module.config._attn_implementation == OURS)


def use_torchs_attention(model: Any) -> None:
    """Undoes `use_our_attention`."""
    _replace_attention(model, OURS, SDPA)


def _replace_attention(model: Any, old: str, new: str) -> None:
    def replaced(config: Any) -> str | dict[str, Any]:
        own = new if config._attn_implementation == old else config._attn_implementation
        parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
        return {"": own, **{name: replaced(part) for name, part in parts.items()}} if parts else own

    model.set_attn_implementation(replaced(model.config))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers': -> [rows, queries, heads, head_dim].

    query [rows, heads, queries, head_dim]; key, value [rows, kv_heads, tokens, head_dim]; attention_mask [rows or 1, 1,
    queries or 1, tokens] is True, or 0, where a token is seen. A causal module's queries see none behind themselves if
    there is no mask, or one that is the same for all queries. The kernels compute in fp32.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    (rows, heads, queries, head_dim), (_, kv_heads, tokens, _) = query.shape, key.shape
    scaling = head_dim**-0.5 if scaling is None else scaling
    causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and (attention_mask is None or attention_mask.shape[2] == 1)
    supported = not any(options.get(name) is not None for name in _UNSUPPORTED) and has_kernels_for(query)
    if supported and key.shape == value.shape and key.dtype == query.dtype == value.dtype and heads % kv_heads == 0:
        out = torch.empty(rows, queries, heads, head_dim, dtype=query.dtype, device="cpu")
        if queries == 1:
            from llava_cli.engine.cpu.jit.decode_attention import DecodeAttention

            grouped_query = query.reshape(rows, kv_heads, -1, head_dim).contiguous()
            decode_attention = DecodeAttention(grouped_query, out.view(grouped_query.shape), scaling)
            mask = _mask_of_one_query(attention_mask, rows)
            decode_attention(_with_capacity(key), _with_capacity(value), tokens, mask)
            return out, None
        boolean = attention_mask is None or attention_mask.dtype == torch.bool
        if boolean and not _torchs_is_faster(query.dtype, tokens):
            from llava_cli.engine.cpu.jit.prefill_attention import prefill_attention

            prefill_attention(out, query, key, value, attention_mask, scaling, causal)()
            return out, None
    if causal and (attention_mask is not None or queries != tokens):  # torch takes queries for the first tokens
        causal_mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
        attention_mask = causal_mask[None, None] if attention_mask is None else _boolean(attention_mask) & causal_mask
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **options
    )


def has_kernels_for(query: torch.Tensor) -> bool:
    """Whether this CPU has kernels for such heads [..., head_dim]."""
    import torch

    known = query.shape[-1] % HEAD_DIM_STEP == 0 and query.dtype in (torch.bfloat16, torch.float32)
    return known and query.device.type == "cpu" and bool(supported_isas())


def _torchs_is_faster(dtype: torch.dtype, tokens: int) -> bool:
    import torch

    return tokens > FP32_MAX_TOKENS if dtype == torch.float32 else has_amx()


def _mask_of_one_query(mask: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """attention_mask [rows or 1, 1, 1, tokens] -> bool [rows, tokens]"""
    return None if mask is None else _boolean(mask)[:, 0, 0].expand(rows, -1).contiguous()


def _boolean(mask: torch.Tensor) -> torch.Tensor:
    """A mask that may be one of numbers that are added to scores: 0 or very negative."""
    import torch

    return mask if mask.dtype == torch.bool else mask == 0


def _with_capacity(tensor: torch.Tensor) -> torch.Tensor:
    """Keys or values [rows, heads, tokens, head_dim], with the cache's unused tokens behind them: [.., capacity, ..].

    They are contiguous, and copied only if the view is not of such a cache.
    """
    rows, heads, tokens, head_dim = tensor.shape
    capacity = tensor.stride(1) // head_dim
    strides = heads * capacity * head_dim, capacity * head_dim, head_dim, 1
    if capacity < tokens or tensor.stride()[1:] != strides[1:] or (rows > 1 and tensor.stride(0) != strides[0]):
        return tensor.contiguous()
    return tensor.as_strided((rows, heads, capacity, head_dim), strides)
