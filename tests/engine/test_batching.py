"""Many answers at once are the answers that each prompt gets alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.engines import SAMPLING, picture, requests, same_as_alone
from helpers.families import FAMILIES

from llava_cli import Answer, Conversation, Sampling
from llava_cli.engine import Request
from llava_cli.engine.forward import Forward
from llava_cli.engine.generate.batch import PREFILL_TOKENS, Batch
from llava_cli.engine.generate.prompt_cache import PromptCache
from llava_cli.engine.generate.scheduler import Scheduler
from llava_cli.engine.generate.sequence import Sequence
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import LlavaError, PromptTooLong

Engines = Callable[[str], LocalEngine]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being prepared is waited for, on however slow a machine."""
    monkeypatch.setattr("llava_cli.engine.local.GATHER_SECONDS", 60.0)


@pytest.mark.parametrize(
    "family, size",
    [*((family, 3) for family in FAMILIES), ("llava-llama", 1), ("llava-llama", None), ("smolvlm", None)],
)
def test_answers_are_those_alone(family: str, size: int | None, engines: Engines) -> None:
    same_as_alone(engines(family), requests(), size)


def test_answers_of_different_lengths(engines: Engines) -> None:
    asked = [Request(r.conversation, Sampling(max_tokens=n)) for n, r in enumerate(requests(), 1)]
    same_as_alone(engines("llava-llama"), asked, 4)


def test_sampling_with_a_seed_and_stop_texts(engines: Engines) -> None:
    engine = engines("llava-llama")
    text = engine.answer(requests()[0].conversation, SAMPLING).text
    for sampling in (Sampling(max_tokens=8, temperature=1.0, seed=7), Sampling(max_tokens=12, stop=(text[3:5],))):
        same_as_alone(engine, requests(sampling), 3)


def test_repetition_penalty(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines("llava-llama")
    monkeypatch.setattr(engine.network.generation_config, "repetition_penalty", 1.5)
    same_as_alone(engine, requests(), 4)


@pytest.mark.usefixtures("patient")
def test_a_picture_is_read_once(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = engines("llava-llama"), []
    forward = Forward.__call__

    def counting(self: Forward, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        seen.append(len(inputs.get("pixel_values", ())))
        return forward(self, inputs, *args)

    monkeypatch.setattr(Forward, "__call__", counting)
    one = picture(60, 60)
    asked = [Request(Conversation().ask(f"what is {n}?", [one]), SAMPLING) for n in range(10)]
    assert len(dict(engine.answer_many(asked))) == 10
    assert sum(seen) == 1


def test_pictures_come_and_go(engines: Engines) -> None:
    """Each lives only as long as it is wanted, and the next one may stand where it stood in memory."""
    engine = engines("llava-llama")

    def asked() -> Iterator[Request]:
        for seed in range(40):
            yield Request(Conversation().ask("what is this?", [picture(60, 60, seed)]), SAMPLING)

    alone = [engine.answer(request.conversation, request.sampling).text for request in asked()]
    found = dict(engine.answer_many(asked(), 8))
    assert [found[n].text for n in range(40)] == alone  # type: ignore[union-attr]


def test_what_cannot_be_answered_is_said_and_the_rest_goes_on(engines: Engines) -> None:
    asked = requests()
    asked[2] = Request(Conversation().ask("why? " * 9000), SAMPLING)
    found = dict(engines("llava-llama").answer_many(asked, 3))
    assert isinstance(found.pop(2), PromptTooLong)
    assert all(isinstance(answer, Answer) for answer in found.values()) and len(found) == len(asked) - 1


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("most", [5, 2, 1])
def test_out_of_memory_halves_the_batch_and_loses_no_row(
    most: int, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device with room for so many rows; torch says so as a CPU does."""
    engine, forward, sizes = engines("llava-llama"), Forward.__call__, []
    alone = [engine.answer(request.conversation, request.sampling).text for request in requests()]

    def small(self: Forward, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return forward(self, inputs, *args)

    monkeypatch.setattr(Forward, "__call__", small)
    found = dict(engine.answer_many(requests(), 8))
    assert [found[n].text for n in range(len(alone))] == alone  # type: ignore[union-attr]
    assert max(sizes) > most


def test_memory_for_not_even_one_row_is_that_rows_error(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Forward, *args: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Forward, "__call__", none)
    found = dict(engines("llava-llama").answer_many(requests(), 4))
    assert len(found) == len(requests())
    assert {type(error).__name__ for error in found.values()} == {"OutOfMemory"}


@pytest.mark.usefixtures("patient")
def test_no_more_are_begun_once_it_should_stop(engines: Engines) -> None:
    begun: list[int] = []

    def endless() -> Iterator[Request]:
        while True:
            begun.append(len(begun))
            yield requests()[0]

    done: list[int] = []
    for number, _ in engines("llava-llama").answer_many(endless(), 4, go_on=lambda: not done):
        done.append(number)
    assert done == [0, 1, 2, 3]  # those that had been begun
    assert len(begun) < 100


def test_on_a_gpu_who_is_being_answered_waits_for_one_pass_over_new_prompts(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, asked = engines("llava-llama"), requests(Sampling(max_tokens=8))
    alone = [engine.answer(request.conversation, request.sampling).text for request in asked]
    waiting = [engine.prepare(number, request) for number, request in enumerate(asked)]
    most = max(len(sequence.prompt) for sequence in waiting)
    monkeypatch.setitem(PREFILL_TOKENS, "cpu", most)
    joined: list[int] = []
    join = Batch.join

    def recording(self: Batch, sequences: list[Sequence]) -> None:
        joined.append(sum(len(sequence.prompt) for sequence in sequences))
        join(self, sequences)

    monkeypatch.setattr(Batch, "join", recording)
    prompts = PromptCache(1 << 24, engine.network.config.image_token_id)
    scheduler, found = Scheduler(engine.network, 16, prompts), dict[int, str]()
    scheduler.add(waiting[0])
    scheduler.step()
    for sequence in waiting[1:]:
        scheduler.add(sequence)
    while scheduler.running or scheduler.waiting:
        found |= {number: answer.text for number, answer in scheduler.step() if isinstance(answer, Answer)}
    assert len(joined) > 2
    assert max(joined) <= most
    assert [found[number] for number in sorted(found)] == alone


def test_an_error_of_the_requests_is_not_swallowed(engines: Engines) -> None:
    def broken() -> Iterator[Request]:
        yield requests()[0]
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(engines("llava-llama").answer_many(broken()))


def test_families_that_cannot_stand_in_rows_answer_one_by_one(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_cli.engine.local.can_batch", lambda model, inputs: False)
    same_as_alone(engines("llava-llama"), requests(), 4)


def test_errors_reach_the_caller_as_ours(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: Forward, *args: Any) -> torch.Tensor:
        raise RuntimeError("a matrix of the wrong shape")

    monkeypatch.setattr(Forward, "__call__", breaks)
    with pytest.raises(LlavaError, match="fails while answering"):
        list(engines("llava-llama").answer_many(requests()))
