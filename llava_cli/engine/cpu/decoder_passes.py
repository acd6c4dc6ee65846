"""Tokens through a decoder's layers: a prompt's, or one more of each of some rows, in buffers that all layers share.

A 1B in 4 bits computes 30 ms for a token, in 22 layers. What Python and torch do around two dozen operations of each,
to make their outputs and to look at their inputs, was a fifth of that. Here there are about ten, most of them compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from llava_cli.engine.cpu.attention import OneToken, attend
from llava_cli.engine.cpu.dense_linear import Plain
from llava_cli.engine.cpu.jit import FEW
from llava_cli.engine.cpu.jit.compiler import Kernel, Misfit, addresses, chained, compiled, kinds_here, threads_for
from llava_cli.engine.cpu.quantized_linear import Room, copied
from llava_cli.engine.kv_cache import RoomyCache, RoomyLayer

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.cpu.decoder import Group, Layer
    from llava_cli.engine.cpu.jit import Layout

Call = Callable[[], object]


class _Buffers:
    """What tokens [rows, tokens] are while they go through layers of one shape: [all tokens, numbers] each."""

    def __init__(self, layer: Layer, shape: tuple[int, int], dtype: torch.dtype) -> None:
        import torch

        tokens, (heads, key_heads), width = shape[0] * shape[1], layer.heads, layer.width

        def buffer(numbers: int) -> torch.Tensor:
            return torch.empty(tokens, numbers, dtype=dtype, device="cpu")

        self.shape = shape
        self.x, self.more, self.read = (buffer(layer.hidden_size) for _ in range(3))
        """The stream, what is to be added to it, and the norm of that."""
        self.cos, self.sin = buffer(width // 2), buffer(width // 2)
        self.sources, self.found = buffer((heads + 2 * key_heads) * width), buffer(heads * width)
        """Queries, keys and values; what attention finds."""
        self.gated, self.given = buffer(2 * layer.inner_size), buffer(layer.inner_size)
        self.room = Room()

    def norm(self, norm: Any) -> Kernel:
        """Adds to the stream, and norms it for the next products."""
        from llava_cli.engine.cpu.jit.decoder_ops import NormTask, write_norm

        (tokens, width), dtype = self.x.shape, self.x.dtype
        tensors = {"x": self.x, "more": self.more, "weight": norm.weight.data, "out": self.read}
        layout = {**dict.fromkeys(tensors, (dtype, (tokens, width))), "weight": (dtype, (width,))}
        run = compiled(write_norm, kinds_here()[0], _in_bf16(self.x), norm.variance_epsilon)
        return Kernel(run, task_of(NormTask, tensors, layout, tokens=tokens, width=width), tensors)

    def sources_of(self, layer: Layer) -> list[Call]:
        return [self.norm(layer.norms[0]), *self.product(layer.sources, self.read, self.sources)]

    def rest_of(self, layer: Layer) -> list[Call]:
        """What follows attention."""
        return [
            *self.product(layer.out, self.found, self.more),
            self.norm(layer.norms[1]),
            *self.product(layer.gated, self.read, self.gated),
            self._gate(),
            *self.product(layer.down, self.given, self.more),
        ]

    def _gate(self) -> Kernel:
        from llava_cli.engine.cpu.jit.decoder_ops import GateTask, write_gate

        (tokens, width), dtype = self.given.shape, self.x.dtype
        tensors = {"x": self.gated, "out": self.given}
        layout: Layout = {"x": (dtype, (tokens, 2 * width)), "out": (dtype, (tokens, width))}
        task = task_of(GateTask, tensors, layout, tokens=tokens, width=width)
        return Kernel(compiled(write_gate, kinds_here()[0], _in_bf16(self.x)), task, tensors)

    def product(self, group: Group, x: torch.Tensor, out: torch.Tensor) -> Sequence[Call]:
        return bound(group, x.view(*self.shape, -1), out.view(*self.shape, -1), self.room)


def bound(group: Group, x: torch.Tensor, out: torch.Tensor, room: Room) -> Sequence[Call]:
    """What writes to `out` [rows, tokens, outputs of all] what a group's layers make of `x` [rows, tokens, inputs]."""
    import torch

    if product := group.joined:
        calls: Sequence[Call] = (
            product.bound(x, out, room) if hasattr(product, "bound") else [partial(copied, product, x, out)]
        )
        return calls
    lines, parts = x.flatten(0, 1), torch.split(out.flatten(0, 1), group.outputs, -1)
    each = zip(group.layers, group.few, parts, strict=True)
    return [_one_product(layer, few, lines, part) for layer, few, part in each]


def _one_product(layer: Any, few: Plain | None, x: torch.Tensor, out: torch.Tensor) -> Call:
    import torch

    plain = type(layer) is torch.nn.Linear and layer.weight.dtype == x.dtype
    if plain and few and len(x) <= FEW:
        return few.bound(x, out)
    if not plain or not (x.dtype == torch.float32 or out.is_contiguous()):  # bf16 torch writes in one piece
        return partial(copied, layer, x, out)
    weight = layer.weight.data.t()
    if layer.bias is None:
        return partial(torch.mm, x, weight, out=out)
    return partial(torch.addmm, layer.bias.data, x, weight, out=out)


def task_of(kind: Any, tensors: dict[str, torch.Tensor], layout: Layout, **counts: int) -> Any:
    """A kernel's, with as many threads as suit its first tensor; raises `Misfit` where one is not as `layout` says."""
    threads = threads_for(_STEPS * next(iter(tensors.values())).numel())
    return kind(**addresses(tensors, layout), **counts, threads=threads)


_STEPS = 8
"""That a number takes between two products, about."""


def _in_bf16(numbers: torch.Tensor) -> bool:
    import torch

    return numbers.dtype == torch.bfloat16


class Step:
    """One more token of each row through all layers, and the norm behind them: one chain of kernels.

    For one thread at a time; it uses as many as torch had when it was made.
    """

    def __init__(self, layers: list[Layer], norm: Any, rows: int) -> None:
        self._buffers = buffers = _Buffers(layers[0], (rows, 1), norm.weight.dtype)
        heads, key_heads = layers[0].heads
        found = buffers.found.view(rows, key_heads, heads // key_heads, -1)
        # Of the shape of what comes into the cache.
        self._new = buffers.sources.view(rows, -1, 1, layers[0].width)[:, :key_heads]
        self._attending: list[tuple[int, OneToken]] = []
        calls: list[Call] = []
        for layer in layers:
            attention = OneToken(buffers.sources, found, layer.scaling, (buffers.cos, buffers.sin))
            self._attending.append((layer.number, attention))
            calls += [*buffers.sources_of(layer), attention.kernel, *buffers.rest_of(layer)]
        self._calls = chained([*calls, buffers.norm(norm)])

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: RoomyCache, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """x [rows, 1, hidden size], cos and sin [rows, 1, half of a head's width] -> what the norm makes of it, like x.

        `seen` [rows, tokens] is true where one is, this one among them; None is all.
        """
        tokens, buffers = cache.get_seq_length() + 1, self._buffers
        _begin(buffers, x, cos, sin)
        for number, attention in self._attending:
            keys, values = cast("RoomyLayer", cache.layers[number]).grow(self._new, self._new)
            attention.over(keys, values, tokens, seen)
        for call in self._calls:
            call()
        return buffers.read.view(x.shape).clone()


def _begin(buffers: _Buffers, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    buffers.x.view(x.shape).copy_(x)
    buffers.more.zero_()
    for buffer, angles in ((buffers.cos, cos), (buffers.sin, sin)):
        buffer.view(*buffers.shape, -1).copy_(angles)


def read(
    layers: list[Layer],
    norm: Any,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: RoomyCache,
    seen: torch.Tensor | None,
) -> torch.Tensor:
    """Many tokens through all layers: x [rows, tokens, hidden size] -> the last ones, normed [rows, 1, hidden size].

    cos and sin [rows or 1, tokens, half of a head's width]; `seen` [rows, keys] is true where a token is, None is all.
    Of the last layer only the last tokens are computed behind its keys and values.
    """
    rows, tokens, _ = x.shape
    buffers, begin = _Buffers(layers[0], (rows, tokens), norm.weight.dtype), cache.get_seq_length()
    _begin(buffers, x, cos, sin)
    mask = None if seen is None else seen[:, None, None]
    heads, key_heads = layers[0].heads
    every = buffers.sources.view(rows, tokens, -1, layers[0].width).transpose(1, 2)
    query, new = every[:, :heads], every[:, :key_heads]
    last = buffers
    for layer in layers:
        _run(buffers.sources_of(layer))
        kept = _layer_of(cache, layer.number)
        keys, values = kept.grow(new, new)
        _turn(buffers, layer, keys, values, begin)
        if layer is layers[-1] and tokens > 1:
            last, query = _Buffers(layer, (rows, 1), norm.weight.dtype), query[:, :, -1:]
            last.x.copy_(buffers.x.view(rows, tokens, -1)[:, -1])
        found, _ = attend(layer.attention, query, kept.keys, kept.values, mask, layer.scaling, is_causal=True)
        last.found.copy_(found.view(last.found.shape))
        _run(last.rest_of(layer))
    last.norm(norm)()
    return last.read[:, None]


def _layer_of(cache: RoomyCache, number: int) -> Any:
    while len(cache.layers) <= number:
        cache.layers.append(RoomyLayer())
    return cache.layers[number]


def _run(calls: list[Call]) -> None:
    for call in calls:
        call()


def _turn(buffers: _Buffers, layer: Layer, keys: torch.Tensor, values: torch.Tensor, begin: int) -> None:
    from llava_cli.engine.cpu.jit.decoder_ops import TurnTask, write_turn

    (heads, key_heads), (rows, apart), width = layer.heads, buffers.shape, layer.width
    (held, _, room, _), tokens, dtype = keys.shape, rows * apart, buffers.x.dtype
    if held < rows or begin + apart > room:
        raise Misfit(f"keys of {held} rows and {room} tokens for {rows} and {begin + apart}")
    tensors = {"x": buffers.sources, "keys": keys, "values": values, "cos": buffers.cos, "sin": buffers.sin}
    layout = {
        "x": (dtype, (tokens, (heads + 2 * key_heads) * width)),
        **dict.fromkeys(("keys", "values"), (dtype, (held, key_heads, room, width))),
        **dict.fromkeys(("cos", "sin"), (dtype, (tokens, width // 2))),
    }
    counts = {"tokens": tokens, "apart": apart, "heads": heads, "key_heads": key_heads, "width": width}
    task = task_of(TurnTask, tensors, layout, **counts, room=room, begin=begin)
    Kernel(compiled(write_turn, kinds_here()[0], _in_bf16(buffers.x)), task, tensors)()
