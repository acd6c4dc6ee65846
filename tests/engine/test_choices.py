"""Choices: their probabilities are those of transformers alone, for every family, alone and in a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.engines import picture
from helpers.families import FAMILIES
from helpers.fidelity import Reference
from helpers.made_family import Family
from helpers.other_families import OTHERS
from helpers.tables import for_each
from PIL import Image

from llava_cli import Answer, Conversation, Sampling, load, open_picture
from llava_cli.choices import spellings
from llava_cli.engine import Request
from llava_cli.engine.generate import choice_pass
from llava_cli.engine.generate.choices import ChoiceTree
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import ModelUnusable, PromptTooLong, UsageError

CHOICES = ("no", "not sure", "Yes")
SAMPLING = Sampling(choices=CHOICES)
GENERATED = ("paligemma", "mllama")
"""Model types that read a prompt otherwise than an answer: PaliGemma sees what is behind it, Mllama has more masks."""
TALKS = [
    Conversation().ask("what is this?", [picture(60, 60, 1)]),
    Conversation().ask("is it a very large dog?", [picture(60, 60, 1)]),
]


def read_whole(by: Reference, engine: LocalEngine, talk: Conversation, ids: list[int]) -> torch.Tensor:
    """Logits behind a prompt and behind each of these tokens, of one pass over both."""
    inputs = by.inputs(engine, talk)
    prompt = inputs.pop("input_ids")
    for name in {"token_type_ids", "mm_token_type_ids"} & inputs.keys():
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(ids)))
    whole = torch.cat([prompt, torch.tensor([ids])], dim=1)
    logits: torch.Tensor = by.model(input_ids=whole, **{**inputs, "attention_mask": torch.ones_like(whole)}).logits
    return logits[0, prompt.shape[1] - 1 :]


@torch.inference_mode()
def log_probability(by: Reference, engine: LocalEngine, talk: Conversation, ids: list[int]) -> float:
    """That an answer has these tokens and then ends."""
    ends = sorted(engine.end_tokens)
    if by.model.config.model_type in GENERATED:
        said = [sum(by.log_probabilities(engine, talk, [*ids, end])) for end in ends]
        return float(torch.tensor(said).logsumexp(0))
    logits = read_whole(by, engine, talk, ids).log_softmax(-1)
    tokens = sum(float(logits[place, token]) for place, token in enumerate(ids))
    return tokens + float(logits[len(ids), ends].logsumexp(-1))


def by_transformers(by: Reference, engine: LocalEngine, talk: Conversation) -> tuple[dict[str, float], float]:
    """The probabilities of `CHOICES` and their sum."""
    found = {
        choice: sum(
            math.exp(log_probability(by, engine, talk, ids))
            for ids in engine.prompter.answer_ids(list(spellings(choice)))
        )
        for choice in CHOICES
    }
    total = sum(found.values())
    return {choice: value / total for choice, value in found.items()}, total


def same(answer: Answer, expected: tuple[dict[str, float], float]) -> bool:
    probabilities, total = expected
    assert answer.probabilities is not None and answer.answer_probability is not None
    assert list(answer.probabilities.values()) == sorted(answer.probabilities.values(), reverse=True)
    assert answer.probabilities == pytest.approx(probabilities, abs=1e-5)
    assert answer.answer_probability == pytest.approx(total, rel=1e-4)
    return answer.text == max(probabilities, key=probabilities.__getitem__)


def check(engine: LocalEngine, by: Reference) -> None:
    expected = [by_transformers(by, engine, talk) for talk in TALKS]
    together = dict(engine.answer_many([Request(talk, SAMPLING) for talk in TALKS], 2))
    for number, (talk, one) in enumerate(zip(TALKS, expected, strict=True)):
        assert same(engine.answer(talk, SAMPLING), one)
        assert isinstance(answer := together[number], Answer)
        assert same(answer, one)


@for_each("name", FAMILIES)
def test_llava_families(
    name: str, engines: Callable[[str], LocalEngine], references: Callable[[str], Reference]
) -> None:
    check(engines(name), references(name))


@for_each("name", OTHERS)
def test_other_families(name: str, family: Callable[[str], Family]) -> None:
    check(family(name).engine, family(name).by)


@pytest.fixture(scope="module")
def engine(engines: Callable[[str], LocalEngine]) -> LocalEngine:
    return engines("llava-llama")


def close(answer: object, expected: Answer) -> bool:
    """Whether an answer has the same probabilities but for rounding."""
    assert isinstance(answer, Answer) and answer.probabilities is not None and expected.probabilities is not None
    assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    assert answer.answer_probability == pytest.approx(expected.answer_probability, rel=1e-4)
    return answer.text == expected.text


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalEngine, list[Conversation]]:
    """The built-in model, whose numbers say something, and questions about a picture."""
    image = Image.new("RGB", (200, 150), "white")
    image.paste("red", (20, 30, 80, 90))
    image.save(path := tmp_path_factory.mktemp("drawn") / "square.png")
    picture = [open_picture(str(path))]
    asked = ["what color is the rectangle?", "is there a star?", "where is it?"]
    return load("builtin", precision="fp32"), [Conversation().ask(question, picture) for question in asked]


@for_each(
    "name, value",
    [("PASS_LOGITS", 1), ("PASS_LOGITS", 9 * 640), ("_TREE_ATTENTION", ())],
    ids=["node by node", "in parts", "with the model's own masks"],
)
def test_a_tree_that_is_read_in_parts(
    name: str, value: object, drawn: tuple[LocalEngine, list[Conversation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, talks = drawn
    sampling = Sampling(choices=("red", "red and blue", "no", "yes", "on the left", "on the right"))
    whole = [engine.answer(talk, sampling) for talk in talks]
    monkeypatch.setattr(choice_pass, name, value)
    assert all(close(engine.answer(talk, sampling), one) for talk, one in zip(talks, whole, strict=True))
    together = dict(engine.answer_many([Request(talk, sampling) for talk in talks], 3))
    assert all(close(together[number], one) for number, one in enumerate(whole))


@for_each("name", ["", "paligemma"], ids=["a LLaVA", "a model that reads prompts whole"])
def test_beside_free_answers_and_other_choices(name: str, engine: LocalEngine, family: Callable[[str], Family]) -> None:
    """Rows that choose leave; those that do not go on as if nothing had been there."""
    engine = family(name).engine if name else engine
    others = Sampling(choices=("red", "a very long answer about the color of things"))
    free = Sampling(max_tokens=6)
    requests = [Request(talk, form) for form in (SAMPLING, free, others) for talk in TALKS] * 2
    requests.sort(key=lambda request: request.sampling is free and request.conversation is TALKS[0])
    alone = [engine.answer(request.conversation, request.sampling) for request in requests]
    for number, answer in engine.answer_many(requests, 4):
        if requests[number].sampling.choices:
            assert close(answer, alone[number])
        else:
            assert isinstance(answer, Answer) and answer.text == alone[number].text


def test_a_conversation_goes_on_behind_a_choice(engine: LocalEngine) -> None:
    """What was read of the choices is forgotten, and what was read before them is kept."""
    first = TALKS[0]
    later = first.answered(engine.answer(first, SAMPLING).text).ask("why?")
    answer = engine.answer(later, Sampling(max_tokens=6))
    assert answer.cached_tokens >= engine.count(first) - 1
    engine.answer(TALKS[1], Sampling(max_tokens=1))
    assert engine.answer(later, Sampling(max_tokens=6)).text == answer.text


def test_a_word_where_no_choice_is_probable_enough(engine: LocalEngine) -> None:
    plain = engine.answer(TALKS[0], SAMPLING)
    assert plain.probabilities is not None
    best = plain.probabilities[plain.text]
    for least, text in ((best / 2, plain.text), ((1 + best) / 2, "unsure")):
        answer = engine.answer(TALKS[0], Sampling(choices=CHOICES, otherwise="unsure", at_least=least))
        assert answer.text == text
        assert close(replace(answer, text=plain.text), plain)


def test_streamed_as_one_piece(engine: LocalEngine) -> None:
    chunks = list(engine.stream(TALKS[0], SAMPLING))
    answer = chunks[-1].answer
    assert answer is not None and "".join(chunk.text for chunk in chunks) == answer.text
    assert (answer.finish_reason, answer.prompt_tokens) == ("stop", engine.count(TALKS[0]))


def test_confidence_is_that_of_the_likeliest_spelling(engine: LocalEngine) -> None:
    answer = engine.answer(TALKS[0], Sampling(choices=CHOICES, confidence=True))
    assert answer.confidence is not None and answer.answer_probability is not None
    assert answer.confidence.lowest <= answer.confidence.mean
    assert answer.confidence.mean**answer.answer_tokens <= answer.answer_probability


def test_sight_is_how_far_the_distribution_changes(engine: LocalEngine) -> None:
    sampling = Sampling(choices=CHOICES, sight=True)
    alone = engine.answer(TALKS[0], sampling)
    assert alone.sight is not None and 0 < alone.sight <= 1
    (_, answer), *_ = engine.answer_many([Request(TALKS[0], sampling), Request(TALKS[1], sampling)], 2)
    assert isinstance(answer, Answer) and answer.sight == pytest.approx(alone.sight, abs=1e-5)


def test_tokens_of_a_tree() -> None:
    words = {"no": [5], "No": [6], "no.": [5, 9], "No.": [6, 9], "not": [5, 7], "Not": [6, 7]}
    words |= {"not.": [5, 7, 9], "Not.": [6, 7, 9]}
    tree = ChoiceTree(("no", "not"), lambda texts: [words[text] for text in texts], {1, 0})
    assert (tree.tokens, tree.parents) == ([5, 7, 9, 9, 6, 7, 9, 9], [-1, 0, 1, 0, -1, 4, 5, 4])
    assert tree.depths == [1, 2, 3, 2, 1, 2, 3, 2]
    assert [set(ends) for ends in tree.ends] == [{0, 3, 4, 7}, {1, 2, 5, 6}]
    assert tree.end_tokens == [0, 1]
    assert list(tree.parts(3)) == [[0, 1, 2], [0, 3, 4, 5], [4, 5, 6, 7]]
    with pytest.raises(UsageError, match="has no tokens for 'x'"):
        ChoiceTree(("x", "y"), lambda texts: [[] for _ in texts], {1})
    with pytest.raises(UsageError, match="the same tokens for 'x' and 'y'"):
        ChoiceTree(("x", "y"), lambda texts: [[0] for _ in texts], {1})


def test_what_cannot_be_chosen(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(PromptTooLong, match="of a choice"):
        patch.setattr(engine, "context", engine.count(TALKS[0]) + 1)
        engine.answer(TALKS[0], SAMPLING)
    monkeypatch.setitem(vars(engine), "end_tokens", frozenset())
    with pytest.raises(ModelUnusable, match="no token that ends an answer"):
        engine.answer(TALKS[0], SAMPLING)


def test_the_built_in_model_chooses_as_it_answers(drawing: Path) -> None:
    engine, picture = load(), [open_picture(str(drawing))]
    questions = {"what color is the circle?": ("red", "blue", "green"), "is there a star?": ("yes", "no")}
    for question, choices in questions.items():
        talk = Conversation().ask(question, picture)
        free, chosen = engine.answer(talk), engine.answer(talk, Sampling(choices=choices))
        assert chosen.text == free.text
        assert chosen.answer_probability is not None and chosen.answer_probability > 0.99
