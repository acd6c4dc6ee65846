"""A run keeps to the memory that it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.tables import for_each

from llava_cli import start
from llava_cli.errors import is_out_of_memory
from llava_cli.hardware import memory
from llava_cli.hardware.allocator import read_once

SIZE = 4 << 20


def resident(path: Path) -> int:
    """How many bytes of a mapped file this process has in memory."""
    size, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            size += int(line.split()[1]) << 10
    return size


@pytest.mark.skipif(sys.platform != "linux", reason="other systems say and do nothing about single files")
def test_a_file_that_is_read_once_does_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_cli.hardware.allocator._PAGE_OUT_SECONDS", 3600)  # in the end alone
    path, link = tmp_path / "the weights.safetensors", tmp_path / "link"
    with path.open("wb") as file:
        file.write(b"\1" * SIZE)
        file.flush()
        os.fsync(file.fileno())  # what is not on the disk yet stays in memory
    link.symlink_to(path)  # as the Hub's cache has them
    numbers = torch.from_file(str(path), shared=False, size=SIZE, dtype=torch.uint8)
    with read_once([link]):
        numbers[0] = 5
        assert int(numbers.sum()) == SIZE + 4
        assert resident(path) >= SIZE // 2
    assert resident(path) <= SIZE // 8
    assert int(numbers.sum()) == SIZE + 4


def group(folder: Path, files: tuple[str, str, tuple[str, ...]], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((files[0], limit), (files[1], str(used)), ("memory.stat", f"{files[2][0]} {cached}\n")):
        (folder / name).write_text(text)


@for_each(
    "version, limits, expected",
    [
        ("", {"": "max", "user": "5000"}, 5000 - 300 + 100),
        ("", {"": "900", "user": "5000"}, 900 - 300 + 100),
        ("", {"": "max", "user": "max", "user/own": "200"}, 0),
        ("", {"": "max"}, None),
        ("", {}, None),
        ("memory", {"": "9000", "user/own": "2000"}, 2000 - 300 + 100),
    ],
)
def test_limits_of_all_groups_around_a_process_count(
    version: str, limits: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, limit in limits.items():
        group(tmp_path / "root" / version / path, memory._CGROUP_FILES[version], limit, 300, 100)
    (tmp_path / "own").write_text("1:cpu:/elsewhere\n4:memory:/user/own\n0::/user/own\n")
    monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path / "root")
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    available = psutil.virtual_memory().available
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": available}))
    assert memory.free_memory("cpu") == (available if expected is None else expected)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limits")
def test_a_limit_on_addresses_counts() -> None:
    command = "from llava_cli.hardware.memory import free_memory; print(free_memory('cpu'))"
    done = subprocess.run(
        ["sh", "-c", f'ulimit -v 1000000; exec "$0" -c "{command}"', sys.executable], capture_output=True, check=True
    )
    assert 0 < int(done.stdout) < 1_000_000 << 10


def test_what_torchs_allocator_holds_is_free_and_each_card_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free, reserved, allocated = {0: 10, 1: 100}, {0: 7, 1: 70}, {0: 4, 1: 40}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free[card], 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", reserved.get)
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated.get)
    assert memory.free_memory("cuda") == 13 + 130
    assert memory.free_memory("cuda", [1]) == 130


@for_each(
    "placed, main, cards",
    [
        ({}, "cuda:1", [1]),
        ({"": "cuda"}, "cuda:0", [0]),
        ({"model.layers.0": 0, "lm_head": 2, "rest": "cpu", "more": "disk"}, "cuda:0", [0, 2]),
        ({}, "cpu", None),
    ],
)
def test_a_models_cards(placed: dict[str, object], main: str, cards: list[int] | None) -> None:
    model = SimpleNamespace(hf_device_map=placed, device=torch.device(main))
    assert memory.cards_of(model) == cards


@for_each(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cublasLt ran into an error!",
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_all_words_for_memory_that_has_run_out(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))


@for_each(
    "driver, variables, expected",
    [
        ("nvidiactl", {}, "expandable_segments:True"),
        ("none", {}, None),
        ("nvidiactl", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ("nvidiactl", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_blocks_of_an_nvidia_gpus_memory_may_grow(
    driver: str, variables: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(start, "NVIDIA_DRIVER", str(tmp_path / driver))
    monkeypatch.setattr(os, "environ", dict(variables))
    start.let_segments_grow()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
