"""What transformers alone makes of a prompt, its own processor and `generate`, is what we make of it: every family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import families
from helpers.engines import ours, picture
from helpers.families import FAMILIES
from helpers.fidelity import MOST, SAMPLING, TALKS, Reference, reference
from safetensors import safe_open

from llava_cli import Answer, Conversation, Sampling, load
from llava_cli.engine import Request
from llava_cli.engine.local import LocalEngine
from llava_cli.loader import load_prompter
from llava_cli.settings import LoadOptions

Engines = Callable[[str], LocalEngine]


def same_tokens(engine: LocalEngine, by: Reference, talk: Conversation) -> list[int]:
    """The greedy answer, which has to be that of `generate`."""
    (expected,) = by.tokens(engine, talk)
    assert ours(engine, talk, Sampling()) == expected
    return expected


def same_inputs(inputs: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert inputs.keys() == expected.keys() > {"input_ids", "pixel_values"}
    for name in inputs:
        assert torch.equal(inputs[name], expected[name]), name


def same_answer(answer: object, by: Reference, expected: Sequence[int]) -> None:
    assert isinstance(answer, Answer)
    assert (answer.text, answer.answer_tokens) == (by.text(expected), len(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_greedy_tokens(family: str, engines: Engines, references: Callable[[str], Reference]) -> None:
    engine, by = engines(family), references(family)
    for talk in TALKS.values():
        same_inputs(engine.inputs(talk), by.inputs(engine, talk))
        same_answer(engine.answer(talk, SAMPLING), by, same_tokens(engine, by, talk))


@pytest.mark.parametrize("family", FAMILIES)
def test_documented_call_with_the_template_of_the_checkpoint(
    family: str, checkpoint: Callable[[str], Path], references: Callable[[str], Reference]
) -> None:
    """`apply_chat_template` over messages with pictures in them: its text, its tokens, its pixels."""
    prompter, processor = (
        load_prompter(LoadOptions(model=str(checkpoint(family)), template="hub")),
        references(family).processor,
    )
    for talk in (TALKS["wide"], TALKS["several"], TALKS["turns"]):
        messages: list[dict[str, Any]] = []
        for turn in talk.turns:
            shown = [{"type": "image", "image": prompter.image_processor.fit(p.image)} for p in turn.pictures]
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": turn.question}]})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        same_inputs(
            prompter.encode(Conversation(turns=talk.turns)),
            processor.apply_chat_template(messages, add_generation_prompt=True, **options),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_that_reads_only_what_is_new(
    family: str, engines: Engines, references: Callable[[str], Reference]
) -> None:
    """Three turns by one engine, a picture joining in the second, and each time `generate` over all of it."""
    engine, by = engines(family), references(family)
    talk, read = Conversation().ask("what is this?", [picture(60, 60, 1)]), 0
    for question, pictures in (("and this?", [picture(100, 60, 2)]), ("which is larger?", []), ("", [])):
        answer = engine.answer(talk, SAMPLING)
        same_answer(answer, by, by.tokens(engine, talk)[0])
        read = answer.cached_tokens
        talk = talk.answered(answer.text).ask(question, pictures)
    assert (read > 0) == engine.can_batch(engine.prepare(0, Request(talk, SAMPLING)))


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_unequal_lengths(family: str, engines: Engines, references: Callable[[str], Reference]) -> None:
    engine, by = engines(family), references(family)
    talks = [*TALKS.values(), Conversation().ask("what color is the thing on the left?", [picture(60, 60, 1)])]
    alone = [by.tokens(engine, talk)[0] for talk in talks]
    assert len({by.inputs(engine, talk)["input_ids"].shape[1] for talk in talks}) > 3
    assert by.tokens(engine, *talks) == alone
    found = dict(engine.answer_many([Request(talk, SAMPLING) for talk in talks], size=4))
    for number, expected in enumerate(alone):
        same_answer(found[number], by, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_with_a_seed(family: str, engines: Engines, references: Callable[[str], Reference]) -> None:
    """The same random numbers for the same distribution; `generate` without a top-k of its own."""
    engine, by, talk = engines(family), references(family), TALKS["one"]
    by_seed = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        (expected,) = by.tokens(engine, talk, do_sample=True, temperature=0.8, top_p=0.9, top_k=0)
        sampling = Sampling(max_tokens=MOST, temperature=0.8, top_p=0.9, seed=seed)
        assert ours(engine, talk, sampling) == expected
        same_answer(dict(engine.answer_many([Request(talk, sampling)]))[0], by, expected)
        by_seed.append(expected)
    assert by_seed[0] != by_seed[1]


VISION = [
    ("llava-llama", {"vision_feature_layer": -1}),
    ("llava-llama", {"vision_feature_layer": [-2, 1, -3]}),
    ("llava-llama", {"vision_feature_select_strategy": "full"}),
    ("llava-llama", {"vision_feature_layer": [0, -1], "vision_feature_select_strategy": "full"}),
    ("llava-interleave", {"vision_feature_layer": [-2, 1]}),
    ("vip-llava", {"vision_feature_layers": -2}),
    ("llava-next-vicuna", {"vision_feature_layer": [-2, 1]}),
    ("llava-onevision", {"vision_feature_layer": [-1, 1]}),
]


@pytest.mark.parametrize("family, options", VISION)
def test_features_of_the_vision_tower(
    family: str, options: dict[str, Any], tmp_path: Path, references: Callable[[str], Reference]
) -> None:
    folder = families.save(family, tmp_path / "changed", **options)
    engine, by = load(str(folder), precision="fp32", device="cpu"), reference(family, folder)
    assert {name: getattr(by.model.config, name) for name in options} == options
    changed = same_tokens(engine, by, TALKS["one"])
    assert changed != references(family).tokens(engine, TALKS["one"])[0]


@pytest.mark.parametrize(
    "family", ["llava-llama", "llava-interleave", "vip-llava", "llava-next-qwen", "llava-onevision"]
)
def test_head_tied_to_the_embeddings_or_not_in_one_file_or_many(family: str, tmp_path: Path) -> None:
    answers = []
    for tied, shard in ((False, "5GB"), (False, "100KB"), (True, "5GB"), (True, "100KB")):
        folder = families.save(family, tmp_path / f"{tied}-{shard}", tied=tied, shard=shard)
        files = list(folder.glob("*.safetensors"))
        assert (len(files) > 1) == (shard == "100KB")
        stored = [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118  no mapping
        assert any("lm_head" in name for name in stored) != tied
        engine, by = load(str(folder), precision="fp32", device="cpu"), reference(family, folder)
        answers.append(same_tokens(engine, by, TALKS["one"]))
    single, sharded, tied_single, tied_sharded = answers
    assert single == sharded != tied_single == tied_sharded
