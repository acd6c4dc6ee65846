"""One token of each of few rows through a decoder's layers: a step of their answers, in buffers that are made once.

A 1B in 4 bits computes 30 ms for a token, in 22 layers. What Python and torch do around two dozen operations of each,
to make their outputs and to look at their inputs, was a fifth of that; here it is a chain of kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from llava_cli.engine.attention import OneToken
from llava_cli.engine.cache import RoomyCache, RoomyLayer
from llava_cli.engine.kernels import COLUMNS, WIDTH
from llava_cli.engine.kernels.compiled import Kernel, chained, compiled, kinds_here
from llava_cli.engine.plain import Plain
from llava_cli.engine.tiles import Room, Tiled

if TYPE_CHECKING:
    import torch

    from llava_cli.engine.decoder import Group, Layer

Call = Callable[[], object]


class Step:
    """All layers of a decoder, which are of one shape, and the norm behind them."""

    def __init__(self, layers: list[Layer], norm: Any, rows: int) -> None:
        import torch

        first = layers[0]
        heads, key_heads = first.heads
        width, size, inner = first.width, first.hidden_size, first.inner_size

        def buffer(numbers: int) -> torch.Tensor:
            return torch.empty(rows, numbers, dtype=norm.weight.dtype)

        self._x, self._out, self._read = buffer(size), buffer(size), buffer(size)
        self._cos, self._sin = buffer(width // 2), buffer(width // 2)
        sources, found = buffer((heads + 2 * key_heads) * width), buffer(heads * width)
        gated, given = buffer(2 * inner), buffer(inner)
        shape = rows, key_heads, heads // key_heads, width
        angles, room, calls = (self._cos, self._sin), Room(), list[Call]()
        self._attending: list[tuple[int, OneToken]] = []
        for layer in layers:
            attention = OneToken(sources, found.view(shape), layer.scaling, angles)
            self._attending.append((layer.number, attention))
            calls += [self._normed(layer.norms[0]), *bound(layer.sources, self._read, sources, room)]
            calls += [attention.kernel, *bound(layer.out, found, self._out, room)]
            calls += [self._normed(layer.norms[1]), *bound(layer.gated, self._read, gated, room)]
            calls += [_gate(gated, given), *bound(layer.down, given, self._out, room)]
        self._calls = chained([*calls, self._normed(norm)])

    @staticmethod
    def suits(layers: list[Layer], norm: Any) -> bool:
        """Whether it is there for such layers on this CPU."""
        import torch

        first = layers[0]
        whole = first.width % (2 * WIDTH) == first.hidden_size % COLUMNS == first.inner_size % WIDTH == 0
        known = norm.weight.device.type == "cpu" and norm.weight.dtype in (torch.bfloat16, torch.float32)
        return whole and known and bool(kinds_here())

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: RoomyCache, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """x [rows, 1, hidden size], cos and sin [rows, half of a head's width] -> what the norm makes of it, like x.

        `seen` [rows, tokens] is true where one is, this one among them; None is all.
        """
        tokens = cache.get_seq_length() + 1
        self._x.copy_(x[:, 0])
        self._out.zero_()
        self._cos.copy_(cos)
        self._sin.copy_(sin)
        for number, attention in self._attending:
            keys, values = cast("RoomyLayer", cache.layers[number]).grow()
            attention.over(keys, values, tokens, seen)
        for call in self._calls:
            call()
        return self._read[:, None].clone()

    def _normed(self, norm: Any) -> Kernel:
        """Adds what was found last to the stream, and norms it for the next products."""
        from llava_cli.engine.kernels.layer import NormTask, write_norm

        tensors = {"x": self._x, "more": self._out, "weight": norm.weight.data, "out": self._read}
        places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        tokens, width = self._x.shape
        run = compiled(write_norm, kinds_here()[0], _in_bf16(self._x), norm.variance_epsilon)
        return Kernel(run, NormTask(**places, tokens=tokens, width=width, threads=1), tensors)


def _gate(gated: torch.Tensor, out: torch.Tensor) -> Kernel:
    from llava_cli.engine.kernels.layer import GateTask, write_gate

    task = GateTask(x=gated.data_ptr(), out=out.data_ptr(), tokens=len(out), width=out.shape[1], threads=1)
    return Kernel(compiled(write_gate, kinds_here()[0], _in_bf16(out)), task, (gated, out))


def _in_bf16(numbers: torch.Tensor) -> bool:
    import torch

    return numbers.dtype == torch.bfloat16


def bound(group: Group, x: torch.Tensor, out: torch.Tensor, room: Room) -> list[Call]:
    """What writes to `out` [rows, outputs of all] what a group's layers make of `x` [rows, inputs] at that time."""
    import torch

    few = getattr(group.joined, "few", group.joined)
    if isinstance(few, Tiled):
        return [few.bound(x, out, room)]
    if few is not None:
        return [partial(_copied, few, x, out)]
    parts = zip(group.layers, torch.split(out, group.outputs, -1), strict=True)
    return [
        plain.bound(x, part) if (plain := Plain.of(layer)) else partial(_copied, layer, x, part)
        for layer, part in parts
    ]


def _copied(layer: Any, x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(layer(x))
