"""Attention on a CPU as plain products, where that is faster than torch's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "plain products"
MANY = 512
"""Keys of all rows together from which a step's attention is faster as plain products."""


def use_plain_attention(model: Any) -> None:
    """Lets a model on a CPU attend by `attend`, if it takes its attention from transformers' interface.

    torch's kernel takes queries in blocks, and a step of decoding has one of each row: at 64 rows of 80 tokens it is
    half of the step's time, plain products a fifth; at 7B and 620 tokens it is a third, plain products a seventh.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


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
    """query [rows, heads, queries, width], key, value [rows, key heads, keys, width] -> [rows, queries, heads, width].

    `attention_mask` is true, or 0, where a key is seen; None means all, of earlier ones if the module is causal.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, queries, width = query.shape
    keys = key.shape[2]
    if queries > 1 or rows * keys < MANY or any(options.get(name) is not None for name in _UNUSUAL):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **options
        )
    key, value = _with_room(key), _with_room(value)
    room = key.shape[2]
    # Query heads that share a key head stand below each other, so that one product serves them all.
    together = rows * key.shape[1]
    asked = (query * (width**-0.5 if scaling is None else scaling)).reshape(together, -1, width)
    scores = torch.bmm(asked, key.view(together, room, width).transpose(1, 2)).view(rows, heads, 1, room)
    scores[..., keys:] = torch.finfo(scores.dtype).min
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores[..., :keys].masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores[..., :keys] += attention_mask
    shares = scores.softmax(-1).view(together, -1, room)
    seen = torch.bmm(shares, value.view(together, room, width)).view(rows, heads, 1, width)
    return seen.transpose(1, 2), None


_UNUSUAL = ("softcap", "position_bias", "s_aux")


def _with_room(tensor: torch.Tensor) -> torch.Tensor:
    """Keys or values and the room behind them: in one piece, so that a product copies nothing."""
    rows, heads, _, width = tensor.shape
    whole = (rows, heads, tensor.stride(1) // width, width)
    return tensor.as_strided(whole, tensor.stride()) if tensor.stride()[2:] == (width, 1) else tensor.contiguous()
