"""Sight is how far transformers alone finds an answer less probable about gray pictures, however it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import families
from helpers.command import Run
from helpers.engines import CONVERSATIONS, ours, requests
from helpers.fidelity import Reference, reference
from helpers.other_families import OTHERS
from helpers.tables import for_each
from PIL import Image

from llava_cli import Answer, Conversation, Sampling, load
from llava_cli.conversation import Picture, Turn
from llava_cli.engine import Request
from llava_cli.engine.local import LocalEngine
from llava_cli.engine.sight import total_variation, unseen

Get = Callable[[str], Path]
Engines = Callable[[str], LocalEngine]
MOST = 8
ASKED = Sampling(max_tokens=MOST, sight=True)


def sight(answer: object) -> float:
    assert isinstance(answer, Answer) and answer.sight is not None
    return answer.sight


def expected(by: Reference, engine: LocalEngine, talk: Conversation) -> float:
    """By two teacher-forced answers of transformers."""
    tokens = ours(engine, talk, Sampling(), MOST)
    seen, gray = (sum(by.log_probabilities(engine, one, tokens)) for one in (talk, unseen(talk)))
    return seen - gray


@for_each("family", ["llava-llama", "llava-next-vicuna", "llava-onevision"])
def test_it_is_what_transformers_alone_says(family: str, checkpoint: Get, engines: Engines) -> None:
    engine, by = engines(family), reference(family, checkpoint(family))
    for case in ("wide", "two", "later"):
        answer = engine.answer(CONVERSATIONS[case], ASKED)
        assert sight(answer) == pytest.approx(expected(by, engine, CONVERSATIONS[case]), abs=1e-4), case
        assert answer.text == engine.answer(CONVERSATIONS[case], replace(ASKED, sight=False)).text


def test_a_model_that_cannot_batch(tmp_path: Path) -> None:
    folder = families.save_made(OTHERS["mllama"], tmp_path)
    engine, talk = load(str(folder), precision="fp32", device="cpu"), CONVERSATIONS["one"]
    by = Reference(families.processor_like(OTHERS["mllama"]()[1], folder), engine.network)
    ((_, answer),) = engine.answer_many([Request(talk, ASKED)])
    assert sight(answer) == pytest.approx(expected(by, engine, talk), abs=1e-4)


@for_each("size", [1, 3, None])
def test_in_a_batch_it_is_that_alone(size: int | None, engines: Engines) -> None:
    """Also where only some ask for it, and what has no picture has no sight."""
    engine = engines("llava-llama")
    asked = [Request(r.conversation, replace(ASKED, sight=n % 3 != 1)) for n, r in enumerate(requests())]
    found = dict(engine.answer_many(asked, size))
    assert sorted(found) == list(range(len(asked)))
    for number, (talk, sampling) in enumerate((r.conversation, r.sampling) for r in asked):
        answer, alone = found[number], engine.answer(talk, sampling)
        assert isinstance(answer, Answer) and (answer.sight is None) == (alone.sight is None)
        assert (answer.text, answer.sight) == (alone.text, alone.sight and pytest.approx(alone.sight, abs=1e-4))
        assert (answer.sight is not None) == (sampling.sight and bool(talk.pictures))


def test_answers_that_were_begun_get_it_after_a_stop(engines: Engines) -> None:
    engine, asked = engines("llava-llama"), [Request(r.conversation, ASKED) for r in requests()[:6]]
    stops = iter([True, True, False])
    found = dict(engine.answer_many(asked, 6, lambda: next(stops, False)))
    assert len(found) > 0 and all(sight(answer) for answer in found.values())


def test_memory_that_runs_out_loses_none(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_cli.engine.forward import Forward

    engine, asked = engines("llava-llama"), [Request(r.conversation, ASKED) for r in requests()[:6]]
    alone = [engine.answer(request.conversation, ASKED).sight for request in asked]
    forward = Forward.__call__

    def small(self: Forward, inputs: dict[str, torch.Tensor], *args: object) -> torch.Tensor:
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, inputs, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Forward, "__call__", small)
    found = dict(engine.answer_many(asked, 6))
    assert [sight(found[number]) for number in range(6)] == pytest.approx(alone, abs=1e-4)


def test_a_model_whose_pictures_say_nothing_is_blind(checkpoint: Get) -> None:
    engine = load(str(checkpoint("llava-llama")), precision="fp32", device="cpu")
    assert not engine.answer(CONVERSATIONS["one"], ASKED).is_blind
    with torch.no_grad():
        for parameter in engine.network.model.multi_modal_projector.parameters():
            parameter.zero_()
    blind = load_again(engine).answer(CONVERSATIONS["one"], ASKED)
    assert blind.is_blind and sight(blind) == pytest.approx(0, abs=1e-5)


def load_again(engine: LocalEngine) -> LocalEngine:
    """Without what it has read before."""
    return LocalEngine("again", engine.network, engine.prompter, "fp32", 0)


def test_gray_pictures_stand_where_the_others_did() -> None:
    first, second = (Picture("red", Image.new("RGB", size, "red"), "1" * 64) for size in ((30, 20), (8, 9)))
    talk = Conversation((Turn.of([first, "or", second]),)).answered("the first").ask("why?", [second])
    gray = unseen(talk)
    assert [picture.image.getcolors() for picture in gray.pictures] == [[(n, (127,) * 3)] for n in (600, 72, 72)]
    assert [picture.image.size for picture in gray.pictures] == [picture.image.size for picture in talk.pictures]
    assert gray.turns[0].parts == (gray.pictures[0], "or", gray.pictures[1])
    assert [turn.question for turn in gray.turns] == ["or", "why?"]


def test_of_choices_it_is_how_far_their_distribution_moves(engines: Engines) -> None:
    engine, asked = engines("llava-llama"), Sampling(choices=("a cat", "a dog", "no"))
    talks = [CONVERSATIONS[case] for case in ("one", "two", "later")]
    found = dict(engine.answer_many([Request(talk, replace(asked, sight=True)) for talk in talks]))
    for number, talk in enumerate(talks):
        seen, gray = (engine.answer(one, asked).probabilities for one in (talk, unseen(talk)))
        assert seen and gray
        assert sight(found[number]) == pytest.approx(total_variation(seen, gray), abs=1e-5)
        assert sight(engine.answer(talk, replace(asked, sight=True))) == pytest.approx(sight(found[number]), abs=1e-5)


def test_how_far_a_distribution_moves() -> None:
    assert total_variation({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}) == 1
    assert total_variation({"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.2, "b": 0.3, "c": 0.5}) == pytest.approx(0.3)


def test_ask(run: Run, drawing: Path) -> None:
    seen, blind = (
        json.loads(run("ask", drawing, question, "--json", "--sight").stdout)["sight"]
        for question in ("what color is the circle?", "what is the capital of france?")
    )
    assert seen > 1 and abs(blind) < 0.01
    without = run("ask", "who are you?", "--sight")
    assert (without.exit_code, without.stderr.splitlines()[0]) == (2, "llava: --sight: there is no picture")
