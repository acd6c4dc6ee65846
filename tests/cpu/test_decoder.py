"""A decoder with kernels: steps say what reading everything says, and texts are those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import CONVERSATIONS
from helpers.families import FAMILIES
from helpers.kernels import needs_kernels, use_isas

from llava_cli import Conversation, Sampling, load, open_picture
from llava_cli.engine.cpu import attention, decoder
from llava_cli.engine.cpu.decoder_passes import DecodeStep
from llava_cli.engine.forward import Forward
from llava_cli.engine.kv_cache import ROOM, RoomyCache
from llava_cli.engine.local import LocalEngine
from llava_cli.settings import Precision

BOUNDS: list[tuple[Precision, float]] = [("bf16", 0.08), ("4bit", 0.25), ("8bit", 0.25)]
"""How far logits may be off, relative to their norm: with such weights bf16 is 4 to 7 % off fp32 itself."""


def greedy(engine: LocalEngine) -> list[str]:
    sampling = Sampling(max_tokens=12)
    return [engine.answer(CONVERSATIONS[name], sampling).text for name in ("two", "turns")]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_are_transformers(family: str, engines: Callable[[str], LocalEngine]) -> None:
    engine = engines(family)
    texts = greedy(engine)
    with engine.patch.undone():
        assert greedy(engine) == texts


@pytest.mark.parametrize("family", ["llava-llama", "llava-onevision", "smolvlm"])
def test_greedy_texts_with_torchs_attention_of_many_tokens(
    family: str, engines: Callable[[str], LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = greedy(engines(family))
    monkeypatch.setattr(attention, "_torchs_is_faster", lambda dtype, tokens: True)
    assert greedy(engines(family)) == texts


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each decode step that is taken."""
    rows: list[int] = []
    step = DecodeStep.__call__
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, x, *args: rows.append(len(x)) or step(self, x, *args))
    return rows


def check_steps(folder: Path, precision: Precision, bound: float, steps: list[int]) -> None:
    """One token behind others, far enough for the cache to move."""
    engine = load(str(folder), precision=precision, device="cpu")
    torch.manual_seed(0)
    ids = torch.randint(3, 40, (1, ROOM + 25))
    engine.logits({"input_ids": ids[:, :20]})
    for end in range(21, ids.shape[1] + 1):
        logits = engine.logits({"input_ids": ids[:, :end]})
    assert len(steps) == ids.shape[1] - 20
    engine.logits({"input_ids": ids[:, 1:]})  # so that nothing is cached for the same prompt
    expected = engine.logits({"input_ids": ids})
    assert len(steps) == ids.shape[1] - 20
    assert (logits - expected).norm() < bound * expected.norm()


@needs_kernels
@pytest.mark.parametrize("family", ["llava-llama", "llava-next-mistral", "llava-onevision", "smolvlm"])
def test_a_step_says_what_reading_everything_says(
    family: str, checkpoint: Callable[[str], Path], steps: list[int]
) -> None:
    check_steps(checkpoint(family), "fp32", 1e-5, steps)


@needs_kernels
@pytest.mark.parametrize("precision, bound", BOUNDS)
def test_a_step_says_so_in_every_precision(
    precision: Precision, bound: float, checkpoint: Callable[[str], Path], steps: list[int], each_cpu: None
) -> None:
    check_steps(checkpoint("llava-llama"), precision, bound, steps)


@needs_kernels
@pytest.mark.parametrize("precision, bound", [("fp32", 1e-5), ("bf16", 0.03), ("4bit", 0.1), ("8bit", 0.1)])
def test_a_step_of_several_rows_says_what_reading_everything_says(
    precision: Precision, bound: float, checkpoint: Callable[[str], Path], steps: list[int]
) -> None:
    """Of different lengths, so that padding stands on the left of some."""
    engine = load(str(checkpoint("llava-llama")), precision=precision, device="cpu")
    forward = Forward(engine.network)
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 40, (5, 30)), torch.ones(5, 30, dtype=torch.bool)
    for row in range(1, 5):
        mask[row, : 3 * row] = False
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = RoomyCache()
    forward({"input_ids": ids[:, :20]}, cache, mask[:, :20], positions[:, :20])
    for end in range(21, 31):
        inputs = {"input_ids": ids[:, end - 1 : end]}
        logits = forward(inputs, cache, mask[:, :end], positions[:, end - 1 : end])
    assert steps == [5] * 10
    expected = forward({"input_ids": ids}, RoomyCache(), mask, positions)
    assert (logits - expected).norm() < bound * expected.norm()
    alone = torch.cat([engine.logits({"input_ids": ids[row : row + 1, 3 * row :]}) for row in range(5)])
    assert (logits - alone).norm() < bound * expected.norm()


@needs_kernels
def test_decoders_of_another_kind_are_left_alone() -> None:
    """One whose heads share keys unevenly, with another activation, or no decoder at all."""
    from transformers import LlamaConfig, LlamaModel

    def suits(kv_heads: int, activation: str = "silu") -> bool:
        config = LlamaConfig(
            hidden_size=192,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=6,
            num_key_value_heads=kv_heads,
            head_dim=32,
            hidden_act=activation,
        )
        with torch.device("meta"):
            return decoder.suits(LlamaModel(config))

    assert suits(3)
    assert not suits(4)
    assert not suits(3, "gelu")
    other: Any = torch.nn.Linear(1, 1)
    assert not decoder.suits(other)


@pytest.mark.parametrize("precision, bound", [("bf16", 0.01), ("4bit", 0.15), ("8bit", 0.15)])
def test_logits_are_near_those_of_transformers(
    precision: Precision, bound: float, drawing: Path, each_cpu: None
) -> None:
    """Relative to their norm: bf16 rounds to 0.4 %, 8-bit activations to 1.2 % a layer."""
    engine = load("builtin", precision=precision, device="cpu")
    inputs = engine.inputs(Conversation().ask("what is this?", [open_picture(str(drawing))]))
    logits = engine.logits(inputs)[0].float()
    with torch.inference_mode(), engine.patch.undone():
        expected = engine.network(**inputs, logits_to_keep=1).logits[0, -1].float()
    assert (logits - expected).norm() < bound * expected.norm()
    assert logits.argmax() == expected.argmax()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "8bit"])
def test_answers_where_nothing_can_be_compiled(
    precision: Precision, monkeypatch: pytest.MonkeyPatch, drawing: Path
) -> None:
    use_isas(monkeypatch)
    engine = load("builtin", precision=precision, device="cpu")
    assert engine.ask(str(drawing), "what color is the circle?") == "red"
