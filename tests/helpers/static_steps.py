"""The step that a GPU captures, where there is none: computed as it is, and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llava_cli.engine.gpu.decode_graphs import DecodeGraphs
from llava_cli.engine.gpu.decode_step import DecodeStep
from llava_cli.engine.local import LocalEngine


class Recorder:
    """Stands in for a device's capture: replays by computing again, and counts."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.captured, self.replayed = fails, 0, 0

    def __call__(self, step: DecodeStep) -> Callable[[], object]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
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
