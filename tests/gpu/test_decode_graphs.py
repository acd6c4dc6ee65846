"""The step that a GPU captures, computed as it is: its tokens are those of the plain path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.engines import CONVERSATIONS, ours, picture, requests, same, same_as_alone
from helpers.families import FAMILIES
from helpers.static_steps import Recorder, stepping

from llava_cli import Sampling
from llava_cli.engine import Request
from llava_cli.engine.gpu import decode_graphs, static_attention
from llava_cli.engine.gpu.decode_step import DecodeStep
from llava_cli.engine.local import LocalEngine

Engines = Callable[[str], LocalEngine]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short answer outgrows them."""
    monkeypatch.setattr(decode_graphs, "LEAST_CAPACITY", 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_plain_path(family: str, engines: Engines) -> None:
    engine = engines(family)
    with engine.patch.undone():
        expected = {case: ours(engine, talk, Sampling()) for case, talk in CONVERSATIONS.items()}
    with stepping(engine) as graphs:
        assert {case: ours(engine, talk, Sampling()) for case, talk in CONVERSATIONS.items()} == expected
        assert graphs.shapes or not engine.can_batch(engine.prepare(0, Request(CONVERSATIONS["one"], Sampling())))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_and_leave(family: str, engines: Engines) -> None:
    engine = engines(family)
    with stepping(engine, Recorder()):
        for size in (1, 3, None):
            same_as_alone(engine, requests(Sampling(max_tokens=12)), size)


def test_a_shape_is_captured_once_and_replayed(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "LEAST_CAPACITY", 512)
    engine, capture = engines("llava-llama"), Recorder()
    with stepping(engine, capture) as graphs:
        steps = sum(len(ours(engine, CONVERSATIONS["one"], Sampling())) - 1 for _ in range(3))
        assert (capture.captured, graphs.captured) == (1, 1)
        assert capture.replayed == steps - decode_graphs.CAPTURE_AFTER + 1


def test_what_cannot_be_captured_is_computed(engines: Engines) -> None:
    engine = engines("llava-llama")
    with engine.patch.undone():
        expected = ours(engine, CONVERSATIONS["one"], Sampling())
    with stepping(engine, Recorder(fails=True)) as graphs:
        assert [ours(engine, CONVERSATIONS["one"], Sampling()) for _ in range(2)] == [expected] * 2
        assert graphs.problem == "could not be captured (operation not permitted when stream is capturing)"
        assert not graphs.captured


def test_attention_of_another_kind_is_left_to_the_plain_path(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines("llava-llama")
    with engine.patch.undone():
        expected = ours(engine, CONVERSATIONS["one"], Sampling())

    def attend(*args: object, **options: object) -> None:
        raise static_attention.Unsupported("attention with s_aux")

    monkeypatch.setattr(static_attention, "attend", attend)
    with stepping(engine, Recorder()) as graphs:
        assert ours(engine, CONVERSATIONS["one"], Sampling()) == expected
        assert (graphs.problem, graphs.shapes) == ("attention with s_aux", 0)


def test_graphs_that_are_used_least_are_dropped(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "MAX_GRAPHS", 1)
    monkeypatch.setattr(decode_graphs, "CAPTURE_AFTER", 1)
    engine = engines("llava-llama")
    with stepping(engine, Recorder()) as graphs:
        same_as_alone(engine, requests(Sampling(max_tokens=12)), 3)
        assert graphs.captured == 1


def test_a_conversation_goes_on_where_it_is_and_another_one_moves_it_out(engines: Engines) -> None:
    one = engines("llava-llama")
    with stepping(one, Recorder()):
        kept, *fresh = (LocalEngine(one.model, one.network, one.prompter, one.precision, 0) for _ in range(7))
        talk = CONVERSATIONS["one"]
        for turn, question in enumerate(("what color is it?", "and why?", "and this?", "is it?")):
            answer = same(kept, fresh[turn], talk)
            pictures = [picture(80, 50, 3)] if turn == 2 else []
            talk = talk.answered(answer.text).ask(question, pictures)
            if turn == 1:  # in between, in the same buffers
                fresh[5].answer(CONVERSATIONS["tall"], Sampling(max_tokens=5))
        assert same(kept, fresh[4], talk).cached_tokens > 0


def test_without_memory_for_static_buffers_the_plain_path_answers(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines("llava-llama")
    with engine.patch.undone():
        expected = ours(engine, CONVERSATIONS["one"], Sampling())
    monkeypatch.setattr(decode_graphs, "free_memory", lambda device, cards: 1000)
    with stepping(engine, Recorder()) as graphs:
        assert ours(engine, CONVERSATIONS["one"], Sampling()) == expected
        assert not graphs.shapes


@pytest.mark.parametrize("name, when", [("set_inputs", 3), ("compute", 5), ("outputs", 7)])
def test_an_interrupted_answer_leaves_the_engine_usable(
    name: str, when: int, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines("llava-llama")
    expected = engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=12)).text
    calls: list[int] = []
    method = getattr(DecodeStep, name)

    def interrupting(self: DecodeStep, *args: object) -> object:
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return method(self, *args)

    monkeypatch.setattr(DecodeStep, name, interrupting)
    with stepping(engine):
        with pytest.raises(KeyboardInterrupt):
            engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=12))
        assert engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=12)).text == expected


class HostWaits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations for which a host waits for its GPU."""

    _WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "item")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self._WAITING:
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_waits_for_the_device_within_a_step(family: str, engines: Engines) -> None:
    engine = engines(family)
    waits: list[str] = []
    compute = DecodeStep.compute

    def counting(self: DecodeStep) -> None:
        with HostWaits() as mode:
            compute(self)
        waits.extend(mode.found)

    with stepping(engine), pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeStep, "compute", counting)
        same_as_alone(engine, requests(Sampling(max_tokens=6)), 3)
    assert waits == []
