"""Choices: their probabilities are those of transformers alone, token by token, for every family; alone and in a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import families
from helpers.engines import picture
from helpers.families import FAMILIES
from helpers.other_families import OTHERS
from helpers.tables import for_each
from transformers import AutoModelForImageTextToText

from llava_cli import Answer, Conversation, Sampling, load
from llava_cli.choices import spellings
from llava_cli.engine import Request
from llava_cli.engine.local import LocalEngine

CHOICES = ("no", "not sure", "nothing", "a dog", "Yes")
SAMPLING = Sampling(choices=CHOICES)
TALKS = [
    Conversation().ask("what is this?", [picture(60, 60, 1)]),
    Conversation().ask("is it a very large dog?", [picture(60, 60, 1)]),
    Conversation().ask("what changed?", [picture(200, 50, 2)]),
]


@torch.inference_mode()
def by_transformers(engine: LocalEngine, model: Any, talk: Conversation) -> tuple[dict[str, float], float]:
    """The probabilities of `CHOICES` and their sum, each spelling read whole by transformers' own model."""
    inputs = {name: value for name, value in engine.inputs(talk).items()}
    prompt = inputs.pop("input_ids")
    ends, found = sorted(engine.end_tokens), {}
    types = {name: inputs.pop(name) for name in ("token_type_ids", "mm_token_type_ids") if name in inputs}
    for choice in CHOICES:
        found[choice] = 0.0
        for ids in engine.prompter.answer_ids(list(spellings(choice))):
            whole = torch.cat([prompt, torch.tensor([ids])], dim=1)
            longer = {n: torch.nn.functional.pad(value, (0, len(ids))) for n, value in types.items()}
            rest = {**inputs, **longer, "attention_mask": torch.ones_like(whole)}
            logits = model(input_ids=whole, **rest).logits[0, prompt.shape[1] - 1 :].log_softmax(-1)
            tokens = sum(float(logits[place, token]) for place, token in enumerate(ids))
            found[choice] += math.exp(tokens + float(logits[len(ids), ends].logsumexp(-1)))
    total = sum(found.values())
    return {choice: value / total for choice, value in found.items()}, total


def same(answer: Answer, expected: tuple[dict[str, float], float]) -> bool:
    probabilities, total = expected
    assert answer.probabilities is not None and answer.answer_probability is not None
    assert list(answer.probabilities.values()) == sorted(answer.probabilities.values(), reverse=True)
    assert answer.probabilities == pytest.approx(probabilities, abs=1e-5)
    assert answer.answer_probability == pytest.approx(total, rel=1e-4)
    return answer.text == max(probabilities, key=probabilities.__getitem__)


def check(engine: LocalEngine, model: Any, talks: list[Conversation]) -> None:
    expected = [by_transformers(engine, model, talk) for talk in talks]
    for talk, one in zip(talks, expected, strict=True):
        assert same(engine.answer(talk, SAMPLING), one)
    for _, answer in engine.answer_many(Request(talk, SAMPLING) for talk in talks):
        assert isinstance(answer, Answer)
    together = dict(engine.answer_many([Request(talk, SAMPLING) for talk in talks], 3))
    for number, one in enumerate(expected):
        assert isinstance(answer := together[number], Answer)
        assert same(answer, one)


@for_each("name", FAMILIES)
def test_llava_families(name: str, engines: Callable[[str], LocalEngine], checkpoint: Callable[[str], Path]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(name), dtype=torch.float32)
    check(engines(name), model, TALKS)


@for_each("name", OTHERS)
def test_other_families(name: str, tmp_path: Path) -> None:
    folder = families.save_made(OTHERS[name], tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    check(load(str(folder), precision="fp32", device="cpu"), model, TALKS)
