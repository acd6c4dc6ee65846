"""Our decoding against transformers' own `generate`: the same tokens, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import CONVERSATIONS, ours, picture, reference
from helpers.families import FAMILIES

from llava_cli import Conversation, Sampling, load
from llava_cli.engine.forward import Forward
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import ModelUnusable, PromptTooLong

Get = Callable[[str], Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(
    family: str, checkpoint: Get, engines: Callable[[str], LocalEngine]
) -> None:
    engine = engines(family)
    for case, conversation in CONVERSATIONS.items():
        expected = reference(engine, checkpoint(family), conversation, do_sample=False)
        assert ours(engine, conversation, Sampling()) == expected, case
        ended = expected[-1] in engine.end_tokens
        assert ended or len(set(expected)) > 2  # a fixture that says one thing over and over would prove nothing


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8)])
def test_sampled_tokens_are_those_of_generate(
    temperature: float, top_p: float, checkpoint: Get, engines: Callable[[str], LocalEngine]
) -> None:
    engine, conversation = engines("llava-llama"), CONVERSATIONS["one"]
    torch.manual_seed(7)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    expected = reference(engine, checkpoint("llava-llama"), conversation, **options)
    assert ours(engine, conversation, Sampling(temperature=temperature, top_p=top_p, seed=7)) == expected
    assert ours(engine, conversation, Sampling(temperature=temperature, top_p=top_p, seed=8)) != expected


@pytest.mark.parametrize("confidence", [False, True])
def test_logits_that_are_no_numbers_give_no_sampled_token(
    confidence: bool, engines: Callable[[str], LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a model overflows in 16 bits. The next answer is as usual."""
    engine, sampling = engines("llava-llama"), Sampling(temperature=1.0, seed=1, max_tokens=9, confidence=confidence)
    expected = engine.answer(CONVERSATIONS["one"], sampling).text
    with monkeypatch.context() as patch:
        patch.setattr(Forward, "__call__", lambda *_: torch.full((1, 8), torch.nan))
        with pytest.raises(ModelUnusable, match="its logits are no numbers"):
            engine.answer(CONVERSATIONS["wide"], sampling)
    assert engine.answer(CONVERSATIONS["one"], sampling).text == expected


def test_repetition_penalty_of_the_checkpoint_is_applied(checkpoint: Get) -> None:
    engine, conversation = load(str(checkpoint("llava-llama")), precision="fp32"), CONVERSATIONS["one"]
    plain = ours(engine, conversation, Sampling())
    engine.network.generation_config.repetition_penalty = 1.8
    expected = reference(engine, checkpoint("llava-llama"), conversation, do_sample=False, repetition_penalty=1.8)
    assert ours(engine, conversation, Sampling()) == expected != plain


def test_chunks_join_to_the_answer(engines: Callable[[str], LocalEngine]) -> None:
    engine = engines("llava-llama")
    *chunks, last = engine.stream(CONVERSATIONS["one"], Sampling(max_tokens=40))
    assert last.answer is not None
    assert "".join(c.text for c in [*chunks, last]) == last.answer.text
    assert all(c.answer is None for c in chunks)
    assert last.answer.answer_tokens == 40
    assert last.answer.finish_reason == "length"
    assert last.answer.prompt_tokens == engine.prompter.encode(CONVERSATIONS["one"])["input_ids"].shape[1]


def test_end_token_ends_the_answer_and_is_not_in_it(checkpoint: Get) -> None:
    engine = load(str(checkpoint("llava-llama")), precision="fp32")
    tokens = ours(engine, CONVERSATIONS["one"], Sampling())
    engine.network.generation_config.eos_token_id = [tokens[5], 3]
    ended = LocalEngine("again", engine.network, engine.prompter, "fp32", 0)
    answer = ended.answer(CONVERSATIONS["one"], Sampling())
    first = tokens.index(tokens[5])
    assert (answer.finish_reason, answer.answer_tokens) == ("stop", first + 1)
    kept = engine.prompter.tokenizer.decode(tokens[:first], skip_special_tokens=True)
    assert answer.text == kept.strip()


def test_stop_text_ends_the_answer_before_it(engines: Callable[[str], LocalEngine]) -> None:
    engine = engines("llava-llama")
    whole = engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=24)).text
    stop = next(whole[i : i + 2] for i in range(4, len(whole)) if whole[i : i + 2].isascii())
    answer = engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=24, stop=("never there", stop)))
    assert answer.text == whole[: whole.index(stop)].rstrip()
    assert answer.finish_reason == "stop"


def test_prompt_longer_than_the_context_is_refused(engines: Callable[[str], LocalEngine]) -> None:
    with pytest.raises(PromptTooLong, match="reads at most 2048"):
        engines("llava-llama").answer(Conversation().ask("x" * 3000, [picture(60, 60)]))


def test_answer_ends_where_the_context_does(engines: Callable[[str], LocalEngine]) -> None:
    engine = engines("llava-llama")
    conversation = Conversation().ask("x" * 1990, [picture(60, 60)])
    answer = engine.answer(conversation, Sampling(max_tokens=500))
    assert answer.prompt_tokens + answer.answer_tokens == 2048


def test_abandoned_answer_leaves_the_engine_usable(engines: Callable[[str], LocalEngine]) -> None:
    engine = engines("llava-llama")
    whole = engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=24)).text
    half = engine.stream(CONVERSATIONS["one"], Sampling(max_tokens=24))
    next(half)
    half.close()  # type: ignore[attr-defined]
    assert engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=24)).text == whole
