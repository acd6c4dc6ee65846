"""Families other than LLaVA's: what transformers alone makes of a prompt, processor and `generate`, is what we make."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

import pytest
import torch
from helpers.engines import ours, picture
from helpers.made_family import MOST, ONE_TURN, SAME, WIDE, Family
from helpers.other_families import OTHERS
from helpers.static_steps import stepping
from helpers.tables import for_each

from llava_cli import Answer, Conversation, Sampling
from llava_cli.engine import Request
from llava_cli.engine.generate.positions import Positions
from llava_cli.engine.generate.prompt_cache import PromptCache
from llava_cli.engine.generate.scheduler import Scheduler
from llava_cli.engine.generate.sequence import Sequence, Token
from llava_cli.engine.generate.sequential import generate_alone

SAMPLING = Sampling(max_tokens=MOST)


@for_each("name", OTHERS)
def test_inputs_and_greedy_tokens_alone_and_in_a_batch(name: str, family: Callable[[str], Family]) -> None:
    engine, by, talks = made = family(name)
    alone = []
    for talk in talks:
        inputs = by.inputs(engine, talk) if talk.pictures else engine.inputs(talk)
        mine = engine.inputs(talk)
        assert mine.keys() == inputs.keys() - {"labels"}
        assert all(torch.equal(mine[key], inputs[key]) for key in mine)
        expected = made.expected(talk)[0] if talk.pictures else text_alone(made, talk)
        assert ours(engine, talk, SAMPLING, MOST) == expected
        alone.append(expected)
    assert made.expected(*talks[:2]) == alone[:2]  # padded on the left
    other = Conversation().ask("what is this?", [picture(60, 60, 4)])
    assert not torch.equal(engine.logits(engine.inputs(talks[0])), engine.logits(engine.inputs(other)))
    found = dict(engine.answer_many([Request(talk, SAMPLING) for talk in talks], size=3))
    for number, expected in enumerate(alone):
        answer = found[number]
        assert isinstance(answer, Answer)
        assert (answer.text, answer.answer_tokens) == (by.text(expected), len(expected))


def text_alone(made: Family, talk: Conversation) -> list[int]:
    """What `generate` makes of a prompt without pictures."""
    text = made.engine.prompter.render(talk)
    has_bos = text.startswith(made.by.processor.tokenizer.bos_token or "\0")
    options = {"add_special_tokens": False} if has_bos else {}
    inputs = made.by.processor(text=[text], return_tensors="pt", **options)
    row = made.by.model.generate(**inputs, do_sample=False, max_new_tokens=MOST)[0].tolist()
    return list(row[inputs["input_ids"].shape[1] :])


ONE_QUESTION = ("paligemma", "paligemma2")
TELL_PICTURES_APART = (
    *("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "glm4v", "glm4v-moe", "glm4.6v", "glm-ocr", "gemma3"),
    *("mistral3", "lighton-ocr", "paddleocr-vl", "hunyuan-vl", "deepseek-vl", "janus", "llava-next-video"),
)
"""Families whose tensors say which picture is whose, so that another one is read without those before it."""
SIDE_BY_SIDE = (
    *(*TELL_PICTURES_APART, *ONE_QUESTION),
    *("internvl", "internvl3.5", "aya-vision", "idefics2", "ovis2", "qianfan-ocr"),
)
"""Families that stand in rows; the others are read one at a time."""


@for_each("name", [name for name in OTHERS if name not in ONE_QUESTION])
def test_chat_of_three_turns(name: str, family: Callable[[str], Family]) -> None:
    """By one engine, which reads only what is new."""
    engine, by, _ = made = family(name)
    talk, cached = Conversation().ask("what is this?", [SAME]), []
    for question, pictures in (("and this?", [WIDE]), ("which is larger?", []), ("", [])):
        answer = engine.answer(talk, SAMPLING)
        (expected,) = made.expected(talk)
        assert (answer.text, answer.answer_tokens) == (by.text(expected), len(expected))
        cached.append(answer.cached_tokens > 0)
        talk = talk.answered(answer.text).ask(question, pictures)
    assert (name, *cached[1:]) == (name, name in TELL_PICTURES_APART, name in SIDE_BY_SIDE)


@for_each("name", SIDE_BY_SIDE)
def test_rows_that_come_and_go_beside_each_other(name: str, family: Callable[[str], Family]) -> None:
    """Each joins while others are answered; its next turn begins with a copy of what was read of it."""
    engine, _, talks = made = family(name)
    scheduler = Scheduler(engine.network, 3, PromptCache(1 << 30, engine.network.config.image_token_id))
    turns = [[talk] for talk in talks[:3]]
    if name not in ONE_QUESTION:
        turns = [[talk, talk.answered("a cat").ask("and this?", [WIDE])] for talk in talks[:3]]
    asked: list[tuple[Conversation, Sequence, list[Token]]] = []
    for talk in [talk for row in zip(*turns, strict=True) for talk in row]:
        said: list[Token] = []
        sequence = engine.prepare(len(asked), Request(talk, SAMPLING), said.append, top_logprobs=1)
        asked.append((talk, sequence, said))
        scheduler.add(sequence)
        for _ in range(3):
            scheduler.step()
    while scheduler.running or scheduler.waiting:
        scheduler.step()
    for talk, sequence, said in asked:
        tokens, logprobs = likeliest(made, talk)
        found = [token.likelihood for token in said if token.likelihood]
        assert [likelihood.token for likelihood in found] == tokens == sequence.ids[len(sequence.prompt) :]
        assert [likelihood.logprob for likelihood in found] == pytest.approx(logprobs, abs=2e-4)
    is_kept = name in TELL_PICTURES_APART
    assert [sequence.cached_tokens > 0 for _, sequence, _ in asked[3:]] == [is_kept] * len(asked[3:])


@for_each("name", SIDE_BY_SIDE)
def test_the_step_that_a_gpu_captures_gives_the_same(name: str, family: Callable[[str], Family]) -> None:
    """Alone, where a mixture of experts would look at each expert's tokens, which a GPU waits for; and in rows."""
    engine, _, talks = family(name)
    asked = [Request(talk, SAMPLING) for talk in talks[:3]]
    with engine.patch.undone():
        expected = [engine.answer(request.conversation, SAMPLING).text for request in asked]
    with stepping(engine) as graphs:
        assert [engine.answer(request.conversation, SAMPLING).text for request in asked] == expected
        found = sorted(engine.answer_many(iter(asked), 3))
        assert [answer.text for _, answer in found if isinstance(answer, Answer)] == expected
        assert graphs.shapes


def likeliest(made: Family, talk: Conversation) -> tuple[list[int], list[float]]:
    """The tokens of `generate`, up to the first end token, and their log-probabilities."""
    inputs = made.by.inputs(made.engine, talk)
    options = {"do_sample": False, "max_new_tokens": MOST, "output_logits": True, "return_dict_in_generate": True}
    logprobs = torch.cat(made.by.model.generate(**inputs, **options).logits).log_softmax(-1)
    values, tokens = logprobs.max(-1)
    return tokens.tolist(), values.tolist()


@for_each("name", [name for name in OTHERS if name.startswith(("qwen", "glm"))])
def test_positions_of_what_was_read_are_those_in_a_longer_prompt(name: str, family: Callable[[str], Family]) -> None:
    """With M-RoPE: those of the answer, too, which were counted from those of its prompt."""
    engine, _, _ = family(name)
    talk = Conversation().ask("what is this?", [SAME])
    short, long = (engine.inputs(t) for t in (talk, talk.answered("a cat").ask("and this?", [WIDE])))
    picture_tokens = (long["mm_token_type_ids"][0] == 1).nonzero().flatten().tolist()
    count = short["input_ids"].shape[1]
    second = next(token for token in picture_tokens if token > count)
    asked, followed = (Positions.of(engine.network, inputs) for inputs in (short, long))
    assert (short["input_ids"][0] == long["input_ids"][0, :count]).all()
    assert asked.delta < 0  # there are fewer positions than tokens
    assert torch.equal(asked.between(0, second)[1:], followed.prompt[1:, :second])  # the first axis is the text's
    assert len(followed.prompt[:, picture_tokens].unique(dim=1).T) == len(picture_tokens)


@for_each("name", ["qwen3-vl", "mllama"])
def test_two_answers_at_the_same_time(name: str, family: Callable[[str], Family]) -> None:
    """Models that keep something about a prompt outside of its cache do not mix two of them up."""
    engine, _, _ = made = family(name)
    talks = [ONE_TURN[0], ONE_TURN[2]]
    sequences = [engine.prepare(number, Request(talk, SAMPLING)) for number, talk in enumerate(talks)]
    for _ in zip_longest(*(generate_alone(engine.network, sequence) for sequence in sequences)):
        pass
    answers = [sequence.ids[len(sequence.prompt) :] for sequence in sequences]
    assert answers == [made.expected(talk)[0] for talk in talks]
