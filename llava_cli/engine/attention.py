"""Attention on a CPU as plain products, where that is faster than torch's own."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "plain products"
FEW = 512
"""Keys of all rows together up to which a step's attention is faster as torch's own."""
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
    torchs = torchs_is_faster() or (queries == 1 and rows * keys < FEW)
    if torchs or any(options.get(name) is not None for name in _UNUSUAL):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **options
        )
    if queries == 1:
        key, value = _with_room(key), _with_room(value)
    causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is None and causal:
        attention_mask = torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    add = None if attention_mask is None else added(attention_mask, query.dtype)
    query = query * (width**-0.5 if scaling is None else scaling)
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


class OneQuery:
    """The attention of one row's newest token, layer after layer, in buffers that are made once.

    Reads `query` [key heads, query heads of each, width], writes to `out`, which is like it.
    """

    def __init__(self, query: torch.Tensor, out: torch.Tensor) -> None:
        self._query, self._out = query, out
        self._scores = self._shares = query.new_empty(0, 0, 0)

    def __call__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int, scaling: float) -> None:
        """To the first `tokens` of keys and values [key heads, room, width]."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        query = self._query
        if torchs_is_faster():
            keys, values = keys[None, :, :tokens], values[None, :, :tokens]
            self._out.copy_(scaled_dot_product_attention(query[None], keys, values, scale=scaling)[0])
            return
        if self._scores.shape[2] != keys.shape[1]:
            self._scores, self._shares = (query.new_empty(*query.shape[:2], keys.shape[1]) for _ in range(2))
        torch.bmm(query.mul_(scaling), keys.transpose(1, 2), out=self._scores)
        self._scores[:, :, tokens:] = torch.finfo(query.dtype).min
        torch.softmax(self._scores, -1, out=self._shares)
        torch.bmm(self._shares, values, out=self._out)


def added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to the scores: 0 where a key is seen, else as little as can be."""
    import torch

    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _with_room(tensor: torch.Tensor) -> torch.Tensor:
    """Keys or values and the room behind them: in one piece, so that a product copies nothing."""
    rows, heads, _, width = tensor.shape
    whole = (rows, heads, tensor.stride(1) // width, width)
    return tensor.as_strided(whole, tensor.stride()) if tensor.stride()[2:] == (width, 1) else tensor.contiguous()
