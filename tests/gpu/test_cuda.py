"""What is asked of CUDA, held against what it allows: a stand-in keeps torch's rules of streams, graphs and pools."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from weakref import finalize

import pytest
import torch
from helpers.engines import CONVERSATIONS, ours
from helpers.static_steps import Recorder

import llava_cli
from llava_cli import Sampling, render
from llava_cli.engine.gpu import cuda, decode_graphs, patch
from llava_cli.engine.local import LocalEngine
from llava_cli.engine.model_patch import ModelPatch

Engines = Callable[[str], LocalEngine]


class Card:
    """`torch.cuda` of a card that computes nothing: the rules for streams, captures and their pools."""

    def __init__(self) -> None:
        self.stream_now, self.capturing = "usual", False
        self.pools: Counter[int] = Counter()
        """Graphs by pool; one that has lost its last graph is refused, as by torch's allocator."""
        self.log: list[str] = []
        self.ends_badly = False

    class CUDAGraph:
        def replay(self) -> None:
            """Computes nothing."""

    def Stream(self) -> Stream:  # noqa: N802  torch's name
        return Stream(self, f"side {sum(line == 'stream' for line in self.log) + self.note('stream')}")

    def note(self, line: str) -> int:
        self.log.append(line)
        return 0

    def current_stream(self) -> Stream:
        return Stream(self, self.stream_now)

    def set_stream(self, stream: Stream) -> None:
        self.stream_now = stream.name

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream.name
        yield
        self.stream_now = before

    def graph_pool_handle(self) -> int:
        self.pools[len(self.pools)] = 0
        return len(self.pools) - 1

    @contextmanager
    def graph(self, graph: Any, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local" and not self.capturing
        was_used = f"pool {pool}" in self.log
        assert not was_used or self.pools[pool] > 0, "it->second->use_count > 0 INTERNAL ASSERT FAILED"
        self.pools[pool] += 1
        finalize(graph, self.pools.subtract, [pool])
        self.note(f"pool {pool}")
        before, self.stream_now, self.capturing = self.stream_now, stream.name, True
        try:
            yield
        finally:
            self.capturing = False
            if self.ends_badly:  # torch leaves the stream as it is then
                raise RuntimeError("operation failed due to a previous error during capture")
            self.stream_now = before


class Stream:
    def __init__(self, card: Card, name: str) -> None:
        self.card, self.name = card, name

    def wait_stream(self, other: Stream) -> None:
        self.card.note(f"{self.name} waits for {other.name}")


class Step:
    def __init__(self, card: Card) -> None:
        self.card = card

    def compute(self) -> None:
        self.card.note(f"{'captured' if self.card.capturing else 'computed'} on {self.card.stream_now}")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    one = Card()
    for name in ("Stream", "current_stream", "set_stream", "stream", "graph_pool_handle", "graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(one, name))
    return one


def test_all_graphs_are_captured_on_one_stream_after_it_has_warmed_up(card: Card) -> None:
    capture, step = cuda.cuda_capture(), Step(card)
    kept = [capture(step), capture(step)]  # type: ignore[arg-type]
    one = [
        "side 0 waits for usual",
        *["computed on side 0"] * 2,
        "usual waits for side 0",
        "pool 0",
        "captured on side 0",
    ]
    assert card.log == ["stream", *one, *one]
    assert card.stream_now == "usual"
    assert len(kept) == 2


def test_a_pool_whose_graphs_are_gone_is_not_used_again(card: Card) -> None:
    """As when the KV cache grows, and all graphs with it."""
    capture, step = cuda.cuda_capture(), Step(card)
    for pool in (0, 1, 2):
        kept = [capture(step), capture(step)]  # type: ignore[arg-type]
        assert card.pools[pool] == 2
        kept.clear()
        gc.collect()


@pytest.mark.parametrize("at_the_end", [True, False])
def test_a_capture_that_fails_leaves_the_usual_stream(at_the_end: bool, card: Card) -> None:
    """And its graph, which torch's allocator may still refer to."""
    capture, step, card.ends_badly = cuda.cuda_capture(), Step(card), at_the_end

    def failing() -> None:
        if card.capturing and not at_the_end:
            raise RuntimeError("operation not permitted when stream is capturing")

    step.compute = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        capture(step)  # type: ignore[arg-type]
    assert card.stream_now == "usual"
    gc.collect()
    assert card.pools[0] == 1


def test_no_import_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would take a context on every card, and would break processes that are forked later."""

    def asked(*args: object, **options: object) -> None:
        raise AssertionError("CUDA was asked")

    for name in ("_lazy_init", "is_available", "device_count", "current_device", "mem_get_info", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, asked)
    before = {name for name in sys.modules if name.partition(".")[0] == "llava_cli"}
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    names = [module.name for module in pkgutil.walk_packages(llava_cli.__path__, "llava_cli.")]
    other = () if find_spec("llvmlite") else ("llava_cli.engine.cpu",)  # which only that library makes useful
    for name in names:
        if not name.endswith("__main__") and not name.startswith(other):
            importlib.import_module(name)
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "llava_cli":
            del sys.modules[name]
    assert {"llava_cli.engine.gpu.cuda", "llava_cli.server.run"} < {*names}


def test_stats_and_doctor_say_how_tokens_are_made(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    one, recorder = engines("llava-llama"), Recorder()
    monkeypatch.setattr(cuda, "cuda_capture", lambda: recorder)
    cudnn = list[bool]()
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with one.patch.undone():
        changes = ModelPatch()
        patch.accelerate(one.network, changes)
        assert (cudnn, torch.backends.cudnn.allow_tf32) == ([False], False)
        engine = LocalEngine(one.model, one.network, one.prompter, one.precision, 0, changes)
        engine.device = "cuda"
        monkeypatch.setattr(engine, "peak_memory", lambda: 10**9)
        said = []
        for capacity in (1024, 512):  # the other way round the cache would grow, and lose its graphs
            said.append(engine.decoding)
            monkeypatch.setattr(decode_graphs, "LEAST_CAPACITY", capacity)
            answer = engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=24))
        assert "captured, 2 shapes" in render.stats(answer, engine)
        assert said == ["captured after a few tokens", "captured, 1 shape"]
        with engine.patch.undone():
            assert engine.decoding == "launched kernel by kernel: as transformers does"
            assert ours(engine, CONVERSATIONS["one"], Sampling())
        engine.network.decode_graphs.problem = "each layer in 8 bits waits for the host"
        assert engine.decoding.startswith("launched kernel by kernel: each layer")
        changes.undo()
