"""What needs a GPU. Written from the documentation; run these where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from PIL import Image

from llava_cli import Conversation, Sampling, load
from llava_cli.conversation import Picture
from llava_cli.engine.decode import decode
from llava_cli.machine import free_memory, plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TALK = Conversation().ask("what is this?", [Picture("red", Image.new("RGB", (80, 50), "red"), sha256="")])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: str, checkpoint: Callable[[str], Path]) -> None:
    engine = load(str(checkpoint(family)), precision="fp32", device="cuda")
    inputs = engine._inputs(TALK)
    expected = engine._model.generate(**inputs, do_sample=False, max_new_tokens=24)
    assert list(decode(engine._model, inputs, Sampling(), 24)) == expected[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "8bit", "4bit"])
def test_every_precision_answers(precision: str, drawing: Path) -> None:
    engine = load("builtin", precision=precision, device="cuda")
    assert engine.device == "cuda"
    assert engine.ask(str(drawing), "what is this?")
    assert engine.peak_memory() > 0


def test_auto_takes_the_gpu_and_what_it_is_good_at() -> None:
    how = plan("auto", "auto")
    assert how.device == "cuda"
    assert how.precision == ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")


def test_flash_attention_where_it_is_installed() -> None:
    from transformers.utils.import_utils import is_flash_attn_2_available

    ampere = torch.cuda.get_device_capability() >= (8, 0)
    expected = "flash_attention_2" if ampere and is_flash_attn_2_available() else "sdpa"
    assert plan("cuda", "bf16").attention == expected
    engine = load("builtin", precision="bf16", device="cuda")
    config: Any = engine._model.config
    assert config._attn_implementation == expected


def test_a_model_larger_than_one_gpu_is_spread() -> None:
    if torch.cuda.device_count() > 1:
        assert free_memory("cuda") > torch.cuda.mem_get_info(0)[0]
    assert free_memory("cuda") > 0
