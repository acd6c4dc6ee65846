"""How probable a model finds its own tokens is what transformers alone says, however the answer is made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import families
from helpers.command import Run
from helpers.engines import CONVERSATIONS, ours, requests
from helpers.families import FAMILIES
from helpers.fidelity import Reference, reference
from helpers.other_families import OTHERS
from helpers.tables import for_each

from llava_cli import Answer, Sampling, load
from llava_cli.engine import Request
from llava_cli.engine.base import Confidence
from llava_cli.engine.generate.confidence import (
    LEAST_LOG_PROBABILITY,
    as_numbers,
    confidence_in,
    token_log_probabilities,
)
from llava_cli.engine.generate.detokenizer import text_of
from llava_cli.engine.local import LocalEngine

Get = Callable[[str], Path]
Engines = Callable[[str], LocalEngine]
MOST = 12
ASKED = Sampling(max_tokens=MOST, confidence=True)


def confidence(answer: object) -> Confidence:
    assert isinstance(answer, Answer) and answer.confidence
    return answer.confidence


def same(found: Confidence, expected: Confidence) -> bool:
    return (found.mean, found.lowest) == pytest.approx((expected.mean, expected.lowest), abs=1e-5)


@for_each("family", FAMILIES)
def test_it_is_what_transformers_alone_says(family: str, checkpoint: Get, engines: Engines) -> None:
    engine, by = engines(family), reference(family, checkpoint(family))
    for case in ("one", "turns", "two"):
        tokens = ours(engine, CONVERSATIONS[case], Sampling(), MOST)
        expected = by.log_probabilities(engine, CONVERSATIONS[case], tokens)
        found = confidence(engine.answer(CONVERSATIONS[case], ASKED))
        assert same(found, confidence_in(expected, str)), case


@for_each(
    "changes",
    [
        {},
        {"temperature": 1.2, "seed": 3, "top_p": 0.9},
        {"stop": ("e",)},
        {"max_tokens": 1},
    ],
)
def test_options_that_change_the_choice_do_not_change_it(changes: dict[str, object], checkpoint: Get) -> None:
    """The probabilities are the model's own, before a temperature or a penalty."""
    engine, talk = load(str(checkpoint("llava-llama")), precision="fp32"), CONVERSATIONS["one"]
    engine.network.generation_config.repetition_penalty = 1.8
    sampling = replace(ASKED, **changes)  # type: ignore[arg-type]
    answer = engine.answer(talk, sampling)
    tokens = ours(engine, talk, sampling, MOST)[: answer.answer_tokens]
    by = reference("llava-llama", checkpoint("llava-llama"))
    assert same(confidence(answer), confidence_in(by.log_probabilities(engine, talk, tokens), str))


@for_each("family", ["llava-llama", "llava-next-vicuna"])
def test_in_a_batch_it_is_that_alone(family: str, engines: Engines) -> None:
    """Also beside answers of which nobody wants to know it."""
    engine = engines(family)
    asked = [Request(r.conversation, replace(ASKED, confidence=n % 3 != 1)) for n, r in enumerate(requests())]
    found = dict(engine.answer_many(asked, 4))
    for number, (talk, sampling) in enumerate((r.conversation, r.sampling) for r in asked):
        answer, alone = found[number], engine.answer(talk, sampling)
        assert isinstance(answer, Answer)
        if sampling.confidence:
            assert same(confidence(answer), confidence(alone))
        else:
            assert answer.confidence is None


def test_a_model_that_cannot_batch(tmp_path: Path) -> None:
    folder = families.save_made(OTHERS["mllama"], tmp_path)
    engine, talk = load(str(folder), precision="fp32", device="cpu"), CONVERSATIONS["one"]
    by = Reference(families.processor_like(OTHERS["mllama"]()[1], folder), engine.network)
    expected = by.log_probabilities(engine, talk, ours(engine, talk, Sampling(), MOST))
    assert same(confidence(engine.answer(talk, ASKED)), confidence_in(expected, str))
    ((_, answer),) = engine.answer_many([Request(talk, ASKED)])
    assert same(confidence(answer), confidence_in(expected, str))


def test_the_end_of_the_answer_counts_and_has_a_name(checkpoint: Get, engines: Engines) -> None:
    tokens = ours(engines("llava-llama"), CONVERSATIONS["one"], Sampling())
    engine = load(str(checkpoint("llava-llama")), precision="fp32")
    engine.network.generation_config.eos_token_id = tokens[0]
    answer = engine.answer(CONVERSATIONS["one"], ASKED)
    by = reference("llava-llama", checkpoint("llava-llama"))
    (expected,) = by.log_probabilities(engine, CONVERSATIONS["one"], tokens[:1])
    assert answer.text == "" and same(confidence(answer), Confidence(math.exp(expected), math.exp(expected), ""))
    assert confidence(answer).lowest_token == engine.prompter.tokenizer.decode(tokens[:1]).strip()


def test_the_text_of_a_token_is_what_a_person_reads(engines: Engines) -> None:
    tokenizer = engines("llava-llama").prompter.tokenizer
    ids = [*tokenizer.encode("a é😀\n", add_special_tokens=False), tokenizer.eos_token_id]
    texts = [text_of(tokenizer, ids, index) for index in range(len(ids))]
    assert texts == ["a", " ", "é", "é", "😀", "😀", "😀", "😀", "\n", tokenizer.eos_token]
    assert text_of(tokenizer, ids[2:3], 0) == "\N{REPLACEMENT CHARACTER}"


def test_what_overflows_is_no_confidence() -> None:
    logits = torch.tensor([[math.nan, 0.0], [-math.inf, 0.0], [0.0, 0.0]])
    found = as_numbers([*token_log_probabilities(logits, torch.zeros(3, dtype=torch.long))])
    assert found == pytest.approx([LEAST_LOG_PROBABILITY, LEAST_LOG_PROBABILITY, -math.log(2)])


def test_ask_and_batch_print_it(run: Run, drawing: Path, tmp_path: Path) -> None:
    asked = json.loads(run("ask", drawing, "what color is the circle?", "--json", "--confidence").stdout)
    row = json.loads(run("batch", drawing, "what color is the circle?", "--confidence").stdout)
    assert set(asked["confidence"]) == {"mean", "lowest", "lowest_token"}
    assert 0 < asked["confidence"]["lowest"] <= asked["confidence"]["mean"] <= 1
    assert row["confidence"]["lowest_token"] == asked["confidence"]["lowest_token"]
    assert "confidence" not in json.loads(run("ask", drawing, "what is this?", "--json").stdout)
    line = run("ask", drawing, "what color is the circle?", "--confidence", "--sight", "-q").stderr
    assert re.fullmatch(r'confidence [01]\.\d\d, lowest [01]\.\d\d at "\S+" · sight \d+\.\d\d\n', line)
