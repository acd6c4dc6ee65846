"""What `llava models` and `llava doctor` expect of a model here: measured once, kept, and guessed from."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers.command import Run
from helpers.tables import for_each

from llava_cli import speed
from llava_cli.catalog import sizes_of_alias
from llava_cli.cli.models import list_models
from llava_cli.hardware import cpu
from llava_cli.hardware.device import Plan
from llava_cli.models.aliases import ALIASES
from llava_cli.speed import Speed

AVX2, BF16 = frozenset({"avx2"}), frozenset({"avx2", "avx512_bf16"})
SPEEDS = {"bf16": Speed(200e9, 10e9), "fp32": Speed(50e9, 5e9), "8bit": Speed(200e9, 18e9), "4bit": Speed(200e9, 30e9)}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Measuring takes no time here; how often it was done."""
    calls: list[int] = []
    monkeypatch.setattr(speed, "measure", lambda: calls.append(1) or SPEEDS)
    return calls


def test_it_measures_what_auto_may_take() -> None:
    found = speed.measure()
    native = "bf16" if cpu.has_bf16() else "fp32"
    assert list(found) == [native, "8bit", "4bit"]
    assert all(math.isfinite(rate) and rate > 1e6 for one in found.values() for rate in asdict(one).values())


def test_without_kernels_libraries_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_FAST", "0")
    assert all(rate > 1e6 for one in speed.measure().values() for rate in asdict(one).values())


def test_a_measurement_is_kept_until_what_it_depends_on_changes(
    measured: list[int], home: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (100.0, 0.0, 0.0))
    assert speed.speeds() == SPEEDS and not (home / "cache").exists(), "other work slowed it down"
    measured.clear()
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert speed.speeds() == speed.speeds() == SPEEDS
    assert (len(measured), (home / "cache/speed.json").stat().st_mode & 0o777) == (1, 0o600)
    changes = [
        lambda: monkeypatch.setattr(cpu, "cpu_model", lambda: "another"),
        lambda: monkeypatch.setenv("OMP_NUM_THREADS", "7"),
        lambda: monkeypatch.setattr(speed, "has_cpu_wing", lambda plan, before=speed.has_cpu_wing: not before(plan)),
        lambda: monkeypatch.setattr(speed, "version", lambda package: "another"),
        lambda: (home / "cache/speed.json").write_text("{"),
        lambda: (home / "cache/speed.json").write_text('{"key": [], "speeds": 1}'),
        lambda: (home / "cache/speed.json").chmod(0o666),
    ]
    for number, change in enumerate(changes, 2):
        change()
        assert speed.speeds() == speed.speeds() == SPEEDS
        assert len(measured) == number
    assert "GOP/s" in run("doctor").stdout
    assert len(measured) == number, "doctor shows what is kept"


def test_asking_does_not_measure(measured: list[int], run: Run, drawing: Path) -> None:
    assert run("ask", drawing, "what is this?", "-q").exit_code == 0
    assert not measured


@for_each(
    "name, features, precision, first_token, tokens_per_second",
    [
        # 6.5e9 weights x 616 tokens / 200e9/s, and 0.3e9 x 577 patches / 200e9/s; 6.6e9 weights / 10e9/s and the cache
        ("llava-1.5-7b", BF16, "bf16", 21, 1.47),
        ("llava-1.5-7b", BF16, "4bit", 21, 4.0),
        ("llava-1.5-7b", AVX2, "fp32", 84, 0.73),
        ("llava-1.5-7b", AVX2, "8bit", 21, 2.5),
        ("smolvlm-256m", BF16, "bf16", 6.1, 70),  # 13 crops of 1024 patches
    ],
)
def test_the_wait_follows_from_sizes_and_speed(
    name: str,
    features: frozenset[str],
    precision: str,
    first_token: float,
    tokens_per_second: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By hand, without what a pass does besides; that is a fifth at most, and a constant."""
    monkeypatch.setattr(cpu, "cpu_features", lambda: features)
    sizes = sizes_of_alias(name)
    seconds, rate = speed.wait(sizes, Plan("cpu", precision, "sdpa", ""), SPEEDS)
    assert seconds is not None and rate is not None
    assert first_token <= seconds <= 1.4 * first_token
    assert tokens_per_second / 1.4 <= rate <= tokens_per_second


def test_no_wait_is_guessed_for_a_gpu_or_an_unknown_picture() -> None:
    sizes = sizes_of_alias("llava-1.5-7b")
    assert speed.wait(sizes, Plan("cuda", "fp16", "sdpa", ""), SPEEDS) == (None, None)
    assert speed.wait(replace(sizes, picture=None), Plan("cpu", "fp32", "sdpa", ""), SPEEDS) == (None, None)


def test_the_list_as_json(measured: list[int], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_features", lambda: AVX2)
    monkeypatch.setattr("llava_cli.catalog.free_memory", lambda device: 13 * 10**9)
    monkeypatch.setattr("llava_cli.catalog.likely_device", lambda: "cpu")
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    found = {row["model"]: row for row in json.loads(run("models", "--json").stdout)}
    seven = found["llava-1.5-7b"]
    assert (seven["auto"], seven["on_disk"], seven["default"]) == ("8bit", False, False)
    assert (
        8e9 < seven["memory"] < 13e9 and 20 < seven["first_token_seconds"] < 40 and 1 < seven["tokens_per_second"] < 3
    )
    assert "bf16" not in {row["auto"] for row in found.values()}, "it is emulated on this CPU"
    large = found["llava-next-110b"]
    assert (large["auto"], large["first_token_seconds"]) == (None, None) and large["memory"] > 60e9
    shown = json.loads(run("models", "show", "llava-1.5-7b", "--json").stdout)
    assert (shown["auto here"], shown["tokens/s"]) == ("8bit", f"~{speed.rate(seven['tokens_per_second'])}")
    assert len(measured) == 1


class Terminal(io.StringIO):
    """What is drawn on a terminal."""

    def isatty(self) -> bool:
        return True


@for_each("columns", [80, 120])
def test_the_list_fits_a_terminal(columns: int, measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each model, without an empty cell; notes only where they have room."""
    monkeypatch.setattr("llava_cli.catalog.likely_device", lambda: "cpu")
    header, *lines = drawn(columns, monkeypatch)
    assert "first token" in header
    assert max(map(len, lines)) <= columns
    assert any("the classic" in line for line in lines) == (columns == 120)
    assert all(name in line for name, line in zip(["builtin", *ALIASES], lines, strict=True))
    assert all(len(line.lstrip("* ").split(maxsplit=7)) > 6 for line in lines)


def drawn(columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of `llava models` on a terminal so wide."""
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    list_models()
    return re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()


def test_a_gpu_gets_no_wait_of_a_cpu(
    measured: list[int], run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But a dash and a line: nothing has been measured there."""
    gpu = {"is_available": True, "is_bf16_supported": True, "get_device_capability": (8, 0), "device_count": 1}
    for name, value in gpu.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *args, value=value, **options: value)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device=0: (12 * 10**9, 24 * 10**9))
    monkeypatch.setattr("llava_cli.catalog.likely_device", lambda: "auto")
    line = next(line for line in drawn(80, monkeypatch) if "llava-1.5-7b" in line)
    assert line.split()[-5:-3] == ["8bit", line.split()[-4]] and line.split()[-2:] == ["-", "-"]
    told = capsys.readouterr().err.splitlines()
    assert "not even 4 bits fit in the 12.0 GB that are free" in told[-2]
    assert told[-1] == "first token, tokens/s: not guessed for cuda, where nothing has been measured"
    rows = json.loads(run("models", "--json").stdout)
    assert {row["first_token_seconds"] for row in rows} == {row["tokens_per_second"] for row in rows} == {None}
    assert not measured


def test_without_bitsandbytes_the_list_says_what_it_would_add(
    measured: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llava_cli.catalog.likely_device", lambda: "cpu")
    monkeypatch.setattr("llava_cli.catalog.free_memory", lambda device: 8 * 10**9)
    for module in ("catalog", "models.precision"):
        monkeypatch.setattr(f"llava_cli.{module}.can_quantize", lambda: False)
    assert any(" no " in line for line in drawn(80, monkeypatch))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("does not fit in the 8.0 GB that are free, 8 and 4 bits take less: pip install bitsandbytes")
