"""Attention on a CPU as plain products, where that is faster than torch's own."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "plain products"
SCORES = 1 << 24
"""Numbers that are computed at a time, for they should stay in the processor's cache: 32 MB in bf16."""


@cache
def torchs_is_faster() -> bool:
    """Whether torch's own attention is: on a CPU with AMX, and one that computes in fp32 for it has no bf16.

    With AMX a layer of 1B takes 5 ms for 620 tokens, where plain products take 16, and for one token after them 0.12
    and 0.41; 27 pictures of 65 patches take 0.7 and 2.2. A 1B in fp32 reads 640 tokens by a tenth faster, and makes
    one in 68 ms, not 80.
    """
    import torch

    return torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported()


def turns_keys(model: Any) -> bool:
    """Whether a model's keys are best kept turned, a row for each of a head's numbers: for plain products."""
    return model.config._attn_implementation == NAME and not torchs_is_faster()


def use_plain_attention(model: Any) -> None:
    """Lets a model on a CPU attend by `attend`, if it takes its attention from transformers' interface.

    torch's kernel for a CPU takes 30 ms for 620 tokens of 7B geometry, where plain products take 13; 3.4 ms for 64
    pictures of 65 patches, against 1.1; and half of a decoding step's time for 64 rows, against a fifth.
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

    `attention_mask` [rows or 1, 1, queries, keys] is true, or 0, where a key is seen; None means all, of earlier
    ones if the module is causal. Rounds as transformers' eager attention does.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, queries, width = query.shape
    keys = key.shape[2]
    if torchs_is_faster() or any(options.get(name) is not None for name in _UNUSUAL):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **options
        )
    causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is None and causal:
        attention_mask = torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    add = None if attention_mask is None else added(attention_mask, query.dtype)
    query = query * (width**-0.5 if scaling is None else scaling)
    if queries == 1:
        key, value = _with_room(key), _with_room(value)
        if key.stride(2) == 1:
            query = query.view(rows, key.shape[1], -1, width)
            return _bagged(query, key, value, add, keys).view(rows, 1, heads, width), None
    few = max(1, SCORES // (heads * queries * key.shape[2]))
    parts = [slice(i, i + few) for i in range(0, rows, few)]
    seen = [
        _products(query[part], key[part], value[part], add if add is None or len(add) == 1 else add[part], keys)
        for part in parts
    ]
    return (seen[0] if len(seen) == 1 else torch.cat(seen)).transpose(1, 2), None


_UNUSUAL = ("softcap", "position_bias", "s_aux")


def _products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, add: torch.Tensor | None, keys: int
) -> torch.Tensor:
    """Softmax of query times key, `add` added, times value; behind the first `keys` keys is only room."""
    import torch

    rows, heads, queries, width = query.shape
    # Query heads that share a key head stand below each other, so that one product serves them all.
    together, room = rows * key.shape[1], key.shape[2]
    scores = torch.bmm(query.reshape(together, -1, width), key.reshape(together, room, width).transpose(1, 2))
    scores = scores.view(rows, heads, queries, room)
    if add is not None:
        scores[..., :keys] += add
    if room > keys:
        scores[..., keys:] = torch.finfo(scores.dtype).min
    shares = scores.softmax(-1).view(together, -1, room)
    return torch.bmm(shares, value.reshape(together, room, width)).view(rows, heads, queries, width)


def attend_one(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tokens: int, scaling: float
) -> torch.Tensor:
    """One row's newest token, query [key heads, query heads of each, width] -> the same; `query` may be changed.

    To the first `tokens` of keys and values [key heads, room, width], which are as a `RoomyLayer` has them.
    """
    from torch.nn.functional import scaled_dot_product_attention

    query, keys, values = query[None], keys[None], values[None]
    if torchs_is_faster():
        keys, values = keys[:, :, :tokens], values[:, :, :tokens]
        return scaled_dot_product_attention(query, keys, values, scale=scaling)[0]
    return _bagged(query.mul_(scaling), keys, values, None, tokens)[0]


def _bagged(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, add: torch.Tensor | None, keys: int
) -> torch.Tensor:
    """One token of each row, query [rows, key heads, query heads of each, width], already scaled -> the same.

    Key and value [rows, key heads, room, width], of which the first `keys` count; keys are turned. The products are
    sums of a table's rows: of keys' rows weighted by the query, of values weighted by shares. Torch's embedding bags
    read for such sums at 23 to 34 GB/s, its products of matrices at 9 to 17: a layer of 7B takes 0.5 ms for 660
    tokens, not 1; one of 8 rows of 100 tokens in 8 heads of 32 takes 22 us, not 58.
    """
    (rows, key_heads, each, width), room = query.shape, key.shape[2]
    tables = rows * key_heads
    scores = _weighted(key.transpose(2, 3).reshape(-1, room), _bags(tables, each, width, width), query)
    scores = scores.view(rows, key_heads, each, room)[..., :keys]
    shares = (scores if add is None else scores.add_(add)).softmax(-1)
    return _weighted(value.reshape(-1, width), _bags(tables, each, room, keys), shares).view_as(query)


_Bags = tuple["torch.Tensor", "torch.Tensor"]


@lru_cache(maxsize=2)  # a step's, for all layers
def _bags(tables: int, each: int, size: int, count: int) -> _Bags:
    """The rows that sums are of: `each` sums of the first `count` of every table's `size`; and where a sum's begin."""
    import torch

    first = torch.arange(tables, dtype=torch.int32).repeat_interleave(each) * size
    rows = first[:, None] + torch.arange(count, dtype=torch.int32)
    return rows.flatten(), torch.arange(0, rows.numel(), count, dtype=torch.int32)


def _weighted(rows: torch.Tensor, bags: _Bags, weights: torch.Tensor) -> torch.Tensor:
    """Sums of `rows` [all, width], each times its weight -> [sums, width]."""
    import torch

    return torch.embedding_bag(rows, *bags, mode=0, per_sample_weights=weights.flatten())[0]


def added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to the scores: 0 where a key is seen, else as little as can be."""
    import torch

    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _with_room(tensor: torch.Tensor) -> torch.Tensor:
    """Keys or values and the room behind them: in one piece, so that a product copies nothing."""
    rows, heads, _, width = tensor.shape
    room = tensor.stride(1) // width
    if tensor.stride()[2:] not in ((width, 1), (1, room)):
        return tensor.contiguous()
    return tensor.as_strided((rows, heads, room, width), tensor.stride())
