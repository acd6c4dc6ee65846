"""Attention on a CPU: of many tokens as plain products where that is faster than torch's own, of one compiled."""

from __future__ import annotations

import threading
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from llava_cli.engine.kernels import SPARE, WIDTH
from llava_cli.engine.kernels.compiled import Kernel, compiled, kinds_here, threads_for

if TYPE_CHECKING:
    import torch

NAME = "plain products"
SCORES = 1 << 24
"""Numbers that are computed at a time, for they should stay in the processor's cache: 32 MB in bf16."""


@cache
def torchs_is_faster() -> bool:
    """Whether torch's own attention is: on a CPU with AMX, and one that computes in fp32 for it has no bf16.

    With AMX a layer of 1B takes 5 ms for 620 tokens, where plain products take 16; 27 pictures of 65 patches take 0.7
    and 2.2. A 1B in fp32 reads 640 tokens by a tenth faster.
    """
    import torch

    return torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported()


def use_plain_attention(model: Any) -> None:
    """Lets a model on a CPU attend by `attend`, if it takes its attention from transformers' interface.

    torch's kernel for a CPU takes 30 ms for 620 tokens of 7B geometry, where plain products take 13; 3.4 ms for 64
    pictures of 65 patches, against 1.1.
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
    ones if the module is causal. Rounds as transformers' eager attention does, that of one token in fp32.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, queries, width = query.shape
    keys, scaling = key.shape[2], width**-0.5 if scaling is None else scaling
    unusual = any(options.get(name) is not None for name in _UNUSUAL)
    unusual = unusual or key.shape != value.shape  # values of another width
    if queries == 1 and not unusual and key.dtype == query.dtype and OneToken.suits(query):
        together = query.reshape(rows, key.shape[1], -1, width).contiguous()
        out = torch.empty_like(together)
        OneToken(together, out, scaling)(_with_room(key), _with_room(value), keys, _seen(attention_mask, rows))
        return out.view(rows, 1, heads, width), None
    if torchs_is_faster() or unusual:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **options
        )
    causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is None and causal:
        attention_mask = torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    add = None if attention_mask is None else added(attention_mask, query.dtype)
    query = query * scaling
    few = max(1, SCORES // (heads * queries * key.shape[2]))
    parts = [slice(i, i + few) for i in range(0, rows, few)]
    found = [
        _products(query[part], key[part], value[part], add if add is None or len(add) == 1 else add[part])
        for part in parts
    ]
    return (found[0] if len(found) == 1 else torch.cat(found)).transpose(1, 2), None


_UNUSUAL = ("softcap", "position_bias", "s_aux")


def _products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, add: torch.Tensor | None) -> torch.Tensor:
    """Softmax of query times key, `add` added, times value."""
    import torch

    rows, heads, queries, width = query.shape
    # Query heads that share a key head stand below each other, so that one product serves them all.
    together, keys = rows * key.shape[1], key.shape[2]
    scores = torch.bmm(query.reshape(together, -1, width), key.reshape(together, keys, width).transpose(1, 2))
    scores = scores.view(rows, heads, queries, keys)
    if add is not None:
        scores += add
    shares = scores.softmax(-1).view(together, -1, keys)
    return torch.bmm(shares, value.reshape(together, keys, width)).view(rows, heads, queries, width)


class OneToken:
    """Attention of one token of each row, query [rows, key heads, query heads of each, width] -> `out`, like it.

    With `angles`, cos and sin [rows, width / 2], query is [rows, all heads, width]: queries, keys and values as a
    product makes them. Then those two are turned and these put behind the others before.

    Compiled: a layer of 1B takes 0.2 ms for 660 tokens, and what torch has for it 0.4 (without AMX).
    """

    def __init__(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        scaling: float,
        angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        import torch

        from llava_cli.engine.kernels.attention import Task, write

        rows, heads, each, width = out.shape
        self._rows, self._numbers, self._products = rows, rows * heads * each, 2 * out.numel()
        scaled = _floats(out.numel())
        tensors = {"query": query, "out": out, "scaled": scaled}
        if angles:
            tensors |= zip(("cos", "sin"), angles, strict=True)
        self._task = Task(**{name: tensor.data_ptr() for name, tensor in tensors.items()})
        self._task.items, self._task.heads, self._task.each = rows * heads, heads, each
        run = compiled(write, kinds_here()[0], query.dtype == torch.bfloat16, width, scaling, angles is not None)
        self.kernel = Kernel(run, self._task, tensors)

    @staticmethod
    def suits(query: torch.Tensor) -> bool:
        """Whether it is there for such a query on this CPU."""
        import torch

        whole = query.shape[-1] % WIDTH == 0 and query.dtype in (torch.bfloat16, torch.float32)
        return whole and query.device.type == "cpu" and bool(kinds_here())

    def over(self, keys: torch.Tensor, values: torch.Tensor, tokens: int, seen: torch.Tensor | None = None) -> None:
        """The `kernel` is to attend to the first `tokens` of keys and values [rows, key heads, room, width].

        What is `seen` of them is true in [rows, tokens]; None is all. All three in one piece, and there as long as it.
        """
        task = self._task
        task.scores = _rooms.of(self._numbers * (tokens + SPARE)).data_ptr()
        mask = _all(1024 * -(-self._rows * tokens // 1024)) if seen is None else seen
        task.keys, task.values, task.mask = keys.data_ptr(), values.data_ptr(), mask.data_ptr()
        task.room, task.tokens = keys.shape[-2], tokens
        task.threads = threads_for(tokens * self._products)

    def __call__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int, seen: torch.Tensor | None = None) -> None:
        self.over(keys, values, tokens, seen)
        self.kernel()


class _Rooms(threading.local):
    """For the scores of a thread."""

    _scores: torch.Tensor | None = None

    def of(self, count: int) -> torch.Tensor:
        if self._scores is None or len(self._scores) < count:
            self._scores = _floats(2 * count)
        return self._scores


_rooms = _Rooms()


def _floats(count: int) -> torch.Tensor:
    import torch

    return torch.empty(count, dtype=torch.float32, device="cpu")


@lru_cache(maxsize=2)
def _all(count: int) -> torch.Tensor:
    import torch

    return torch.ones(count, dtype=torch.bool, device="cpu")


def added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to the scores: 0 where a key is seen, else as little as can be."""
    import torch

    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _seen(mask: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """A mask of one query as truths [rows, keys]."""
    import torch

    if mask is None:
        return None
    truths = mask if mask.dtype == torch.bool else mask == 0
    return truths[:, 0, 0].expand(rows, -1).contiguous()


def _with_room(tensor: torch.Tensor) -> torch.Tensor:
    """Keys or values [rows, heads, tokens, width] and the room behind them, in one piece; copied only if need be."""
    rows, heads, tokens, width = tensor.shape
    room = tensor.stride(1) // width
    strides = heads * room * width, room * width, width, 1
    if room < tokens or tensor.stride()[1:] != strides[1:] or (rows > 1 and tensor.stride(0) != strides[0]):
        return tensor.contiguous()
    return tensor.as_strided((rows, heads, room, width), strides)
