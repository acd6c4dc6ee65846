"""Which instructions a CPU has."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tables import for_each

from llava_cli.hardware import cpu


@for_each(
    "text, expected",
    [
        (
            "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n",
            {"fpu", "avx2", "avx512_bf16"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("processor\t: 0\n", set()),
    ],
    ids=["x86", "Arm", "neither"],
)
def test_features_are_read_where_linux_shows_them(
    text: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu, "_cpuinfo", cpu._cpuinfo.__wrapped__)
    assert cpu.cpu_features.__wrapped__() == expected
