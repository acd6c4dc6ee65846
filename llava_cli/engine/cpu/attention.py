"""Attention on a CPU: compiled, or torch's own where that is faster or nothing can be compiled."""

from __future__ import annotations

import threading
from ctypes import byref
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from llava_cli.engine.cpu.jit import PADDED, QUERIES, SPARE, WIDTH
from llava_cli.engine.cpu.jit.compiler import Kernel, Misfit, addresses, compiled, kinds_here, threads_for

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.jit import Layout

NAME, TORCHS = "llava", "sdpa"
"""transformers' names for our attention and for torch's."""
LONG = 1024
"""Keys of a head, turned over, that stay in a core's cache; of more torch's own is faster in fp32, and not in bf16."""


@cache
def has_amx() -> bool:
    """Whether torch's own is faster than any other in bf16: of 620 tokens of a 1B it takes 5 ms a layer."""
    import torch

    return torch.cpu._is_amx_tile_supported()


def use_our_attention(model: Any) -> None:
    """Lets those parts of a model on a CPU attend by `attend` that transformers has attend by torch's function.

    Others keep what it chose for them: scores of Gemma 2 are capped, those of gpt-oss have sinks, which torch's and
    ours lack.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    _replace_attention(model, TORCHS, NAME)


def uses_our_attention(module: Any) -> bool:
    """Whether a part of a model that has a config attends by `attend`."""
    return bool(module.config._attn_implementation == NAME)


def use_torchs_attention(model: Any) -> None:
    """Undoes `use_our_attention`."""
    _replace_attention(model, NAME, TORCHS)


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
    """query [rows, heads, queries, width], key, value [rows, key heads, keys, width] -> [rows, queries, heads, width].

    `attention_mask` [rows or 1, 1, queries, keys] is true, or 0, where a key is seen. Without it, or where it is one
    for all queries, a causal module's see none behind themselves. What is compiled computes in fp32.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, queries, width = query.shape
    keys, scaling = key.shape[2], width**-0.5 if scaling is None else scaling
    causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and (attention_mask is None or attention_mask.shape[2] == 1)
    usual = not any(options.get(name) is not None for name in _UNUSUAL) and OneToken.suits(query)
    if usual and key.shape == value.shape and key.dtype == query.dtype == value.dtype and heads % key.shape[1] == 0:
        out = torch.empty(rows, queries, heads, width, dtype=query.dtype, device="cpu")
        if queries == 1:
            together = query.reshape(rows, key.shape[1], -1, width).contiguous()
            attending = OneToken(together, out.view(together.shape), scaling)
            attending(_with_room(key), _with_room(value), keys, _seen(attention_mask, rows))
            return out, None
        if (attention_mask is None or attention_mask.dtype == torch.bool) and not _torchs_is_faster(query.dtype, keys):
            _of_many(out, query, key, value, attention_mask, scaling, causal)
            return out, None
    if causal and (attention_mask is not None or queries != keys):  # torch's is of the first tokens, not the last
        earlier = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        attention_mask = earlier[None, None] if attention_mask is None else _truths(attention_mask) & earlier
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **options
    )


_UNUSUAL = ("softcap", "position_bias", "s_aux")


def _torchs_is_faster(dtype: torch.dtype, keys: int) -> bool:
    import torch

    return keys > LONG if dtype == torch.float32 else has_amx()


def _of_many(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    causal: bool,
) -> None:
    """Attention of many tokens, of the shapes that `attend` takes, to `out`, in one piece.

    A layer of 1B takes 8 ms for 620 tokens, and torch's own 12 in fp32 and 20 in bf16 (without AMX).
    """
    import torch
    from torch.nn.functional import pad

    from llava_cli.engine.cpu.jit.prefill_attention import Task, write

    (rows, heads, queries, width), (_, key_heads, keys, _) = query.shape, key.shape
    if key.stride() != value.stride() or key.stride(-1) != 1:
        key, value = key.contiguous(), value.contiguous()
    query = query if query.stride(-1) == 1 else query.contiguous()
    padded = -(-keys // PADDED) * PADDED
    shown = _all(padded)[None, None] if mask is None else pad(mask[:, 0], (0, padded - keys)).contiguous()
    threads, each = threads_for(2 * keys * query.numel()), heads // key_heads
    together = each if rows * key_heads >= 4 * threads else 1
    room = _floats(threads * (padded * (width + QUERIES) + QUERIES * width))
    of_rows, of_queries = len(shown) > 1, shown.shape[1] > 1
    tensors = {"query": query, "out": out, "keys": key, "values": value, "mask": shown, "room": room}
    layout: Layout = {
        "query": (query.dtype, (rows, heads, queries, width)),
        "out": (query.dtype, (rows, queries, heads, width)),
        **dict.fromkeys(("keys", "values"), (query.dtype, (rows, key_heads, keys, width))),
        "mask": (torch.bool, (rows if of_rows else 1, queries if of_queries else 1, padded)),
        "room": (torch.float32, (len(room),)),
    }
    strides = {
        **dict(zip(("query_row", "query_head", "query_token"), query.stride(), strict=False)),
        **dict(zip(("key_row", "key_head", "key_token"), key.stride(), strict=False)),
        "mask_row": shown.stride(0) if of_rows else 0,
        "mask_query": shown.stride(1) if of_queries else 0,
    }
    task = Task(
        **addresses(tensors, layout, strided=("query", "keys", "values")),
        **strides,
        heads=heads,
        each=each,
        together=together,
        items=rows * heads // together,
        queries=queries,
        tokens=keys,
        padded=padded,
        causal=int(causal),
        threads=threads,
    )
    compiled(write, kinds_here()[0], query.dtype == torch.bfloat16, width, scaling)(byref(task))


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

        from llava_cli.engine.cpu.jit.decode_attention import Task, write

        rows, heads, each, width = out.shape
        self._heads, self._width, self._dtype = heads, width, out.dtype
        self._kept: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        self._rows, self._numbers, self._products = rows, rows * heads * each, 2 * out.numel()
        tensors = {"query": query, "out": out, "scaled": _floats(out.numel())}
        layout: Layout = {
            "query": (out.dtype, tuple(out.shape)),
            "out": (out.dtype, tuple(out.shape)),
            "scaled": (torch.float32, (out.numel(),)),
        }
        if angles:
            tensors |= zip(("cos", "sin"), angles, strict=True)
            layout |= dict.fromkeys(("cos", "sin"), (out.dtype, (rows, width // 2)))
            layout |= {"query": (out.dtype, (rows, heads * (each + 2) * width))}
        self._task = Task(**addresses(tensors, layout))
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

        What is `seen` of them is true in [rows, tokens]; None is all. All three in one piece.
        """
        task = self._task
        if keys is not self._kept[0] or values is not self._kept[1]:  # a cache makes new ones now and then
            self._keep(keys, values)
        if tokens > task.room:
            raise Misfit(f"{tokens} tokens of keys that have room for {task.room}")
        mask, scores = self._mask(tokens, seen), _rooms.of(self._numbers * (tokens + SPARE))
        self._over = mask, scores  # as long as the task is told where they are
        task.mask, task.scores = mask.data_ptr(), scores.data_ptr()
        task.tokens = tokens
        task.threads = threads_for(tokens * self._products)

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Checks keys and values once, for they are the same ones for many tokens."""
        rows, room = keys.shape[0], keys.shape[2]
        if rows < self._rows:
            raise Misfit(f"keys of {rows} rows, and not {self._rows}")
        kept = self._dtype, (rows, self._heads, room, self._width)
        places = addresses({"keys": keys, "values": values}, {"keys": kept, "values": kept})
        self._kept = keys, values
        self._task.keys, self._task.values, self._task.room = places["keys"], places["values"], room

    def _mask(self, tokens: int, seen: torch.Tensor | None) -> torch.Tensor:
        import torch

        if seen is None:
            return _all(self._rows * tokens)
        addresses({"mask": seen}, {"mask": (torch.bool, (self._rows, tokens))})
        return seen

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


def _all(count: int) -> torch.Tensor:
    """A mask that hides nothing of so many."""
    return _ones(-(-count // 1024))[:count]


@lru_cache(maxsize=2)
def _ones(thousands: int) -> torch.Tensor:
    import torch

    return torch.ones(1024 * thousands, dtype=torch.bool, device="cpu")


def _seen(mask: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """A mask of one query as truths [rows, keys]."""
    if mask is None:
        return None
    return _truths(mask)[:, 0, 0].expand(rows, -1).contiguous()


def _truths(mask: torch.Tensor) -> torch.Tensor:
    import torch

    return mask if mask.dtype == torch.bool else mask == 0


def _with_room(tensor: torch.Tensor) -> torch.Tensor:
    """Keys or values [rows, heads, tokens, width] and the room behind them, in one piece; copied only if need be."""
    rows, heads, tokens, width = tensor.shape
    room = tensor.stride(1) // width
    strides = heads * room * width, room * width, width, 1
    if room < tokens or tensor.stride()[1:] != strides[1:] or (rows > 1 and tensor.stride(0) != strides[0]):
        return tensor.contiguous()
    return tensor.as_strided((rows, heads, room, width), strides)
