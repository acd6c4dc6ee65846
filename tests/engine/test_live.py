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
from llava_cli.engine.generate.batch import Batch, Token
from llava_cli.engine.generate.live import Asked, Live
from llava_cli.engine.generate.prompt_cache import Kept
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import LlavaError, ModelUnusable, OutOfMemory, PromptTooLong

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


def begin(live: Live, conversation: Conversation, sampling: Sampling = SAMPLING) -> tuple[Listener, Asked]:
    listener = Listener()
    return listener, live.ask(Request(conversation, sampling), listener.put)


def ask(live: Live, conversation: Conversation, sampling: Sampling = SAMPLING) -> Answer:
    return begin(live, conversation, sampling)[0].end()


@pytest.fixture
def live(engines: Callable[[str], LocalEngine]) -> Iterator[Callable[[str], Live]]:
    begun: list[Live] = []

    def get(family: str) -> Live:
        begun.append(Live(engines(family)))
        return begun[-1]

    yield get
    for one in begun:
        one.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_that_grow_beside_each_other(
    family: str, live: Callable[[str], Live], engines: Callable[[str], LocalEngine]
) -> None:
    """What was read is not read again, and the answers are those of an engine that reads all of it."""
    engine, serving = engines(family), live(family)
    talks = [Conversation().ask("what is this?", [seen(i)] if i else []) for i in range(4)]
    for turn in range(3):
        expected = [engine.answer(talk, SAMPLING).text for talk in talks]
        answers = [listener.end() for listener, _ in [begin(serving, talk) for talk in talks]]
        assert [answer.text for answer in answers] == expected
        if turn and serving.engine._prefix.can_part(engine.inputs(talks[1])):
            found = [answer.cached_tokens > 8 for answer in answers]
            # Of some families the pictures' tensors do not say which are whose: one more, and all is read.
            assert found == [True, True, family not in TOGETHER or turn > 1, True]
        more = [[seen(7)] if turn == 0 and i == 2 else [] for i in range(4)]
        talks = [
            talk.answered(text).ask(f"and then, {turn}?", new)
            for talk, text, new in zip(talks, expected, more, strict=True)
        ]


def test_another_picture_is_another_prompt(live: Callable[[str], Live], engines: Callable[[str], LocalEngine]) -> None:
    serving = live("llava-llama")
    for number in (1, 4, 1):
        talk = Conversation().ask("what is this?", [seen(number)])
        assert ask(serving, talk).text == engines("llava-llama").answer(talk, SAMPLING).text
    assert ask(serving, talk).cached_tokens > 8


def test_who_comes_later_does_not_wait(live: Callable[[str], Live]) -> None:
    """It joins at the next step, and may be answered before those that were there."""
    serving = live("llava-llama")
    long, _ = begin(serving, Conversation().ask("what is this?", [seen(1)]), Sampling(max_tokens=600))
    long.first()
    assert ask(serving, Conversation().ask("and this?", [seen(2)]), Sampling(max_tokens=2)).answer_tokens == 2
    assert serving.running == 1
    assert long.end().answer_tokens == 600


def test_who_leaves_frees_the_place(live: Callable[[str], Live]) -> None:
    serving = live("llava-llama")
    listener, asked = begin(serving, Conversation().ask("what is this?", [seen(1)]), Sampling(max_tokens=1900))
    listener.first()
    serving.leave(asked)
    serving.leave(asked)
    assert ask(serving, Conversation().ask("and this?", [seen(2)])).answer_tokens == 12
    assert serving.running == 0


def test_sampling_is_each_request_s_own(live: Callable[[str], Live], engines: Callable[[str], LocalEngine]) -> None:
    serving, talk = live("llava-llama"), Conversation().ask("what is this?", [seen(1)])
    many = [Sampling(max_tokens=12, temperature=0.8, seed=seed) for seed in (1, 2, 1)] + [SAMPLING]
    answers = [listener.end().text for listener, _ in [begin(serving, talk, one) for one in many]]
    assert answers == [engines("llava-llama").answer(talk, one).text for one in many]
    assert answers[0] == answers[2] != answers[1]


def test_likelihoods(live: Callable[[str], Live], engines: Callable[[str], LocalEngine]) -> None:
    serving, listener = live("llava-llama"), Listener()
    talk = Conversation().ask("what is this?", [seen(1)])
    serving.ask(Request(talk, SAMPLING), listener.put, top=3)
    answer = listener.end()
    first = listener.tokens[0].likelihood
    logits = engines("llava-llama").logits(engines("llava-llama").inputs(talk))[0]
    assert first
    assert first.token == int(logits.argmax())
    assert abs(first.logarithm - float(logits.log_softmax(-1).max())) < 1e-4
    assert len(first.likeliest) == 3
    assert first.likeliest[0] == (first.token, first.logarithm)
    assert sum(token.likelihood is not None for token in listener.tokens) == answer.answer_tokens


def test_a_prompt_that_is_too_long_is_refused_before_it_waits(live: Callable[[str], Live]) -> None:
    with pytest.raises(PromptTooLong):
        ask(live("llava-llama"), Conversation().ask("what? " * 4000))


def test_where_memory_runs_out_answers_go_on_in_smaller_batches(
    live: Callable[[str], Live], engines: Callable[[str], LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what had been shown of them is not shown again."""
    step = Batch.step
    tripped: list[int] = []
    all_there = threading.Event()

    def runs_out(self: Batch) -> object:
        all_there.wait()
        if len(self.rows) > 2 and len(self.rows[0].ids) > len(self.rows[0].prompt) + 4:
            tripped.append(len(self.rows))
            raise MemoryError
        return step(self)

    monkeypatch.setattr(Batch, "step", runs_out)
    serving = live("llava-llama")
    talks = [Conversation().ask("what is this?", [seen(i)]) for i in range(4)]
    begun = [begin(serving, talk) for talk in talks]
    all_there.set()
    answers = [listener.end().text for listener, _ in begun]
    assert tripped
    assert answers == [engines("llava-llama").answer(talk, SAMPLING).text for talk in talks]


@pytest.mark.parametrize("error, told", [(MemoryError, OutOfMemory), (RuntimeError, ModelUnusable)])
def test_a_failure_is_told_to_all_and_the_next_is_answered(
    error: type[Exception], told: type[LlavaError], live: Callable[[str], Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Batch) -> object:
        raise error("no")

    serving, talk = live("llava-llama"), Conversation().ask("what is this?", [seen(1)])
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "step", fails)
        with pytest.raises(told):
            ask(serving, talk)
    assert ask(serving, talk).answer_tokens == 12


def test_what_is_kept_stays_within_its_budget(
    engines: Callable[[str], LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines("llava-llama")
    kept = Kept(100_000, engine.network.config.image_token_id)
    rows = []
    monkeypatch.setattr(Batch, "_drop", spying := _Spy(Batch._drop))
    running = scheduler.Schedule(engine.network, None, kept)
    for number in range(12):
        row = engine.row(number, Request(Conversation().ask("what is this?", [seen(number)]), SAMPLING), number)
        assert row
        row.pictures = (f"{number}",)
        rows.append(row)
        running.put(row)
        while running.waiting or running.running:
            running.step()
        assert kept.size <= 100_000
    assert spying.calls == 12
    assert kept.begin(rows[-1])
    assert kept.begin(rows[0]) is None
    kept.clear()
    assert kept.begin(rows[-1]) is None


class _Spy:
    def __init__(self, method: Callable[..., None]) -> None:
        self._method, self.calls = method, 0

    def __get__(self, its: Batch, owner: type[Batch]) -> Callable[[list[int]], None]:
        def told(done: list[int]) -> None:
            self.calls += 1
            self._method(its, done)

        return told


def test_rows_are_kept_without_their_padding(engines: Callable[[str], LocalEngine]) -> None:
    """Beside a longer one, a prompt has columns on its left that mean nothing."""
    engine = engines("llava-llama")
    kept = Kept(10**9, engine.network.config.image_token_id)
    running = scheduler.Schedule(engine.network, None, kept)
    talks = [Conversation().ask("what? " * times, [seen(times)]) for times in (1, 9)]
    rows = [engine.row(i, Request(talk, SAMPLING), i) for i, talk in enumerate(talks)]
    for row, talk in zip(rows, talks, strict=True):
        assert row
        row.pictures = tuple(one.sha256 for one in talk.pictures)
        running.put(row)
    while running.waiting or running.running:
        running.step()
    for row in rows:
        assert row
        found = kept.begin(row)
        assert found
        assert found.tokens == len(row.ids) - 1
        assert {keys.shape[2] for keys, _ in found.layers} == {found.tokens}
        assert all(torch.isfinite(values).all() for _, values in found.layers)


@pytest.mark.parametrize(("patience", "joined"), [(float("inf"), [5, 5, 5, 8]), (0.0, [5, 6, 7, 8])])
def test_a_few_wait_a_moment_for_others_to_join_with(
    patience: float, joined: list[int], engines: Callable[[str], LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until they are half as many as are being answered; nobody waits where nothing runs."""
    monkeypatch.setattr(scheduler, "GATHER", patience)
    engine = engines("llava-llama")
    running = scheduler.Schedule(engine.network, None, Kept(10**9, engine.network.config.image_token_id))

    def put(number: int) -> None:
        talk = Conversation().ask("what is this?", [seen(number)])
        row = engine.row(number, Request(talk, replace(SAMPLING, max_tokens=60)), number)
        assert row
        running.put(row)

    for number in range(5):
        put(number)
    counts = []
    for number in range(5, 9):
        running.step()
        counts.append(running.running)
        put(number)
    assert counts == joined
