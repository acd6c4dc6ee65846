"""The step that a GPU captures, where there is none: computed as it is, and recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_cli.engine.gpu.decode_graphs import DecodeGraphs
from llava_cli.engine.gpu.decode_step import DecodeStep, Shape
from llava_cli.engine.gpu.static_cache import KvArena
from llava_cli.engine.kv_cache import RoomyCache
from llava_cli.engine.local import LocalEngine


class Recorder:
    """Stands in for a device's capture: replays by computing again, and counts."""

    def __init__(self, fails: dict[int, str] | None = None) -> None:
        """`fails`: captures that fail, by their number from 0, and the words of their errors.

        Words before ": " are those of an error on the way, after which the capture could not be ended.
        """
        self.fails, self.begun, self.captured, self.replayed = fails or {}, 0, 0, 0

    def __call__(self, step: DecodeStep) -> Callable[[], object]:
        self.begun += 1
        if words := self.fails.get(self.begun - 1):
            *before, last = words.split(": ")
            try:
                for one in before:
                    raise RuntimeError(one)
            finally:
                raise RuntimeError(last)
        self.captured += 1
        step.compute()  # as a warm-up does

        def replay() -> None:
            self.replayed += 1
            step.compute()

        return replay


@contextmanager
def stepping(engine: LocalEngine, capture: Recorder | None = None) -> Iterator[DecodeGraphs]:
    """The engine decodes through static buffers meanwhile."""
    engine.network.decode_graphs = graphs = DecodeGraphs(engine.network, capture)
    try:
        with engine.patch.undone():
            yield graphs
    finally:
        del engine.network.decode_graphs


class Crossings(TorchDispatchMode):
    """Records the operations that take a tensor of the host's memory, beside the single numbers that a launch has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cpu" and x.dim() for x in tensors):
            self.found.append(func.overloadpacket.__name__)
        return out


def crossings_of_a_step(engine: LocalEngine, cache: RoomyCache) -> list[str]:
    """What a step over a cache would copy between host and device, on a device whose tensors have no values.

    Whatever would wait for the device raises, since it waits for a value.
    """
    far, arena, mode = RoomyCache(), KvArena(), Crossings()
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        far.update(layer.keys.to("meta"), layer.values.to("meta"), index)
    model = copy.deepcopy(engine.network).to("meta")
    arena.grow(far, 2, 512)
    step = DecodeStep(model, arena, far, Shape(2, 512))
    with mode:
        step.compute()
    return mode.found
