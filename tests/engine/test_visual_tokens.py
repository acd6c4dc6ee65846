"""Some of a picture's tokens: the ones that the paper names, wherever a prompt is read, and in no other prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Run
from helpers.engines import picture, requests, same, same_as_alone
from helpers.families import FAMILIES
from helpers.fidelity import MOST, SAMPLING, TALKS, Reference, reference

from llava_cli import Conversation, load
from llava_cli.engine.local import LocalEngine
from llava_cli.engine.visual_tokens import most_diverse
from llava_cli.errors import UsageError
from llava_cli.loader import load_prompter
from llava_cli.settings import LoadOptions

Get = Callable[[str], Path]
FEW = 5
ONE_LIST = ("llava-llama", "llava-mistral", "llava-full", "llava-layers", "llava-interleave", "vip-llava")
TILES = tuple(family for family in FAMILIES if family not in ONE_LIST)


@pytest.fixture(scope="session")
def seeing(checkpoint: Get) -> Callable[[str, int], LocalEngine]:
    """The engine over a family's tiny checkpoint that sees so many tokens of a picture, loaded once."""
    loaded: dict[tuple[str, int], LocalEngine] = {}

    def get(family: str, tokens: int) -> LocalEngine:
        key = family, tokens
        if key not in loaded:
            loaded[key] = load(str(checkpoint(family)), precision="fp32", device="cpu", visual_tokens=tokens)
        return loaded[key]

    return get


def as_the_paper_says(features: list[list[float]], count: int) -> list[int]:
    """Algorithm 1 of arXiv 2503.02175 in plain words: features [tokens][width] -> the tokens that stay, ascending."""

    def distance(one: int, other: int) -> float:
        a, b = features[one], features[other]
        lengths = sum(x * x for x in a) ** 0.5 * sum(x * x for x in b) ** 0.5
        return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / lengths

    chosen: list[int] = []
    rest = list(range(len(features)))
    while len(chosen) < count:
        nearest = {i: min(distance(i, j) for j in (chosen or rest) if j != i) for i in rest}
        best = max(rest, key=lambda i: nearest[i])
        chosen.append(best)
        rest.remove(best)
    return sorted(chosen)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 19, 20])
def test_the_tokens_are_those_of_the_paper(count: int) -> None:
    features = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(count))
    expected = [as_the_paper_says(one, count) for one in features.tolist()]
    assert most_diverse(features, count).tolist() == expected
    assert most_diverse(features * torch.rand(3, 20, 1).add(0.5), count).tolist() == expected  # their length is nothing
    assert len({tuple(row) for row in expected}) > 1 or count == 20


def test_no_token_is_chosen_twice_where_all_are_alike() -> None:
    alike = torch.ones(2, 9, 4, dtype=torch.bfloat16)
    alike[1] = 0
    for row in most_diverse(alike, 6).tolist():
        assert len(set(row)) == 6 and row == sorted(row)


def pruned_by_hand(by: Reference, engine: LocalEngine, talk: Conversation, count: int) -> list[int]:
    """The answer of `generate` to embeddings whose pictures were shortened here."""
    inputs = by.inputs(engine, talk)
    with torch.inference_mode():
        out = by.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
        words = by.model.get_input_embeddings()(inputs["input_ids"])[0]
    left = [one[as_the_paper_says(one.tolist(), count)] for one in out]
    image = (inputs["input_ids"][0] == by.model.config.image_token_id).tolist()
    each, seen, rows = sum(image) // len(left), 0, []
    for word, is_image in zip(words, image, strict=True):
        if not is_image:
            rows.append(word)
            continue
        if seen % each == 0:
            rows.extend(left[seen // each])
        seen += 1
    embedded = torch.stack(rows)[None]
    options: dict[str, Any] = {"attention_mask": torch.ones(embedded.shape[:2]), "max_new_tokens": MOST}
    tokens: list[int] = by.model.generate(inputs_embeds=embedded, do_sample=False, **options)[0].tolist()
    end = by.processor.tokenizer.eos_token_id
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@pytest.mark.parametrize("family", ONE_LIST)
def test_answers_are_those_of_generate_with_the_same_tokens(
    family: str, checkpoint: Get, seeing: Callable[[str, int], LocalEngine]
) -> None:
    engine, by = seeing(family, FEW), reference(family, checkpoint(family))
    for talk in (TALKS["wide"], TALKS["several"], TALKS["turns"]):
        answer, expected = engine.answer(talk, SAMPLING), pruned_by_hand(by, engine, talk, FEW)
        assert (answer.text, answer.answer_tokens) == (by.text(expected), len(expected))
        assert engine.prompter.count(engine.inputs(talk))[1] == FEW * len(talk.pictures)
        assert expected != by.tokens(engine, talk)[0]


@pytest.mark.parametrize("family", ONE_LIST)
def test_as_many_as_there_are_or_more_is_all(
    family: str, engines: Callable[[str], LocalEngine], seeing: Callable[[str, int], LocalEngine]
) -> None:
    whole = engines(family)
    each = whole.prompter.count(whole.inputs(TALKS["one"]))[1]
    for tokens in (each, 1000):
        for talk in (TALKS["one"], TALKS["several"]):
            inputs, expected = seeing(family, tokens).inputs(talk), whole.inputs(talk)
            assert all(torch.equal(inputs[name], expected[name]) for name in expected)
            assert seeing(family, tokens).answer(talk, SAMPLING).text == whole.answer(talk, SAMPLING).text


@pytest.mark.parametrize("family, size", [*((family, 3) for family in ONE_LIST), ("llava-llama", None)])
def test_answers_in_a_batch_are_those_alone(
    family: str, size: int | None, seeing: Callable[[str, int], LocalEngine]
) -> None:
    same_as_alone(seeing(family, FEW), requests(), size)


@pytest.mark.parametrize("family", ["llava-llama", "llava-interleave", "vip-llava"])
def test_a_chat_reads_only_what_is_new(family: str, seeing: Callable[[str, int], LocalEngine]) -> None:
    loaded = seeing(family, FEW)
    engine = LocalEngine("one", loaded.network, loaded.prompter, "fp32", 0)
    talk, read = Conversation().ask("what is this?", [picture(60, 60, 1)]), 0
    for question, pictures in (("and this?", [picture(100, 60, 2)]), ("which is larger?", []), ("", [])):
        fresh = LocalEngine("one", loaded.network, loaded.prompter, "fp32", 0)
        answer = same(engine, fresh, talk)
        assert answer.cached_tokens >= read
        read = answer.prompt_tokens
        talk = talk.answered(answer.text).ask(question, pictures)
    assert answer.cached_tokens > 2 * FEW


def test_pictures_that_stand_side_by_side_and_their_name_in_the_text(tmp_path: Path) -> None:
    (tmp_path / "bare.jinja").write_text(
        "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
        "{% endfor %}"
    )
    talk = Conversation().ask("<image> is what? <image>", [picture(60, 60, n) for n in range(3)])
    settings = {"model": "builtin", "template": str(tmp_path / "bare.jinja")}
    whole, few = (load_prompter(LoadOptions(visual_tokens=n, **settings)) for n in (None, 7))
    for _ in range(2):  # the second time out of what is kept
        inputs = few.encode(talk)
        tokens, image_tokens = few.count(inputs)
        assert image_tokens == 3 * 7
        assert tokens == whole.count(whole.encode(talk))[0] - 3 * (64 - 7)
        assert inputs["attention_mask"].shape == inputs["input_ids"].shape


@pytest.mark.parametrize("family", [family for family in TILES if family != "pixtral"])
def test_pictures_in_tiles_are_refused_before_a_weight_is_read(
    family: str, checkpoint: Get, run: Run, drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_cli.models.weights.load_model", None)
    folder, kind = str(checkpoint(family)), json.loads((checkpoint(family) / "config.json").read_text())["model_type"]
    rows = tmp_path / "rows.jsonl"
    for command in (["ask", drawing], ["prompt", drawing], ["batch", drawing.parent, "-o", rows]):
        result = run(*command, "what is this?", "-m", folder, "--visual-tokens", "8")
        assert (result.exit_code, result.stdout) == (2, "")
        line, hint = result.stderr.splitlines()
        assert line.startswith(f"llava: --visual-tokens 8: {folder} is a {kind} model; only llava and vipllava models")
        assert hint == f"  llava ask -m {folder}"
    assert not (tmp_path / "rows.jsonl.run" / "settings.json").exists()


def test_a_tower_whose_pictures_are_of_any_length_is_refused(checkpoint: Get, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llava-llama"), tmp_path / "pixtral")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = {"model_type": "pixtral"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="is a pixtral model"):
        load_prompter(LoadOptions(model=str(folder), visual_tokens=8))


def test_the_built_in_model_sees_an_easy_drawing_with_half_of_its_tokens(run: Run, drawing: Path) -> None:
    command = ["ask", drawing, "what is this?", "--json"]
    said = {n: json.loads(run(*command, "--visual-tokens", n).stdout) for n in ("64", "32")}
    whole = json.loads(run(*command).stdout)
    assert (said["64"]["answer"], said["64"]["prompt_tokens"]) == (whole["answer"], whole["prompt_tokens"])
    assert said["32"]["answer"] == "a red circle and a blue triangle on a white background"
    assert said["32"]["prompt_tokens"] == whole["prompt_tokens"] - 32


def test_the_prompt_says_how_many_are_left(
    run: Run, checkpoint: Get, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["prompt", drawing, drawing, "what changed?", "-m", checkpoint("llava-llama")]
    assert run(*command, "--visual-tokens", "3").stderr.endswith(" tokens, 6 of them for 2 picture(s)\n")
    monkeypatch.setenv("LLAVA_VISUAL_TOKENS", "4")
    assert json.loads(run(*command, "--json").stdout)["image_tokens"] == 8


def test_rows_of_a_batch(run: Run, drawing: Path, tmp_path: Path) -> None:
    """Right as alone, the same command goes on, and no other number of tokens does."""
    out = tmp_path / "rows.jsonl"
    command = ["batch", drawing.parent, "what is this?", "--include", "*.png", "-o", out, "--visual-tokens"]
    assert run(*command, "32").exit_code == 0
    assert json.loads(out.read_text())["answer"] == "a red circle and a blue triangle on a white background"
    assert run(*command, "32").exit_code == 0
    result = run(*command, "16")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (
        65,
        f"llava: {out}: other settings made its rows: visual_tokens was 32, is 16",
    )
