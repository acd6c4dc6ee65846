"""One token of one row through a decoder's layers: a step of an answer, in buffers that are made once.

A 1B in 4 bits computes 30 ms for a token, in 22 layers of two dozen operations each. What Python and torch do around
an operation, to make its output and to look at its inputs, was a fifth of that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_cli.engine.attention import one_token
from llava_cli.engine.cache import RoomyCache
from llava_cli.engine.int8 import Products
from llava_cli.engine.plain import Plain
from llava_cli.engine.tiles import Tiled

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.decoder import Group, Layer

Call = Callable[[], object]


class Step:
    """All layers of a decoder, which are of one shape."""

    def __init__(self, layers: list[Layer], dtype: torch.dtype) -> None:
        import torch

        first = layers[0]
        heads, key_heads = first.heads
        width, size, inner = first.width, first.hidden_size, first.inner_size
        self._x, self._read, self._out, gated, found, sources, turned = (
            torch.empty(1, numbers, dtype=dtype)
            for numbers in (
                size,
                size,
                size,
                2 * inner,
                heads * width,
                (heads + 2 * key_heads) * width,
                (heads + key_heads) * width,
            )
        )
        self._whole = torch.empty(size)  # in fp32
        both, value = torch.split(sources.view(-1, width), [heads + key_heads, key_heads])
        # Of each head the two halves that are turned with each other.
        self._halves = [both.view(-1, 2, width // 2), turned.view(-1, 2, width // 2)]
        self._first, self._second = (tuple(part[:, i] for part in self._halves) for i in (0, 1))
        query, key = torch.split(turned.view(-1, width), [heads, key_heads])
        shape = 1, key_heads, heads // key_heads, width
        self._attend = one_token(query.view(shape), found.view(shape), first.scaling)
        self._key, self._value = key.view(-1, 1, width), value.view(-1, 1, width)
        self._gate, self._up = gated.view(2, 1, -1)
        self._layers = [
            (
                layer,
                [
                    bound(layer.sources, self._read, sources),
                    bound(layer.out, found, self._out),
                    bound(layer.gated, self._read, gated),
                    bound(layer.down, self._gate, self._out),
                ],
            )
            for layer in layers
        ]

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: RoomyCache) -> torch.Tensor:
        """x [1, 1, hidden size], cos and sin [half of a head's width] -> what the last layer makes of it, like x."""
        import torch
        from torch.nn.functional import silu

        stream, out = self._x, self._out
        stream.copy_(x[0])
        (both, turned), (first, turned_first), (second, turned_second) = self._halves, self._first, self._second
        tokens = cache.get_seq_length() + 1
        for layer, (to_sources, to_out, to_gated, to_down) in self._layers:
            self._norm(layer.norms[0])
            to_sources()
            torch.mul(both, cos, out=turned)
            turned_first.addcmul_(second, sin, value=-1)
            turned_second.addcmul_(first, sin)
            keys, values = cache.layers[layer.number].append(self._key, self._value)
            self._attend(keys, values, tokens)
            to_out()
            stream.add_(out)
            self._norm(layer.norms[1])
            to_gated()
            silu(self._gate, inplace=True).mul_(self._up)
            to_down()
            stream.add_(out)
        return stream[None]

    def _norm(self, norm: Any) -> None:
        """Root mean square norm of the stream, to where the products read it."""
        import torch

        whole = self._whole
        whole.copy_(self._x[0])
        scale = (float(torch.dot(whole, whole)) / len(whole) + norm.variance_epsilon) ** -0.5
        torch.mul(self._x, scale, out=self._read).mul_(norm.weight)


def bound(group: Group, x: torch.Tensor, out: torch.Tensor) -> Call:
    """What writes to `out` [1, outputs of all] what a group's layers make of `x` [1, inputs] at that time."""
    import torch

    few = getattr(group.joined, "few", group.joined)
    if isinstance(few, Tiled):
        return few.bound(x, out)
    if isinstance(few, Products):
        return partial(_copied, few, x, out)
    calls: list[Call] = []
    for layer, part in zip(group.layers, torch.split(out, group.outputs, -1), strict=True):
        if plain := Plain.of(layer):
            calls.append(plain.bound(x, part))
        elif type(layer) is not torch.nn.Linear:
            calls.append(partial(_copied, layer, x, part))
        elif layer.bias is None:
            calls.append(partial(torch.mm, x, layer.weight.t(), out=part))
        else:
            calls.append(partial(torch.addmm, layer.bias, x, layer.weight.t(), out=part))
    return calls[0] if len(calls) == 1 else partial(_in_turn, calls)


def _copied(layer: Any, x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(layer(x))


def _in_turn(calls: list[Call]) -> None:
    for call in calls:
        call()
