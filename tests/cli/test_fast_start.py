"""A run of the command leaves out what it does not need of the libraries that it imports."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_cli import fast_start, load

ROOT = Path(__file__).parents[2]

RUN = """
import sys
from llava_cli.start import main

sys.argv = ["llava", "ask", "examples/triangle.png", "what shape is it?", "-q", "-p", "PRECISION"]
try:
    main()
except SystemExit:
    heavy = ("torch._dynamo.convert_frame", "torch.distributed.tensor", "scipy.optimize")
    print([name for name in heavy if sys.modules.get(name)])
AFTER
"""


def run(precision: str = "fp32", after: str = "", **env: str) -> list[str]:
    """The lines that an answer prints, which heavy modules it has imported, and what `after` prints after it."""
    code = RUN.replace("PRECISION", precision).replace("AFTER", after)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_quantized_model_needs_no_compiler_and_nothing_of_training() -> None:
    load("builtin", precision="8bit", device="cpu")  # makes the copy that every later start reads
    assert run("8bit") == ["triangle", "[]"]


@pytest.mark.parametrize(
    "after",
    [
        "import torch; print(torch._dynamo.eval_frame.__name__, torch._dynamo.disable.__module__)",
        "import torch._dynamo.eval_frame as e; print(e.__name__, e.torch._dynamo.disable.__module__)",
    ],
)
def test_an_answer_needs_no_compiler_which_is_there_when_it_is_asked_for(after: str) -> None:
    assert run(after=after) == ["triangle", "[]", "torch._dynamo.eval_frame torch._dynamo.decorators"]


def test_everything_is_imported_where_fast_paths_are_off() -> None:
    assert "torch._dynamo.convert_frame" in run(LLAVA_FAST="0")[1]


@pytest.mark.parametrize("part", ["light", "missing"])
def test_a_package_is_put_off_if_its_light_part_is_there(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another version it may be elsewhere, and then all is imported."""
    (folder := tmp_path / "some_package").mkdir()
    (folder / "__init__.py").write_text("from some_package import heavy\nmark = 'its own'\n")
    (folder / "light.py").write_text("")
    (folder / "heavy.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("some_package", "some_package.light", "some_package.heavy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    fast_start._defer("some_package", part, mark="ours")
    package = importlib.import_module("some_package")
    assert package.mark == ("ours" if part == "light" else "its own")
    assert ("some_package.heavy" in sys.modules) is (part == "missing")
    assert package.heavy
    assert package.mark == "its own"
