"""What needs a GPU: the tests of other files where the device makes a difference, and what only a GPU has."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Run
from helpers.engines import CONVERSATIONS, kinds, ours, picture, requests, same, same_as_alone
from helpers.families import FAMILIES
from helpers.static_steps import Recorder

from llava_cli import Answer, Conversation, Sampling, load, open_picture
from llava_cli.engine import Request
from llava_cli.engine.forward import Forward
from llava_cli.engine.gpu import decode_graphs, patch
from llava_cli.engine.gpu.decode_step import DecodeStep
from llava_cli.engine.local import LocalEngine
from llava_cli.engine.model_patch import ModelPatch
from llava_cli.errors import OutOfMemory, UsageError, model_errors
from llava_cli.hardware.device import choose_plan
from llava_cli.hardware.memory import free_memory
from llava_cli.settings import Precision

DEVICE: Any = os.environ.get("LLAVA_TEST_DEVICE", "cuda")
"""`cpu` tries the tests themselves, with a stand-in for the capture: all but those that ask a card something."""
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU")
asks_the_card = pytest.mark.skipif(DEVICE != "cuda", reason="asks a CUDA GPU")

Engines = Callable[[str], LocalEngine]


@pytest.fixture(autouse=True)
def whole_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in fp32 otherwise round to TF32 or not, as suits the size of a batch."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def loaded(model: str | Path, precision: Precision) -> LocalEngine:
    engine = load(str(model), precision=precision, device=DEVICE)
    if DEVICE != "cuda":  # as a GPU's patch does
        engine.patch.undo()
        engine.patch, problem = ModelPatch(), decode_graphs.obstacle(engine.network)
        graphs = decode_graphs.DecodeGraphs(engine.network, None if problem else Recorder())
        graphs.problem = problem
        engine.patch.set_attribute(engine.network, "decode_graphs", graphs)
    return engine


@pytest.fixture(scope="module")
def engines(checkpoint: Callable[[str], Path]) -> Engines:
    """The engine over a family's tiny checkpoint in fp32 on the GPU, loaded once."""
    return cache(lambda family: loaded(checkpoint(family), "fp32"))


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
        # With a second picture some look at the first one in another way, and read everything again.
        is_kept = talk is second or family not in ("llava-onevision", "smolvlm", "smolvlm2")
        assert (found > 0) == (is_kept and one.can_batch(one.prepare(0, Request(talk, Sampling()))))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_a_batch_are_those_alone(family: str, engines: Engines) -> None:
    for size in (3, None):
        same_as_alone(engines(family), requests(Sampling(max_tokens=12)), size)
    same_as_alone(engines(family), requests(Sampling(max_tokens=8, temperature=1.0, seed=7)), 3)


def test_rows_of_a_batch_are_what_ask_says(run: Run, drawing: Path, tmp_path: Path) -> None:
    asked = ["what is this?", "what color is the circle?", "how many shapes are there?"]
    lines = [json.dumps({"image": drawing.name, "question": question}) for question in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    options = ("--device", DEVICE, "-p", "fp32")
    assert run("batch", tmp_path / "asked.jsonl", "-o", tmp_path / "out.jsonl", *options).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == asked
    for row in rows:
        alone = json.loads(run("ask", drawing, row["question"], "--json", *options).stdout)
        assert alone["device"] == DEVICE
        assert row["answer"] == alone["answer"]


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16", "8bit", "4bit"])
def test_every_precision_answers_alone_and_in_a_batch(precision: Precision, drawing: Path) -> None:
    engine = loaded("builtin", precision)
    assert engine.device == DEVICE
    assert {p.device.type for p in engine.network.parameters()} == {DEVICE}
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
    """All of it in 8 bits; in 4 the layers whose rows are whole blocks, as on a CPU."""
    engine = loaded(family if family == "builtin" else checkpoint(family), precision)
    found = kinds(engine.network)
    whole = {n for n in found if precision == "8bit" or engine.network.get_submodule(n).in_features % 64 == 0}
    inner = {name for name in whole if ".language_model." in name or ".text_model." in name}
    assert inner
    assert {found[name] for name in inner} == {layer}
    assert {found[name] for name in found if name not in inner} == {"Linear"}
    own = {"vision_tower": "vision_model", "projector": "connector"} if family == "smolvlm" else {}
    for part in ("vision_tower", "projector", "lm_head"):
        assert any(own.get(part, part) in name for name in found if name not in inner)
    assert engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=3)).answer_tokens > 0


@asks_the_card
def test_auto_takes_the_gpu_and_what_it_is_good_at() -> None:
    how = choose_plan("auto", "auto")
    assert how.device == "cuda"
    assert how.precision == ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")
    assert load("builtin").device == "cuda"


@asks_the_card
@pytest.mark.parametrize("precision", ["bf16", "fp16", "8bit", "4bit"])
def test_attention_is_torchs_own_unless_flash_is_asked_for(precision: Precision) -> None:
    assert choose_plan("cuda", precision).attention == "sdpa"
    if not flash(precision):
        with pytest.raises(UsageError):
            choose_plan("cuda", precision, "flash")
        return
    config = load("builtin", precision=precision, device="cuda", attention="flash").network.config
    for part in (config, config.text_config, config.vision_config):
        assert part._attn_implementation == "flash_attention_2"


@asks_the_card
def test_cudnn_makes_no_plans() -> None:
    """Where it is on, it makes one for each length: 30 ms a token."""
    load("builtin", device="cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_give_the_plain_paths_tokens(family: str, engines: Engines) -> None:
    engine = engines(family)
    graphs = engine.network.decode_graphs
    with engine.patch.undone():
        expected = [engine.answer(talk, Sampling(max_tokens=40)).text for talk in CONVERSATIONS.values()]
        batch = answers(engine, requests(Sampling(max_tokens=30)), 9)
    for _ in range(2):  # the first time shapes are captured, the second time all of them are replayed
        assert [engine.answer(talk, Sampling(max_tokens=40)).text for talk in CONVERSATIONS.values()] == expected
        for size in (9, 3):
            assert answers(engine, requests(Sampling(max_tokens=30)), size) == batch
    assert graphs.problem is None
    assert graphs.captured > 0


def test_graphs_are_captured_again_after_the_cache_has_grown(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which drops them all, and with them their memory."""
    engine, sampling = engines("llava-llama"), Sampling(max_tokens=250)
    with engine.patch.undone():
        expected = engine.answer(CONVERSATIONS["one"], sampling).text
    monkeypatch.setattr(decode_graphs, "LEAST_CAPACITY", 64)
    graphs = engine.network.decode_graphs
    for _ in range(2):
        graphs.release()
        assert engine.answer(CONVERSATIONS["one"], sampling).text == expected
        assert graphs.problem is None
        assert graphs.captured > 0


@asks_the_card
def test_steps_are_captured_while_another_thread_uses_the_card(engines: Engines) -> None:
    engine, sampling, over = engines("llava-llama"), Sampling(max_tokens=40), threading.Event()
    with engine.patch.undone():
        expected = engine.answer(CONVERSATIONS["one"], sampling).text
    graphs = engine.network.decode_graphs

    def copy() -> None:
        while not over.is_set():
            torch.ones(1 << 20).cuda().sum().item()

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        for _ in range(5):
            graphs.release()
            assert engine.answer(CONVERSATIONS["one"], sampling).text == expected
            assert (graphs.problem, graphs.captured) == (None, 1)
    finally:
        over.set()
        thread.join()


def answers(engine: LocalEngine, asked: list[Request], size: int) -> list[str]:
    return [answer.text for _, answer in sorted(engine.answer_many(iter(asked), size)) if isinstance(answer, Answer)]


@pytest.mark.parametrize("precision, is_captured", [("4bit", True), ("8bit", False)])
def test_what_is_quantized_is_captured_where_nothing_waits(precision: Precision, is_captured: bool) -> None:
    engine = loaded("builtin", precision)
    for talk in (CONVERSATIONS["one"], CONVERSATIONS["wide"]):
        engine.answer(talk, Sampling(max_tokens=40))
    assert (engine.network.decode_graphs.captured > 0) == is_captured
    how = patch.describe(engine.network)
    assert how.startswith("captured" if is_captured else "launched kernel by kernel: each layer in 8 bits")


@asks_the_card
def test_nothing_waits_while_a_step_is_replayed(engines: Engines) -> None:
    engine = engines("llava-llama")
    engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=40))
    (step, *_) = [known.replay for known in engine.network.decode_graphs._shapes.values() if known.replay]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_chat_of_five_turns_with_a_second_picture(engines: Engines) -> None:
    one = engines("llava-llama")
    kept, *fresh = (LocalEngine(one.model, one.network, one.prompter, one.precision, 0) for _ in range(6))
    talk = CONVERSATIONS["one"]
    for turn, engine in enumerate(fresh):
        answer = same(kept, engine, talk)
        assert (answer.cached_tokens > 0) == (turn > 0)
        talk = talk.answered(answer.text).ask("and this?", [picture(80, 50, 3)] if turn == 2 else [])


def test_a_batch_of_64_whose_rows_join_and_leave(engines: Engines) -> None:
    """More rows than one reads at a time, and answers of different lengths."""
    asked = [
        Request(request.conversation, Sampling(max_tokens=5 + number % 23))
        for number, request in enumerate(requests() * 15)
    ]
    same_as_alone(engines("llava-llama"), asked, 64)


def test_a_batch_that_memory_does_not_hold_is_halved(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines("llava-llama")
    expected = answers(engine, requests(), 3)
    forward = Forward.__call__

    def failing(self: Forward, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        if len(inputs["input_ids"]) > 4:
            torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
        return forward(self, inputs, *args)

    monkeypatch.setattr(Forward, "__call__", failing)
    assert answers(engine, requests(), 9) == expected


def test_an_interrupted_answer_leaves_the_engine_usable(engines: Engines) -> None:
    engine = engines("llava-llama")
    talk, sampling = CONVERSATIONS["one"], Sampling(max_tokens=30)
    expected = engine.answer(talk, sampling).text
    for stop in (1, 5, 12):
        with pytest.raises(KeyboardInterrupt):
            for number, _ in enumerate(engine.stream(talk, sampling)):
                if number == stop:
                    raise KeyboardInterrupt
        assert engine.answer(talk, sampling).text == expected


@asks_the_card
def test_free_memory_is_that_of_all_gpus() -> None:
    total = sum(torch.cuda.mem_get_info(i)[1] for i in range(torch.cuda.device_count()))
    assert 0 < free_memory("cuda") <= total


def test_memory_that_is_not_there_is_said() -> None:
    with pytest.raises(OutOfMemory), model_errors("builtin", "fails while answering"):
        torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)


@asks_the_card
def test_a_step_that_cannot_be_captured_is_computed(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test: a capture that failed may leave torch's allocator in a state that is not the usual one."""
    engine, compute = engines("llava-llama"), DecodeStep.compute
    expected = engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=40)).text

    def waiting(self: DecodeStep) -> None:
        compute(self)
        self._column.item()

    monkeypatch.setattr(DecodeStep, "compute", waiting)
    graphs = engine.network.decode_graphs
    graphs.release()
    for _ in range(2):
        assert engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=40)).text == expected
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert graphs.problem
    assert not graphs.captured
