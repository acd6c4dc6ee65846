"""The step that a GPU captures, computed as it is: its tokens are those of the plain path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.engines import CONVERSATIONS, ours, picture, requests, same, same_as_alone
from helpers.families import FAMILIES
from helpers.static_steps import Recorder, crossings_of_a_step, stepping
from helpers.tables import for_each

from llava_cli import Sampling
from llava_cli.engine import Request
from llava_cli.engine.generate.batch import Batch
from llava_cli.engine.gpu import decode_graphs, static_attention
from llava_cli.engine.gpu.decode_step import DecodeStep
from llava_cli.engine.kv_cache import RoomyLayer
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


@for_each(
    "words, problem, captured",
    [
        ("operation not permitted when stream is capturing", "could not be captured ({})", 0),
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", None, 1),
        ("CUDA out of memory. Tried to allocate 20.00 MiB.: operation failed due to a previous error", None, 1),
    ],
)
def test_what_cannot_be_captured_is_computed(words: str, problem: str | None, captured: int, engines: Engines) -> None:
    """For good, or where memory was short for one shape, until another one is captured."""
    engine, asked = engines("llava-llama"), [CONVERSATIONS["one"], CONVERSATIONS["wide"]]
    with engine.patch.undone():
        expected = [ours(engine, talk, Sampling()) for talk in asked]
    with stepping(engine, Recorder({0: words})) as graphs, pytest.MonkeyPatch.context() as patch:
        for talk, tokens, capacity in zip(asked, expected, (512, 1024), strict=True):
            patch.setattr(decode_graphs, "LEAST_CAPACITY", capacity)
            assert [ours(engine, talk, Sampling()) for _ in range(2)] == [tokens] * 2
        assert graphs.problem == (problem and problem.format(words))
        assert graphs.captured == captured


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
    monkeypatch.setattr(decode_graphs, "MAX_SHAPES", 1)
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
    asked: list[str] = []

    def free_memory(device: str, cards: list[int] | None) -> int:
        asked.append(device)
        return 1000

    monkeypatch.setattr(decode_graphs, "free_memory", free_memory)
    with stepping(engine, Recorder()) as graphs:
        assert ours(engine, CONVERSATIONS["one"], Sampling()) == expected
        assert not graphs.shapes
        assert len(asked) <= 3  # once for each capacity


@for_each(
    "kind, name, when",
    [
        (DecodeStep, "set_inputs", 3),
        (DecodeStep, "compute", 5),
        (DecodeStep, "outputs", 7),
        (RoomyLayer, "extend", 9),
        (RoomyLayer, "_set_size", 12),
        (RoomyLayer, "move_into", 1),
        (Recorder, "__call__", 1),
    ],
)
def test_an_interrupted_answer_leaves_the_engine_usable(
    kind: type[Any], name: str, when: int, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some layers, or keys and not values, have what others have not."""
    engine = engines("llava-llama")
    expected = engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=24)).text
    calls: list[int] = []
    method = getattr(kind, name)

    def interrupting(self: Any, *args: object) -> object:
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return method(self, *args)

    monkeypatch.setattr(kind, name, interrupting)
    with stepping(engine, Recorder()):
        with pytest.raises(KeyboardInterrupt):
            engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=24))
        for _ in range(2):
            assert engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=24)).text == expected


def test_where_memory_runs_out_in_the_midst_of_the_layers_a_smaller_batch_goes_on(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, made = engines("llava-llama"), list[int]()
    with engine.patch.undone():
        expected = [answer.text for _, answer in sorted(engine.answer_many(iter(requests()), 9))]
    zeros = torch.Tensor.new_zeros

    def failing(self: torch.Tensor, *sizes: Any, **options: Any) -> torch.Tensor:
        if self.dim() == 4:
            made.append(sizes[0])
            if len(made) == 3:  # the second layer's keys
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return zeros(self, *sizes, **options)

    monkeypatch.setattr(torch.Tensor, "new_zeros", failing)
    with stepping(engine) as graphs:
        found = [answer.text for _, answer in sorted(engine.answer_many(iter(requests()), 9))]
        assert found == expected
        assert made[3] < made[2]
        assert graphs.shapes


def test_an_answer_of_infinities_does_not_spoil_the_next(engines: Engines) -> None:
    """They are behind the mask, where 0 times infinity would be no number."""
    engine, asked = engines("llava-llama"), requests(Sampling(max_tokens=12))
    with engine.patch.undone():
        expected = [answer.text for _, answer in sorted(engine.answer_many(iter(asked), 4))]
    with stepping(engine, Recorder()) as graphs:
        for _ in range(2):
            assert [answer.text for _, answer in sorted(engine.answer_many(iter(asked), 4))] == expected
            with torch.inference_mode():
                for keys, values in graphs._arena._flat:
                    keys.fill_(torch.inf)
                    values.fill_(torch.inf)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_neither_waits_for_the_device_nor_copies_to_it(family: str, engines: Engines) -> None:
    """Neither can be captured."""
    engine = engines(family)
    sequence = engine.prepare(0, Request(CONVERSATIONS["one"], Sampling()))
    batch = Batch(engine.network)
    with engine.patch.undone(), torch.inference_mode():
        batch.join([sequence])
        assert crossings_of_a_step(engine, batch._cache) == []


def test_such_a_copy_would_be_found(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines("llava-llama")
    batch, compute = Batch(engine.network), DecodeStep.compute
    batch.join([engine.prepare(0, Request(CONVERSATIONS["one"], Sampling()))])

    def copying(self: DecodeStep) -> None:
        self._ids += torch.tensor([[1], [1]]).to(self._ids.device)
        compute(self)

    def waiting(self: DecodeStep) -> None:
        compute(self)
        int(self._column)

    with engine.patch.undone(), torch.inference_mode():
        monkeypatch.setattr(DecodeStep, "compute", copying)
        assert crossings_of_a_step(engine, batch._cache)
        monkeypatch.setattr(DecodeStep, "compute", waiting)
        with pytest.raises(RuntimeError, match="meta"):
            crossings_of_a_step(engine, batch._cache)
