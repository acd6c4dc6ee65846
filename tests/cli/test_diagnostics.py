"""`llava doctor MODEL`: a checkpoint held against transformers itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.command import Run
from helpers.families import FAMILIES
from helpers.tables import for_each
from safetensors.torch import load_file, save_file

from llava_cli import load
from llava_cli.diagnostics import checkup
from llava_cli.settings import LoadOptions

Checkpoint = Callable[[str], Path]
CHECKS = [
    "files",
    "family",
    "tokenizer",
    "template",
    "generation",
    "end tokens",
    "image tokens",
    "precision",
    "memory",
    "cpu kernels",
    "forward pass",
    "answer",
]


def failed(run: Run, *args: str | Path) -> list[str]:
    result = run("doctor", *args, "--json")
    found = [check["check"] for check in json.loads(result.stdout) if not check["good"]]
    assert result.exit_code == (69 if found else 0)
    return found


@for_each("precision", ["fp32", "bf16", "8bit", "4bit"])
def test_the_built_in_model_is_right_in_every_precision(precision: str, run: Run) -> None:
    result = run("doctor", "builtin", "-p", precision, "--device", "cpu")
    assert [line.split("\t")[:2] for line in result.stdout.splitlines()] == [["ok", name] for name in CHECKS]


@for_each("family", FAMILIES)
def test_every_family_is_right(family: str, checkpoint: Checkpoint) -> None:
    folder = str(checkpoint(family))
    checks = list(checkup(LoadOptions(model=folder, precision="fp32", device="cpu")))
    assert [(name, words) for name, good, words in checks if not good] == []
    assert [check.name for check in checks] == CHECKS


def test_what_a_wrong_number_of_image_tokens_looks_like(
    run: Run, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it not put right, and refused, before the weights are read."""
    monkeypatch.setattr("llava_cli.prompts.processor.sync_processor_to_model", lambda *args: None)
    monkeypatch.setattr("llava_cli.prompts.image_token_check.check_image_tokens", lambda *args: None)
    folder = tmp_path / "wrong"
    shutil.copytree(checkpoint("llava-llama"), folder)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_additional_image_tokens": 3}))
    assert failed(run, folder, "-p", "fp32") == ["image tokens", "forward pass", "answer"]


def test_broken_numbers_are_found(run: Run, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint("llava-llama"), folder)
    weights = load_file(path := folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
    save_file({**weights, name: torch.full_like(weights[name], torch.nan)}, path, metadata={"format": "pt"})
    assert "forward pass" in failed(run, folder, "-p", "fp32")


def test_what_cannot_be_loaded(run: Run, tmp_path: Path) -> None:
    assert failed(run, tmp_path) == ["load"]
    assert failed(run, "llava-1.5-7b") == ["load"]


def test_double_quantization(run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed(run, "builtin", "-p", "4bit", "--double-quant") == []
    args = ("ask", "-q", "-p", "4bit", drawing, "how many shapes are there?")
    assert run(*args, "--double-quant").stdout == "2\n"
    monkeypatch.setenv("LLAVA_DOUBLE_QUANT", "maybe")
    assert run(*args).exit_code == 2
    monkeypatch.setenv("LLAVA_DOUBLE_QUANT", "yes")
    nested = {
        layer.weight.quant_state.nested
        for layer in load("builtin", precision="4bit", device="cpu").network.modules()
        if type(layer).__name__ == "Linear4bit"
    }
    assert nested == {True}


def test_a_gpu_in_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 * 10**9, 85 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr("llava_cli.diagnostics.copy_rate", lambda device: 3e12)
    facts = json.loads(run("doctor", "--json", "--device", "cpu").stdout)
    expected = "NVIDIA H100, compute capability 9.0, 85.0 GB, 70.0 GB free, copies at 3,000 GB/s"
    assert facts["gpu 0"] == expected


def test_flash_attention_that_cannot_be_had(run: Run, drawing: Path) -> None:
    done = run("ask", drawing, "what?", "--attention", "flash", "--device", "cpu")
    reason, hint = "only NVIDIA's GPUs have it", "--attention sdpa is torch's own"
    assert (done.exit_code, done.stderr) == (2, f"llava: --attention flash: {reason}\n  {hint}\n")
