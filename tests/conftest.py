"""Fixtures of all tests: a home for each, the command as a user runs it, tiny checkpoints and servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import fork_server
from helpers.command import Run, Shell
from helpers.homes import NOWHERE, home
from helpers.servers import Serve, Server, begin
from helpers.terminal import terminal
from PIL import Image, ImageDraw
from typer.testing import CliRunner, Result

from llava_cli.cli import app, register
from llava_cli.images import sandbox

if TYPE_CHECKING:
    from llava_cli.engine.local import LocalEngine

__all__ = ["home", "terminal"]
register()
# Two workers whose torch takes two threads each spend most of their time waiting for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_ENDPOINT"] = NOWHERE
# Whoever runs the tests in the background may have had SIGINT ignored, and every process started here would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
fork_server.install()


@pytest.fixture(autouse=True)
def cold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts the processes of tests with the mark `cold` from nothing."""
    if request.node.get_closest_marker("cold"):
        monkeypatch.setattr(fork_server.Popen, "cold", True)


@pytest.fixture
def run() -> Run:
    """Runs `llava ARGS` in this process: `.exit_code`, `.stdout`, `.stderr`."""

    def invoke(*args: str | Path, input: bytes | str | None = None) -> Result:  # noqa: A002  CliRunner's name for it
        return CliRunner().invoke(app, [str(a) for a in args], input=input, catch_exceptions=False)

    return invoke


@pytest.fixture
def shell() -> Shell:
    """Runs `llava ARGS` as a process of its own: `.returncode`, `.stdout`, `.stderr`."""

    def invoke(*args: str | Path, **options: object) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "llava_cli", *map(str, args)]
        return subprocess.run(command, capture_output=True, timeout=600, **options)  # type: ignore[call-overload, no-any-return]

    return invoke


@pytest.fixture
def drawing(tmp_path: Path) -> Path:
    """A red circle on the left of a blue triangle, on white, 300 x 200."""
    image = Image.new("RGB", (300, 200), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((30, 60, 110, 140), fill="red")
    pen.polygon([(200, 60), (260, 150), (140, 150)], fill="blue")
    image.save(path := tmp_path / "drawing.png")
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint of a family, made once: `checkpoint("llava-next-vicuna")` -> its folder."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        from helpers import families

        if family not in made:
            made[family] = families.save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(scope="session")
def engines(checkpoint: Callable[[str], Path]) -> Callable[[str], LocalEngine]:
    """The engine over a family's tiny checkpoint in fp32, loaded once: `engines("llava-llama")`."""
    from llava_cli import load

    loaded: dict[str, LocalEngine] = {}

    def get(family: str) -> LocalEngine:
        if family not in loaded:
            loaded[family] = load(str(checkpoint(family)), precision="fp32", device="cpu")
        return loaded[family]

    return get


@pytest.fixture
def serve(home: Path) -> Iterator[Serve]:
    """Starts servers that this test's commands find: `serve("--idle", "1s")`."""
    begun: list[Server] = []

    def get(*words: str | Path, **variables: str) -> Server:
        begun.append(begin(home, *words, **variables))
        return begun[-1]

    yield get
    for one in begun:
        one.process.kill()
        one.process.wait()


# Every process of ours runs this first, but for those that decode, which run nothing of anybody's.
HOOK = """
from llava_cli.images import sandbox

sandbox.JOB = "helpers.hostile"
"""


@pytest.fixture
def hooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pictures begin with SEGV, SPIN, HOLD or EATS, their decoder does what it should not: see `hostile.py`."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "hook"), str(Path(__file__).parent)]))
    monkeypatch.setattr(sandbox, "JOB", "helpers.hostile")
    return tmp_path / "hook"
