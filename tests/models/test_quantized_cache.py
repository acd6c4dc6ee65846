"""Quantised copies: made once, found again, as good as new, and gone when that is wanted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.command import Run
from helpers.engines import CONVERSATIONS
from helpers.tables import for_each

from llava_cli import Sampling, load, paths
from llava_cli.models import quantized_cache
from llava_cli.models.quantized_cache import QuantizedCopy
from llava_cli.settings import Precision

PRECISIONS: tuple[Precision, ...] = ("4bit", "8bit")


def kept() -> list[str]:
    return sorted(path.name for path, _ in quantized_cache.copies())


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each copy that is made."""
    made: list[str] = []
    keep = quantized_cache.keep

    def told(model: object, copy: QuantizedCopy, dtype: torch.dtype) -> bool:
        made.append(copy.path.name)
        return keep(model, copy, dtype)

    monkeypatch.setattr(quantized_cache, "keep", told)
    return made


@for_each(
    "precision, family",
    [
        *((precision, "llava-llama") for precision in PRECISIONS),
        *(("4bit", "llava-next-mistral"), ("8bit", "llava-onevision"), ("4bit", "smolvlm")),
    ],
    own=(quantized,),
)
def test_a_copy_answers_like_what_it_was_made_of(
    family: str,
    precision: Precision,
    checkpoint: Callable[[str], Path],
    quantized: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer() -> str:
        engine = load(str(checkpoint(family)), precision=precision, device="cpu")
        assert engine.precision == precision
        return engine.answer(CONVERSATIONS["two"], Sampling(max_tokens=12)).text

    list(quantized_cache.prune())
    with monkeypatch.context() as without:
        without.setattr(quantized_cache, "keep", lambda model, copy, dtype: False)
        itself = answer()
    assert not kept()
    assert answer() == itself
    assert kept() == quantized
    assert answer() == itself
    assert len(quantized) == 1


def test_what_another_copy_is_made_for(
    checkpoint: Callable[[str], Path], quantized: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llava-llama"), folder)
    load(str(folder), precision="4bit", device="cpu")
    load(str(folder), precision="8bit", device="cpu")
    monkeypatch.setenv("LLAVA_DOUBLE_QUANT", "yes")
    load(str(folder), precision="4bit", device="cpu")
    assert len(set(quantized)) == len(kept()) == 3
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    load(str(folder), precision="4bit", device="cpu")
    assert len(set(quantized)) == 4
    load(str(folder), precision="bf16", device="cpu")
    assert len(quantized) == 4


def test_a_copy_that_is_cut_off_is_made_again(checkpoint: Callable[[str], Path], quantized: list[str]) -> None:
    load(str(checkpoint("llava-llama")), precision="4bit", device="cpu")
    (copy,) = paths.quantized_cache().iterdir()
    weights = next(copy.glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    load(str(checkpoint("llava-llama")), precision="4bit", device="cpu")
    assert len(quantized) == 2
    assert weights.stat().st_size == len(whole)


@pytest.mark.parametrize("trouble", ["full", "read-only", "another was first"])
def test_where_no_copy_can_be_kept_the_model_is_there_all_the_same(
    trouble: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*args: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    folder = checkpoint("llava-llama")
    if trouble == "full":
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    elif trouble == "read-only":
        monkeypatch.setattr("os.mkdir", cannot)
    else:
        monkeypatch.setattr("os.rename", cannot)
    engine = load(str(folder), precision="4bit", device="cpu")
    assert engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=3)).answer_tokens
    assert kept() == []


def test_prune(run: Run, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert run("models", "prune").stderr == "there are no quantized copies\n"
    load(str(checkpoint("llava-llama")), precision="4bit", device="cpu")
    load("builtin", precision="4bit", device="cpu")
    (paths.quantized_cache() / ".begun-1").mkdir()
    names = kept()
    assert len(names) == 3
    pruned = run("models", "prune")
    assert pruned.exit_code == 0
    assert [line.split()[0] for line in pruned.stdout.splitlines()] == names
    assert kept() == []
    assert load("builtin", precision="4bit", device="cpu")
