"""What stands in memory after a load: no weight twice, and none in more bits than its file has."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.engines import CONVERSATIONS
from helpers.tables import for_each
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from llava_cli import Sampling, load, paths
from llava_cli.hardware import allocator, device
from llava_cli.models import quantized_cache, weights
from llava_cli.settings import Precision

Ranges = list[tuple[int, int]]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says which memory is a mapped file's")


@pytest.fixture(scope="module")
def in_16_bits(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bf16."""
    source, folder = checkpoint("llava-llama"), tmp_path_factory.mktemp("bf16") / "model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def compute_in(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this a CPU whose quantized models compute in these bits."""
    monkeypatch.setattr(device, "native_precision", lambda name: (precision, "in this test"))


def mapped_files() -> Ranges:
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if len(line) > 5 and line[5].endswith(".safetensors")]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


def storages() -> Iterator[tuple[int, int]]:
    """Address and bytes of the memory behind each tensor that lives."""
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            yield thing.untyped_storage().data_ptr(), thing.untyped_storage().nbytes()


def bytes_outside_of_files(before: set[int]) -> int:
    """Of tensors that are in memory of their own, and were not there before."""
    files = mapped_files()
    own = {
        address: size
        for address, size in storages()
        if address not in before and not any(begin <= address < end for begin, end in files)
    }
    return sum(own.values())


@for_each(
    "compute, precision",
    [("fp32", "4bit"), ("bf16", "8bit")],
    own=(compute_in,),
)
def test_weights_stand_in_mapped_files_and_nowhere_else(
    compute: str, precision: Precision, in_16_bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in(compute, monkeypatch)
    for _ in range(2):  # the first quantizes
        before = {address for address, _ in storages()}
        engine = load(str(in_16_bits), precision=precision, device="cpu")
        sizes = {weight.untyped_storage().data_ptr(): weight.nbytes for weight in engine.network.parameters()}
        assert bytes_outside_of_files(before) < 0.05 * sum(sizes.values())
    assert engine.answer(CONVERSATIONS["one"], Sampling(max_tokens=3)).answer_tokens == 3


def test_where_no_copy_can_be_kept_weights_are_read_once(in_16_bits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = [], AutoModelForImageTextToText.from_pretrained
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(
        AutoModelForImageTextToText,
        "from_pretrained",
        lambda folder, **options: reads.append(folder) or read(folder, **options),
    )
    compute_in("fp32", monkeypatch)
    assert load(str(in_16_bits), precision="4bit", device="cpu").network.dtype == torch.float32
    assert reads == [in_16_bits]


@for_each("precision", ["4bit", "8bit"], own=(compute_in,))
def test_reading_in_16_bits_makes_the_copy_that_reading_in_32_makes(
    precision: Precision, in_16_bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy() -> dict[str, torch.Tensor]:
        list(quantized_cache.prune())
        load(str(in_16_bits), precision=precision, device="cpu")
        (folder,) = paths.quantized_cache().iterdir()
        return {name: t.clone() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}

    compute_in("fp32", monkeypatch)
    ours = copy()
    monkeypatch.setattr(weights, "_mappable_dtype", lambda plan, files: None)
    expected = copy()
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in expected.items()}
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_copies_for_16_and_for_32_bits_are_two(in_16_bits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for compute in ("bf16", "fp32", "bf16"):
        compute_in(compute, monkeypatch)
        load(str(in_16_bits), precision="4bit", device="cpu")
    assert len(list(quantized_cache.copies())) == 2


@for_each("precision, leave", [("fp32", True), ("bf16", False)])
def test_files_leave_memory_where_their_weights_get_other_bits(
    precision: Precision, leave: bool, in_16_bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 1B in 32 bits took 10 GB with its file of 3."""
    read: list[Path] = []
    monkeypatch.setattr(allocator, "read_once", lambda files: nullcontext(read.extend(files)))
    load(str(in_16_bits), precision=precision, device="cpu")
    assert read == [in_16_bits / "model.safetensors"] * leave
