"""Packed weights: written once, mapped afterwards, packed again where a file is not what it should be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.engines import CONVERSATIONS
from helpers.kernels import needs_kernels
from helpers.tables import for_each

from llava_cli import Sampling, load, paths
from llava_cli.engine.cpu import packed_weights
from llava_cli.engine.cpu.jit import Layout
from llava_cli.engine.cpu.linear_choice import LinearBySize
from llava_cli.engine.cpu.onednn_linear import OneDnnInt8Linear
from llava_cli.engine.cpu.packed_weights import PackedWeightStore
from llava_cli.safetensors_header import read_header

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], object]


def packed_files() -> dict[str, Path]:
    return {path.stem: path for path in paths.quantized_cache().rglob("arranged-1/*.safetensors")}


def answer(folder: Path) -> str:
    engine = load(str(folder), precision="4bit", device="cpu")
    return engine.answer(CONVERSATIONS["two"], Sampling(max_tokens=12)).text


def small_tensors() -> Tensors:
    return {"q_weight": torch.arange(15, dtype=torch.int8).view(3, 5), "scale": torch.linspace(0, 1, 3)}


def layout_of(tensors: Tensors) -> Layout:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def stored(folder: Path, tensors: Tensors) -> Tensors:
    """From the store, where `tensors` are what has to be packed."""
    return PackedWeightStore(folder).load_or_pack("layer", layout_of(tensors), lambda: tensors)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each file that is written."""
    names: list[str] = []
    write = packed_weights._write

    def record(tensors: Tensors, path: Path) -> None:
        names.append(path.stem)
        write(tensors, path)

    monkeypatch.setattr(packed_weights, "_write", record)
    return names


@needs_kernels
def test_weights_are_packed_once(checkpoint: Callable[[str], Path], written: list[str]) -> None:
    folder = checkpoint("llava-llama")
    first = answer(folder)
    assert sorted(written) == sorted(packed_files())
    assert [name for name in written if name.endswith("-tiles")]
    assert answer(folder) == first
    assert len(written) == len(packed_files())
    for path in packed_files().values():
        assert all(tensor.begin % 64 == 0 for tensor in read_header(path).values())
    name, path = next(iter(packed_files().items()))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert answer(folder) == first
    assert written[-1] == name
    assert path.read_bytes() == whole


def test_files_keep_the_names_that_format_1_has(tmp_path: Path) -> None:
    """So that files of earlier versions are not packed again."""
    tensors = {name: torch.zeros(16) for name in ("weights", "scales", "codebook", "row_scale", "q_weight", "scale")}
    stored(tmp_path, tensors)
    (path,) = tmp_path.rglob("*.safetensors")
    assert path == tmp_path / "arranged-1" / "layer.safetensors"
    assert list(read_header(path)) == ["weights", "scales", "codes", "worth", "whole", "scale"]


@for_each(
    "damage", [(b"F32", b"F33"), (b"shape", b"shade"), (b"[3,", b"[7,"), (b"[3,", b"[3;"), (b"[0,", b"[9,"), (b"", b"")]
)
def test_damaged_files_are_packed_again(damage: tuple[bytes, bytes], tmp_path: Path) -> None:
    tensors = small_tensors()
    stored(tmp_path, tensors)
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(*damage) if damage[0] else whole[:-1])
    for _ in range(2):
        loaded = stored(tmp_path, tensors)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values())
        assert path.read_bytes() == whole


OTHER_TENSORS: dict[str, Edit] = {
    "shorter": lambda tensors: tensors.update({name: tensor[:-1].clone() for name, tensor in tensors.items()}),
    "empty": lambda tensors: tensors.update({name: tensor[:0].clone() for name, tensor in tensors.items()}),
    "another dtype": lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}),
    "one too few": lambda tensors: tensors.popitem(),
    "one too many": lambda tensors: tensors.update(more=torch.zeros(3)),
    "flat": lambda tensors: tensors.update({name: tensor.flatten() for name, tensor in tensors.items()}),
}


@for_each("edit", OTHER_TENSORS)
def test_files_with_other_tensors_are_packed_again(edit: str, tmp_path: Path) -> None:
    tensors = small_tensors()
    stored(tmp_path, tensors)
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    other = small_tensors()
    OTHER_TENSORS[edit](other)
    packed_weights._write(other, path)
    loaded = stored(tmp_path, tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert path.read_bytes() == whole


def test_files_that_others_may_have_written_are_packed_again(tmp_path: Path) -> None:
    tensors = small_tensors()

    def check() -> None:
        loaded = stored(tmp_path, tensors)
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)

    check()
    (path,) = tmp_path.rglob("*.safetensors")
    assert path.stat().st_mode & 0o777 == 0o600
    planted = tmp_path / "planted"
    packed_weights._write({**tensors, "scale": torch.zeros(3)}, planted)
    for plant in (
        lambda: path.write_bytes(planted.read_bytes()) and path.chmod(0o666),
        lambda: path.symlink_to(planted),
    ):
        path.unlink()
        plant()
        check()
        assert not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(planted.read_bytes())
    path.parent.chmod(0o777)
    check()
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_weights_for_many_tokens_leave_memory_after_use(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"q_weight": torch.randint(-127, 128, (256, 512), dtype=torch.int8), "scale": torch.rand(512)}
    mapped = PackedWeightStore(tmp_path).load_or_pack("layer", layout_of(tensors), lambda: tensors)
    (path,) = tmp_path.rglob("*.safetensors")
    linear = LinearBySize(OneDnnInt8Linear(**mapped), OneDnnInt8Linear(**mapped), mapped.release_pages)
    x = torch.randn(64, 256)
    with torch.inference_mode():
        few = linear(x[:16])
        assert resident_kib(path) > 128
        many = linear(x)
        assert resident_kib(path) == 0
        assert torch.equal(linear(x), many)
        assert torch.equal(linear(x[:16]), few)
        linear(x[:, None])  # a decode step of 64 rows
        assert resident_kib(path) > 128


def resident_kib(path: Path) -> int:
    """How much of a file this process has in memory."""
    _, _, after = Path("/proc/self/smaps").read_text().partition(str(path))
    return int(after.partition("Rss:")[2].split()[0])


@needs_kernels
def test_weights_that_others_quantized_are_packed_once(
    checkpoint: Callable[[str], Path], written: list[str], tmp_path: Path
) -> None:
    expected, folder = answer(checkpoint("llava-llama")), tmp_path / "stored"
    (copy,) = paths.quantized_cache().iterdir()
    shutil.copytree(checkpoint("llava-llama"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(copy, folder, ignore=shutil.ignore_patterns("arranged-*"), dirs_exist_ok=True)
    written.clear()
    assert answer(folder) == answer(folder) == expected
    assert len(written) == len(set(written))
    assert len(packed_files()) == len(written)
    engine = load(str(folder), precision="4bit", device="cpu")
    with engine.patch.undone():  # its own weights have not changed
        assert engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=3)).answer_tokens == 3
