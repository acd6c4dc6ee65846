"""Requests that come one after another and at once get the answers that each gets alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from helpers.engines import picture
from helpers.families import FAMILIES

from llava_cli import Answer, Conversation, Sampling
from llava_cli.conversation import Picture
from llava_cli.engine import Request
from llava_cli.engine.generate import scheduler
from llava_cli.engine.generate.batch import Batch
from llava_cli.engine.generate.prompt_cache import PromptCache
from llava_cli.engine.generate.sequence import Sequence, Token
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import LlavaError, ModelUnusable, OutOfMemory, PromptTooLong
from llava_cli.server.generation import GenerationService, PendingRequest

SAMPLING = Sampling(max_tokens=12)
TOGETHER = ("llava-onevision", "smolvlm", "smolvlm2")


class Listener:
    """What one request was told."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Token | Answer | LlavaError] = queue.SimpleQueue()
        self.put = self._events.put
        self.tokens: list[Token] = []

    def first(self) -> Token:
        event = self._events.get(timeout=60)
        assert isinstance(event, Token)
        self.tokens.append(event)
        return event

    def end(self) -> Answer:
        while isinstance(event := self._events.get(timeout=60), Token):
            self.tokens.append(event)
        if isinstance(event, LlavaError):
            raise event
        assert "".join(token.text for token in self.tokens) == event.text
        return event


def seen(number: int) -> Picture:
    return replace(picture(60 + 30 * (number % 3), 60, number), sha256=f"{number}")


def begin(
    service: GenerationService, conversation: Conversation, sampling: Sampling = SAMPLING
) -> tuple[Listener, PendingRequest]:
    listener = Listener()
    return listener, service.submit(Request(conversation, sampling), listener.put)


def ask(service: GenerationService, conversation: Conversation, sampling: Sampling = SAMPLING) -> Answer:
    return begin(service, conversation, sampling)[0].end()


@pytest.fixture
def service(engines: Callable[[str], LocalEngine]) -> Iterator[Callable[[str], GenerationService]]:
    begun: list[GenerationService] = []

    def get(family: str) -> GenerationService:
        begun.append(GenerationService(engines(family)))
        return begun[-1]

    yield get
    for one in begun:
        one.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_that_grow_beside_each_other(
    family: str, service: Callable[[str], GenerationService], engines: Callable[[str], LocalEngine]
) -> None:
    """What was read is not read again, and the answers are those of an engine that reads all of it."""
    engine, serving = engines(family), service(family)
    talks = [Conversation().ask("what is this?", [seen(i)] if i else []) for i in range(4)]
    for turn in range(3):
        expected = [engine.answer(talk, SAMPLING).text for talk in talks]
        answers = [listener.end() for listener, _ in [begin(serving, talk) for talk in talks]]
        assert [answer.text for answer in answers] == expected
        if turn and engine.can_batch(engine.prepare(0, Request(talks[1], SAMPLING))):
            found = [answer.cached_tokens > 8 for answer in answers]
            # Of some families the pictures' tensors do not say which are whose: one more, and all is read.
            assert found == [True, True, family not in TOGETHER or turn > 1, True]
        more = [[seen(7)] if turn == 0 and i == 2 else [] for i in range(4)]
        talks = [
            talk.answered(text).ask(f"and then, {turn}?", new)
            for talk, text, new in zip(talks, expected, more, strict=True)
        ]


def test_another_picture_is_another_prompt(
    service: Callable[[str], GenerationService], engines: Callable[[str], LocalEngine]
) -> None:
    serving = service("llava-llama")
    for number in (1, 4, 1):
        talk = Conversation().ask("what is this?", [seen(number)])
        assert ask(serving, talk).text == engines("llava-llama").answer(talk, SAMPLING).text
    assert ask(serving, talk).cached_tokens > 8


def test_confidence_and_sight(
    service: Callable[[str], GenerationService], engines: Callable[[str], LocalEngine]
) -> None:
    """Of a request that is answered to its end; of one that is cancelled, nothing is left."""
    serving, asked = service("llava-llama"), replace(SAMPLING, confidence=True, sight=True)
    talk = Conversation().ask("what is this?", [seen(1)])
    _, gone = begin(serving, talk, replace(asked, max_tokens=600))
    serving.cancel(gone)
    found, alone = ask(serving, talk, asked), engines("llava-llama").answer(talk, asked)
    assert found.confidence and alone.confidence and serving.running == 0
    assert found.confidence.mean == pytest.approx(alone.confidence.mean, abs=1e-5)
    assert found.sight == pytest.approx(alone.sight, abs=1e-4)


def test_who_comes_later_does_not_wait(service: Callable[[str], GenerationService]) -> None:
    """It joins at the next step, and may be answered before those that were there."""
    serving = service("llava-llama")
    long, _ = begin(serving, Conversation().ask("what is this?", [seen(1)]), Sampling(max_tokens=600))
    long.first()
    assert ask(serving, Conversation().ask("and this?", [seen(2)]), Sampling(max_tokens=2)).answer_tokens == 2
    assert serving.running == 1
    assert long.end().answer_tokens == 600


def test_who_leaves_frees_the_place(service: Callable[[str], GenerationService]) -> None:
    serving = service("llava-llama")
    listener, asked = begin(serving, Conversation().ask("what is this?", [seen(1)]), Sampling(max_tokens=1900))
    listener.first()
    serving.cancel(asked)
    serving.cancel(asked)
    assert ask(serving, Conversation().ask("and this?", [seen(2)])).answer_tokens == 12
    assert serving.running == 0


def test_sampling_is_each_request_s_own(
    service: Callable[[str], GenerationService], engines: Callable[[str], LocalEngine]
) -> None:
    serving, talk = service("llava-llama"), Conversation().ask("what is this?", [seen(1)])
    many = [Sampling(max_tokens=12, temperature=0.8, seed=seed) for seed in (1, 2, 1)] + [SAMPLING]
    answers = [listener.end().text for listener, _ in [begin(serving, talk, one) for one in many]]
    assert answers == [engines("llava-llama").answer(talk, one).text for one in many]
    assert answers[0] == answers[2] != answers[1]


def test_likelihoods(service: Callable[[str], GenerationService], engines: Callable[[str], LocalEngine]) -> None:
    serving, listener = service("llava-llama"), Listener()
    talk = Conversation().ask("what is this?", [seen(1)])
    serving.submit(Request(talk, SAMPLING), listener.put, top_logprobs=3)
    answer = listener.end()
    first = listener.tokens[0].likelihood
    logits = engines("llava-llama").logits(engines("llava-llama").inputs(talk))[0]
    assert first
    assert first.token == int(logits.argmax())
    assert abs(first.logprob - float(logits.log_softmax(-1).max())) < 1e-4
    assert len(first.top) == 3
    assert first.top[0] == (first.token, first.logprob)
    assert sum(token.likelihood is not None for token in listener.tokens) == answer.answer_tokens


def test_a_prompt_that_is_too_long_is_refused_before_it_waits(service: Callable[[str], GenerationService]) -> None:
    with pytest.raises(PromptTooLong):
        ask(service("llava-llama"), Conversation().ask("what? " * 4000))


def test_where_memory_runs_out_answers_go_on_in_smaller_batches(
    service: Callable[[str], GenerationService], engines: Callable[[str], LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what had been shown of them is not shown again."""
    step = Batch.step
    tripped: list[int] = []
    all_there = threading.Event()

    def runs_out(self: Batch) -> object:
        all_there.wait()
        if len(self.sequences) > 2 and len(self.sequences[0].ids) > len(self.sequences[0].prompt) + 4:
            tripped.append(len(self.sequences))
            raise MemoryError
        return step(self)

    monkeypatch.setattr(Batch, "step", runs_out)
    serving = service("llava-llama")
    talks = [Conversation().ask("what is this?", [seen(i)]) for i in range(4)]
    begun = [begin(serving, talk) for talk in talks]
    all_there.set()
    answers = [listener.end().text for listener, _ in begun]
    assert tripped
    assert answers == [engines("llava-llama").answer(talk, SAMPLING).text for talk in talks]


@pytest.mark.parametrize("error, told", [(MemoryError, OutOfMemory), (RuntimeError, ModelUnusable)])
def test_a_failure_is_told_to_all_and_the_next_is_answered(
    error: type[Exception],
    told: type[LlavaError],
    service: Callable[[str], GenerationService],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(self: Batch) -> object:
        raise error("no")

    serving, talk = service("llava-llama"), Conversation().ask("what is this?", [seen(1)])
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "step", fails)
        with pytest.raises(told):
            ask(serving, talk)
    assert ask(serving, talk).answer_tokens == 12


def answer_all(running: scheduler.Scheduler) -> None:
    while running.waiting or running.running:
        running.step()


def prepared(engine: LocalEngine, number: int, question: str = "what is this?") -> Sequence:
    return engine.prepare(number, Request(Conversation().ask(question, [seen(number)]), SAMPLING))


def test_what_is_cached_stays_within_its_budget(engines: Callable[[str], LocalEngine]) -> None:
    engine = engines("llava-llama")
    cache = PromptCache(150_000, engine.network.config.image_token_id)
    running = scheduler.Scheduler(engine.network, None, cache)
    for number in range(12):
        running.add(prepared(engine, number))
        answer_all(running)
        assert 0 < cache.nbytes <= 150_000
    assert cache.find(prepared(engine, 11))
    assert cache.find(prepared(engine, 0)) is None
    cache.clear()
    assert cache.find(prepared(engine, 11)) is None


def test_prompts_are_cached_without_their_padding(engines: Callable[[str], LocalEngine]) -> None:
    """Beside a longer one, a prompt has columns on its left that mean nothing."""
    engine = engines("llava-llama")
    cache = PromptCache(10**9, engine.network.config.image_token_id)
    running = scheduler.Scheduler(engine.network, None, cache)
    sequences = [prepared(engine, times, "what? " * times) for times in (1, 9)]
    for sequence in sequences:
        running.add(sequence)
    answer_all(running)
    for sequence in sequences:
        prefix = cache.find(sequence)
        assert prefix
        assert prefix.length == len(sequence.ids) - 1
        layers = prefix.take_cache().layers
        assert {layer.get_seq_length() for layer in layers} == {prefix.length}
        assert all(torch.isfinite(layer.values).all() for layer in layers)


@pytest.mark.parametrize(("patience", "joined"), [(float("inf"), [5, 5, 5, 8]), (0.0, [5, 6, 7, 8])])
def test_a_few_wait_a_moment_for_others_to_join_with(
    patience: float, joined: list[int], engines: Callable[[str], LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until they are half as many as are being answered; nobody waits where nothing runs."""
    monkeypatch.setattr(scheduler, "GATHER_SECONDS", patience)
    engine = engines("llava-llama")
    running = scheduler.Scheduler(engine.network, None, PromptCache(10**9, engine.network.config.image_token_id))

    def put(number: int) -> None:
        talk = Conversation().ask("what is this?", [seen(number)])
        running.add(engine.prepare(number, Request(talk, replace(SAMPLING, max_tokens=60))))

    for number in range(5):
        put(number)
    counts = []
    for number in range(5, 9):
        running.step()
        counts.append(running.running)
        put(number)
    assert counts == joined
