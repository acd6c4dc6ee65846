"""What needs a GPU: the tests of other files where the device makes a difference, and what only a GPU has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.command import Run
from helpers.engines import CONVERSATIONS, kinds, ours, requests, same, same_as_alone
from helpers.families import FAMILIES

from llava_cli import Answer, Conversation, Sampling, load, open_picture
from llava_cli.engine import Request
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import OutOfMemory, model_errors
from llava_cli.hardware.device import choose_plan
from llava_cli.hardware.memory import free_memory
from llava_cli.settings import Precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

Engines = Callable[[str], LocalEngine]


@pytest.fixture(autouse=True)
def whole_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in fp32 otherwise round to TF32 or not, as suits the size of a batch."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def engines(checkpoint: Callable[[str], Path]) -> Engines:
    """The engine over a family's tiny checkpoint in fp32 on the GPU, loaded once."""
    loaded: dict[str, LocalEngine] = {}

    def get(family: str) -> LocalEngine:
        if family not in loaded:
            loaded[family] = load(str(checkpoint(family)), precision="fp32", device="cuda")
        return loaded[family]

    return get


def flash(precision: Precision) -> bool:
    from transformers.utils.import_utils import is_flash_attn_2_available

    return precision != "fp32" and torch.cuda.get_device_capability() >= (8, 0) and is_flash_attn_2_available()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: str, engines: Engines) -> None:
    engine = engines(family)
    for case, talk in CONVERSATIONS.items():
        inputs = engine.inputs(talk)
        expected = engine.network.generate(**inputs, do_sample=False, max_new_tokens=24)
        assert ours(engine, talk, Sampling()) == expected[0, inputs["input_ids"].shape[1] :].tolist(), case


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_costs_what_is_new_in_it(family: str, engines: Engines) -> None:
    one = engines(family)
    kept, *fresh = (LocalEngine(one.model, one.network, one.prompter, one.precision, 0) for _ in range(4))
    first = CONVERSATIONS["one"]
    second = first.answered(same(kept, fresh[0], first).text).ask("what color is it?")
    third = second.answered("red").ask("and this?", CONVERSATIONS["wide"].pictures)
    for talk, engine in ((second, fresh[1]), (third, fresh[2])):
        found = same(kept, engine, talk).cached_tokens
        assert (found > 0) == one.can_batch(one.prepare(0, Request(talk, Sampling())))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_a_batch_are_those_alone(family: str, engines: Engines) -> None:
    for size in (3, None):
        same_as_alone(engines(family), requests(Sampling(max_tokens=12)), size)
    same_as_alone(engines(family), requests(Sampling(max_tokens=8, temperature=1.0, seed=7)), 3)


def test_rows_of_a_batch_are_what_ask_says(run: Run, drawing: Path, tmp_path: Path) -> None:
    asked = ["what is this?", "what color is the circle?", "how many shapes are there?"]
    lines = [json.dumps({"image": drawing.name, "question": question}) for question in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    options = ("--device", "cuda", "-p", "fp32")
    assert run("batch", tmp_path / "asked.jsonl", "-o", tmp_path / "out.jsonl", *options).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == asked
    for row in rows:
        alone = json.loads(run("ask", drawing, row["question"], "--json", *options).stdout)
        assert alone["device"] == "cuda"
        assert row["answer"] == alone["answer"]


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16", "8bit", "4bit"])
def test_every_precision_answers_alone_and_in_a_batch(precision: Precision, drawing: Path) -> None:
    engine = load("builtin", precision=precision, device="cuda")
    assert engine.device == "cuda"
    assert {p.device.type for p in engine.network.parameters()} == {"cuda"}
    talk = Conversation().ask("what color is the circle?", [open_picture(str(drawing))])
    assert engine.answer(talk).text == "red"
    assert engine.peak_memory() > 0
    found = dict(engine.answer_many(requests()))
    assert len(found) == len(requests())
    assert all(isinstance(answer, Answer) and answer.answer_tokens > 0 for answer in found.values())


@pytest.mark.parametrize("precision, layer", [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
@pytest.mark.parametrize("family", ["builtin", "llava-llama", "llava-next-mistral", "llava-onevision", "smolvlm"])
def test_quantized_is_the_language_model_and_nothing_else(
    precision: Precision, layer: str, family: str, checkpoint: Callable[[str], Path]
) -> None:
    """All of it: a GPU takes rows of any length."""
    engine = load(family if family == "builtin" else str(checkpoint(family)), precision=precision, device="cuda")
    found = kinds(engine.network)
    inner = {name for name in found if ".language_model." in name}
    assert {found[name] for name in inner} == {layer}
    assert {found[name] for name in found if name not in inner} == {"Linear"}
    for part in ("vision_tower", "projector", "lm_head"):
        assert any(part in name for name in found if name not in inner)
    assert engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=3)).answer_tokens > 0


def test_auto_takes_the_gpu_and_what_it_is_good_at() -> None:
    how = choose_plan("auto", "auto")
    assert how.device == "cuda"
    assert how.precision == ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")
    assert load("builtin").device == "cuda"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "8bit", "4bit"])
def test_attention_is_flash_where_it_is_installed_else_torchs_own(precision: Precision) -> None:
    expected = "flash_attention_2" if flash(precision) else "sdpa"
    assert choose_plan("cuda", precision).attention == expected
    config = load("builtin", precision=precision, device="cuda").network.config
    for part in (config, config.text_config, config.vision_config):
        assert part._attn_implementation == expected


def test_free_memory_is_that_of_all_gpus() -> None:
    total = sum(torch.cuda.mem_get_info(i)[1] for i in range(torch.cuda.device_count()))
    assert 0 < free_memory("cuda") <= total


def test_memory_that_is_not_there_is_said() -> None:
    with pytest.raises(OutOfMemory), model_errors("builtin", "fails while answering"):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
