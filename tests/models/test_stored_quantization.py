"""Checkpoints that are stored quantized: right ones are loaded, and those that would be read out of bounds are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Shell
from helpers.engines import CONVERSATIONS
from safetensors import safe_open
from safetensors.torch import save_file

from llava_cli import Sampling, load, paths
from llava_cli.errors import ModelUnusable
from llava_cli.models import quantized_cache
from llava_cli.models.stored_quantization import misfit
from llava_cli.settings import Precision

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], object]
LAYER = "q_proj"


@pytest.fixture(scope="module")
def quantized(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Precision, bool], Path]:
    """A checkpoint as others quantize it, made once."""

    @cache
    def get(precision: Precision, double: bool) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLAVA_CACHE", str(tmp_path_factory.mktemp("cache")))
            load(str(checkpoint("llava-llama")), precision=precision, double_quant=double, device="cpu")
            (copy,) = paths.quantized_cache().iterdir()
        folder = tmp_path_factory.mktemp("quantized")
        others = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(checkpoint("llava-llama"), folder, ignore=others, dirs_exist_ok=True)
        ours = shutil.ignore_patterns("arranged-*", quantized_cache.LABEL)
        shutil.copytree(copy, folder, ignore=ours, dirs_exist_ok=True)
        return folder

    return get


@pytest.fixture
def stored(quantized: Callable[[Precision, bool], Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint that others have quantized, to be changed: `stored("4bit", double=True)` -> its folder."""

    def get(precision: Precision, double: bool = False) -> Path:
        return Path(shutil.copytree(quantized(precision, double), tmp_path / "stored"))

    return get


def change(folder: Path, edit: Edit) -> None:
    """Edits the tensors of the first layer, by their names without the prefix that its weight is named."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    prefix = next(name for name in sorted(tensors) if name.endswith(f"{LAYER}.weight"))
    layer = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
    scales = prefix.removesuffix("weight") + "SCB"
    if scales in tensors:
        layer["SCB"] = tensors.pop(scales)
    edit(layer)
    named = {scales if name == "SCB" else prefix + name: tensor.contiguous() for name, tensor in layer.items()}
    path.unlink()
    save_file({**tensors, **named}, path, {"format": "pt"})


def shorter(name: str, by: int = 1) -> Edit:
    return lambda tensors: tensors.update({name: tensors[name].flatten()[:-by].clone()})


def of_type(name: str, dtype: torch.dtype) -> Edit:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def state(**values: Any) -> Edit:
    """Changes what a layer's packed JSON says."""

    def edit(tensors: Tensors) -> None:
        name = next(name for name in tensors if "quant_state" in name)
        state = {**json.loads(bytes(tensors[name].tolist())), **values}
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return edit


HOSTILE: dict[str, tuple[Edit, bool]] = {
    "no scales at all": (lambda tensors: tensors.update({".absmax": tensors[".absmax"][:0]}), False),
    "a scale too few": (shorter(".absmax"), False),
    "half the scales": (shorter(".absmax", 64), False),
    "a scale too many": (lambda tensors: tensors.update({".absmax": torch.ones(129)}), False),
    "scales in 16 bits": (of_type(".absmax", torch.float16), False),
    "scales in 8 bits without more": (of_type(".absmax", torch.uint8), False),
    "scales in rows": (lambda tensors: tensors.update({".absmax": tensors[".absmax"].view(2, -1)}), False),
    "a code too few": (shorter(".quant_map"), False),
    "no codes": (lambda tensors: tensors.update({".quant_map": tensors[".quant_map"][:0]}), False),
    "codes in 16 bits": (of_type(".quant_map", torch.bfloat16), False),
    "codes of 8 bits": (lambda tensors: tensors.update({".quant_map": torch.rand(256)}), False),
    "a byte too few": (shorter(""), False),
    "a byte": (lambda tensors: tensors.update({"": tensors[""][:1].clone()}), False),
    "twice the bytes": (lambda tensors: tensors.update({"": tensors[""].repeat(2, 1)}), False),
    "transposed": (state(shape=[64, 128]), False),
    "in one dimension": (state(shape=[8192]), False),
    "in three": (state(shape=[1, 128, 64]), False),
    "larger": (state(shape=[1 << 20, 1 << 20]), False),
    "without a shape": (state(shape=None), False),
    "negative": (state(shape=[-128, -64]), False),
    "blocks of 0": (state(blocksize=0), False),
    "blocks of -64": (state(blocksize=-64), False),
    "blocks of 63": (state(blocksize=63), False),
    "blocks of a fraction": (state(blocksize=64.0), False),
    "blocks of a word": (state(blocksize="64"), False),
    "blocks of true": (state(blocksize=True), False),
    "larger blocks than there are scales for": (state(blocksize=32), False),
    "smaller blocks than there are scales for": (state(blocksize=4096), False),
    "blocks of 2^40": (state(blocksize=1 << 40), False),
    "another type": (state(dtype="int8"), False),
    "a function as type": (state(dtype="load"), False),
    "another kind": (state(quant_type="nf5"), False),
    "deep": (lambda tensors: tensors.update({".quant_state.bitsandbytes__nf4": _bytes(b"[" * 100_000)}), False),
    "plain weights": (lambda tensors: (tensors.clear(), tensors.update({"": torch.rand(128, 64)})), False),
    "a scale of scales too few": (shorter(".nested_absmax"), True),
    "a code of scales too few": (shorter(".nested_quant_map"), True),
    "codes of scales of 4 bits": (lambda tensors: tensors.update({".nested_quant_map": torch.rand(16)}), True),
    "a quantized scale too few": (shorter(".absmax"), True),
    "quantized scales in 32 bits": (of_type(".absmax", torch.float32), True),
    "scales of scales in 16 bits": (of_type(".nested_absmax", torch.float16), True),
    "blocks of scales of 0": (state(nested_blocksize=0), True),
    "blocks of scales of 64": (state(nested_blocksize=64), True),
    "another type of scales": (state(nested_dtype="int32"), True),
}


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.mark.parametrize("edit, double", HOSTILE.values(), ids=HOSTILE)
def test_a_layer_in_4_bits_that_lacks_something_is_refused(
    edit: Edit, double: bool, stored: Callable[..., Path]
) -> None:
    change(folder := stored("4bit", double), edit)
    with pytest.raises(ModelUnusable) as refused:
        load(str(folder), device="cpu")
    assert (refused.value.thing, refused.value.exit_code) == (str(folder), 69)
    assert len(refused.value.reason.splitlines()) == 1 and len(refused.value.reason) < 300


HOSTILE_8: dict[str, Edit] = {
    "a scale too few": shorter("SCB"),
    "one scale": lambda tensors: tensors.update(SCB=tensors["SCB"][:1].clone()),
    "no scale": lambda tensors: tensors.pop("SCB"),
    "scales in 16 bits": of_type("SCB", torch.float16),
    "scales in a column": lambda tensors: tensors.update(SCB=tensors["SCB"][:, None]),
    "a row too few": lambda tensors: tensors.update({"": tensors[""][:-1].clone()}),
    "a column too few": lambda tensors: tensors.update({"": tensors[""][:, :-1].clone()}),
    "in one dimension": lambda tensors: tensors.update({"": tensors[""].flatten()}),
    "plain weights": lambda tensors: (tensors.clear(), tensors.update({"": torch.rand(128, 64)})),
}


@pytest.mark.parametrize("edit", HOSTILE_8.values(), ids=HOSTILE_8)
def test_a_layer_in_8_bits_that_lacks_something_is_refused(edit: Edit, stored: Callable[..., Path]) -> None:
    change(folder := stored("8bit"), edit)
    with pytest.raises(ModelUnusable):
        load(str(folder), device="cpu")


@pytest.mark.parametrize("precision, double", [("4bit", False), ("4bit", True), ("8bit", False)])
def test_what_others_have_quantized_rightly_is_loaded(
    precision: str, double: bool, stored: Callable[..., Path]
) -> None:
    engine = load(str(stored(precision, double)), device="cpu")
    assert (engine.precision, misfit(engine.network)) == (precision, None)
    assert engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=3)).answer_tokens == 3


@pytest.mark.parametrize(
    "precision, name", [("4bit", ".absmax"), ("8bit", "SCB")], ids=["absmax without end", "SCB without end"]
)
def test_the_command_refuses_it_in_one_line(
    precision: str, name: str, stored: Callable[..., Path], shell: Shell, drawing: Path
) -> None:
    """As a process of its own, which would end with a signal: without a check one scale is read as 128."""
    change(folder := stored(precision), lambda tensors: tensors.update({name: tensors[name][:1].clone()}))
    done = shell("ask", "-m", folder, drawing, "what is this?")
    first, *hints = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout, hints) == (69, b"", [])
    assert first.startswith(f"llava: {folder}: damaged: model.language_model.layers.0.self_attn.{LAYER} has 1 scales")
