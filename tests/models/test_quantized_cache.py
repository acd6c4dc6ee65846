"""Quantised copies: made once, found again, as good as new, and gone when that is wanted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.command import Run
from helpers.engines import CONVERSATIONS

from llava_cli import Sampling, load
from llava_cli.engine.cpu import packed_weights
from llava_cli.engine.cpu.jit import Layout
from llava_cli.engine.cpu.onednn_linear import Products
from llava_cli.engine.cpu.packed_weights import Arranged
from llava_cli.engine.cpu.patch import Joined
from llava_cli.models import quantized_cache
from llava_cli.models.quantized_cache import Copy
from llava_cli.models.registry import quantised_cache
from llava_cli.safetensors_header import read_header
from llava_cli.settings import Precision

PRECISIONS: tuple[Precision, ...] = ("4bit", "8bit")


def kept() -> list[str]:
    return sorted(path.name for path, _ in quantized_cache.copies())


@pytest.fixture
def quantising(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each copy that is made."""
    made: list[str] = []
    keep = quantized_cache.keep

    def told(model: object, copy: Copy) -> bool:
        made.append(copy.path.name)
        return keep(model, copy)

    monkeypatch.setattr(quantized_cache, "keep", told)
    return made


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["llava-llama", "llava-next-mistral", "llava-onevision", "smolvlm"])
def test_a_copy_answers_like_what_it_was_made_of(
    family: str,
    precision: Precision,
    checkpoint: Callable[[str], Path],
    quantising: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer() -> str:
        engine = load(str(checkpoint(family)), precision=precision, device="cpu")
        assert engine.precision == precision
        return engine.answer(CONVERSATIONS["two"], Sampling(max_tokens=12)).text

    with monkeypatch.context() as without:
        without.setattr(quantized_cache, "keep", lambda model, copy: False)
        itself = answer()
    assert not kept()
    assert answer() == itself
    assert kept() == quantising
    assert answer() == itself
    assert len(quantising) == 1


def test_what_another_copy_is_made_for(
    checkpoint: Callable[[str], Path], quantising: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llava-llama"), folder)
    load(str(folder), precision="4bit", device="cpu")
    load(str(folder), precision="8bit", device="cpu")
    monkeypatch.setenv("LLAVA_DOUBLE_QUANT", "yes")
    load(str(folder), precision="4bit", device="cpu")
    assert len(set(quantising)) == len(kept()) == 3
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    load(str(folder), precision="4bit", device="cpu")
    assert len(set(quantising)) == 4
    load(str(folder), precision="bf16", device="cpu")
    assert len(quantising) == 4


def test_a_copy_that_is_cut_off_is_made_again(checkpoint: Callable[[str], Path], quantising: list[str]) -> None:
    load(str(checkpoint("llava-llama")), precision="4bit", device="cpu")
    (copy,) = quantised_cache().iterdir()
    weights = next(copy.glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    load(str(checkpoint("llava-llama")), precision="4bit", device="cpu")
    assert len(quantising) == 2
    assert weights.stat().st_size == len(whole)


def layout_of(tensors: dict[str, torch.Tensor]) -> Layout:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def arranged_files() -> dict[str, Path]:
    return {path.stem: path for path in quantised_cache().rglob("arranged-*/*.safetensors")}


def said(folder: Path) -> str:
    engine = load(str(folder), precision="4bit", device="cpu")
    return engine.answer(CONVERSATIONS["two"], Sampling(max_tokens=12)).text


@pytest.fixture
def arranging(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each file that is made."""
    made: list[str] = []
    write = packed_weights._write

    def told(tensors: dict[str, torch.Tensor], path: Path) -> None:
        made.append(path.stem)
        write(tensors, path)

    monkeypatch.setattr(packed_weights, "_write", told)
    return made


def test_weights_are_arranged_once(checkpoint: Callable[[str], Path], arranging: list[str]) -> None:
    """For the processor, in files whose numbers it can read as they stand."""
    folder = checkpoint("llava-llama")
    first = said(folder)
    assert sorted(arranging) == sorted(arranged_files())
    assert [name for name in arranging if name.endswith("-tiles")]
    assert said(folder) == first
    assert len(arranging) == len(arranged_files())
    for path in arranged_files().values():
        assert all(tensor.begin % 64 == 0 for tensor in read_header(path).values())
    name, path = next(iter(arranged_files().items()))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert said(folder) == first
    assert arranging[-1] == name
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage", [(b"F32", b"F33"), (b"shape", b"shade"), (b"[3,", b"[7,"), (b"[3,", b"[3;"), (b"[0,", b"[9,"), (b"", b"")]
)
def test_damaged_files_are_made_again(damage: tuple[bytes, bytes], tmp_path: Path) -> None:
    made = {"whole": torch.arange(15, dtype=torch.int8).view(3, 5), "scale": torch.rand(3)}
    Arranged(tmp_path)("layer", layout_of(made), lambda: made)
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(*damage) if damage[0] else whole[:-1])
    for _ in range(2):
        tensors = Arranged(tmp_path)("layer", layout_of(made), lambda: made)
        assert tensors.keys() == made.keys()
        assert all(torch.equal(tensors[name], made[name]) for name in made)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())
        assert path.read_bytes() == whole


def test_weights_for_many_tokens_stay_in_memory_no_longer_than_they_are_used(tmp_path: Path) -> None:
    def make() -> dict[str, torch.Tensor]:
        return {"whole": torch.randint(-127, 128, (256, 512), dtype=torch.int8), "scale": torch.rand(512)}

    torch.manual_seed(0)
    tensors = Arranged(tmp_path)("layer", layout_of(make()), make)
    (path,) = tmp_path.rglob("*.safetensors")
    products, x = Joined(Products(**tensors), Products(**tensors), tensors.let_go), torch.randn(64, 256)
    with torch.inference_mode():
        few = products(x[:16])
        assert in_memory(path) > 128
        many = products(x)
        assert in_memory(path) == 0
        assert torch.equal(products(x), many)
        assert torch.equal(products(x[:16]), few)
        products(x[:, None])  # a step of 64 rows
        assert in_memory(path) > 128


def in_memory(path: Path) -> int:
    """How many KiB of a file this process has."""
    _, _, after = Path("/proc/self/smaps").read_text().partition(str(path))
    return int(after.partition("Rss:")[2].split()[0])


def test_weights_of_a_checkpoint_that_was_quantised_by_others(
    checkpoint: Callable[[str], Path], arranging: list[str], tmp_path: Path
) -> None:
    from llava_cli.engine.cpu.patch import as_transformers

    said(checkpoint("llava-llama"))
    (copy,) = quantised_cache().iterdir()
    shutil.copytree(checkpoint("llava-llama"), tmp_path / "theirs", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(copy, tmp_path / "theirs", ignore=shutil.ignore_patterns("arranged-*"), dirs_exist_ok=True)
    arranging.clear()
    assert said(tmp_path / "theirs") == said(tmp_path / "theirs") == said(checkpoint("llava-llama"))
    assert len(arranging) == len(set(arranging))
    assert len(arranged_files()) == len(arranging)
    engine = load(str(tmp_path / "theirs"), precision="4bit", device="cpu")
    with as_transformers(engine.network):  # its own weights are as they were
        assert engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=3)).answer_tokens == 3


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
    assert run("models", "prune").stderr == "there are no quantised copies\n"
    load(str(checkpoint("llava-llama")), precision="4bit", device="cpu")
    load("builtin", precision="4bit", device="cpu")
    (quantised_cache() / ".begun-1").mkdir()
    names = kept()
    assert len(names) == 3
    pruned = run("models", "prune")
    assert pruned.exit_code == 0
    assert [line.split()[0] for line in pruned.stdout.splitlines()] == names
    assert kept() == []
    assert load("builtin", precision="4bit", device="cpu")
