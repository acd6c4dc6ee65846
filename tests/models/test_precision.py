"""Device and precision: what auto chooses, what 4-bit leaves alone, what the vision options change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Run
from helpers.engines import kinds
from helpers.tables import for_each
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from llava_cli import Conversation, Sampling, load
from llava_cli.conversation import Picture
from llava_cli.errors import UsageError
from llava_cli.hardware.device import Plan, choose_plan
from llava_cli.models.weights import _quantization_config

TALK = Conversation().ask("what is this?", [Picture("red", Image.new("RGB", (80, 50), "red"), sha256="")])


def test_auto_never_chooses_fp16_on_a_cpu() -> None:
    how = choose_plan("cpu", "auto")
    assert how.precision in ("bf16", "fp32")
    assert how.precision == ("bf16" if "has bf16" in how.why else "fp32")
    assert how.attention == "sdpa"


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_weights_have_the_precision_that_was_asked(precision: str, dtype: torch.dtype, drawing: Path) -> None:
    engine = load("builtin", precision=precision, device="cpu")
    assert {p.dtype for p in engine.network.parameters()} == {dtype}
    assert engine.precision == precision
    assert engine.ask(str(drawing), "how many shapes are there?", max_tokens=3)


@for_each(
    "family, precision, layer",
    [
        *((family, "4bit", "Linear4bit") for family in ("builtin", "llava-next-mistral", "pixtral", "smolvlm")),
        *((family, "8bit", "Linear8bitLt") for family in ("builtin", "llava-onevision")),
    ],
)
def test_only_the_decoder_is_quantized(
    precision: str, layer: str, family: str, checkpoint: Callable[[str], Path]
) -> None:
    name = family if family == "builtin" else str(checkpoint(family))
    engine = load(name, precision=precision, device="cpu")
    found = kinds(engine.network)
    rows = {n: engine.network.get_submodule(n).in_features for n in found}
    decoder = {n for n in found if ".language_model." in n or ".text_model." in n}
    inner = {n for n in decoder if rows[n] % 64 == 0 or precision == "8bit"}
    assert inner
    assert {found[n] for n in inner} == {layer}
    assert {found[n] for n in found if n not in inner} == {"Linear"}
    assert family == "builtin" or any(size % 64 for size in rows.values())
    assert any("vision" in n for n in found)
    assert any("projector" in n or "connector" in n for n in found)
    assert "lm_head" in found
    assert engine.answer(TALK, Sampling(max_tokens=3)).answer_tokens > 0


@for_each("device, precision", [("cpu", "4bit"), ("cuda", "4bit"), ("cuda", "8bit")])
def test_rows_that_are_not_whole_blocks_have_no_4_bits_on_any_device(
    device: str, precision: str, checkpoint: Callable[[str], Path]
) -> None:
    config = AutoConfig.from_pretrained(checkpoint("smolvlm"))
    plan = Plan(device, precision, "sdpa", "as asked")
    skipped = _quantization_config("smolvlm", plan, config, torch.bfloat16, False).llm_int8_skip_modules
    model = AutoModelForImageTextToText.from_config(config)
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".text_model." in n]
    odd = {n for n in layers if model.get_submodule(n).in_features % 64}
    assert {*layers} > odd > set()
    assert odd & {*skipped} == (odd if precision == "4bit" else set())
    assert not ({*layers} - odd) & {*skipped}


def test_4bit_is_nf4_and_computes_in_what_the_cpu_is_fast_in() -> None:
    engine = load("builtin", precision="4bit", device="cpu")
    fast = torch.bfloat16 if choose_plan("cpu", "auto").precision == "bf16" else torch.float32
    layers = [m for m in engine.network.modules() if type(m).__name__ == "Linear4bit"]
    assert {m.compute_dtype for m in layers} == {engine.network.dtype} == {fast}
    assert {m.weight.quant_state.quant_type for m in layers} == {"nf4"}


def test_device_that_is_not_there() -> None:
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(UsageError, match="this machine has none"):
        load("builtin", device=absent)


@pytest.mark.parametrize("change", [{"vision_feature_layer": -1}, {"vision_feature_layer": [-1, -2]}])
def test_vision_options_of_the_config_are_respected(
    change: dict[str, Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same weights under another option give other features (or do not load, where shapes change)."""
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint("llava-llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    plain = load(str(checkpoint("llava-llama")), precision="fp32").network.get_image_features(pixels).pooler_output[0]
    if isinstance(change["vision_feature_layer"], list):
        with pytest.raises(Exception, match=r"linear_1.weight is \[64, 64\] in its files"):
            load(str(folder), precision="fp32")
    else:
        changed = load(str(folder), precision="fp32").network.get_image_features(pixels).pooler_output[0]
        assert changed.shape == plain.shape
        assert not torch.allclose(changed, plain)


def test_precision_and_device_are_in_the_json(run: Run, drawing: Path) -> None:
    found = json.loads(
        run("ask", drawing, "how many?", "-p", "fp32", "--device", "cpu", "--json", "--max-tokens", 1).stdout
    )
    assert (found["precision"], found["device"]) == ("fp32", "cpu")
