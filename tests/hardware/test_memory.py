"""A run keeps to the memory that it needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

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
