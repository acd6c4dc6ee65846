"""The commands against servers that others wrote: llama.cpp's and transformers', with the built-in model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import gguf_model
from helpers.command import Run

import llava_cli

BUILTIN = Path(llava_cli.__file__).parent / "builtin"
EXAMPLES = Path(__file__).parents[2] / "examples"
KEY = "open-sesame"
QUESTION, RIGHT = "what is this?", "a red circle, an orange star and a blue rectangle on a white background"


@contextmanager
def process(*command: str | Path, **variables: str) -> Iterator[str]:
    """The address that a process prints once it listens."""
    begun = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **variables},
    )
    assert begun.stdout
    said: list[str] = []
    try:
        for line in begun.stdout:
            said.append(line)
            if found := re.search(r"(?:ready|running on) (http://[\d.:]+)", line):
                yield found[1]
                return
        raise AssertionError("".join(said))
    finally:
        begun.kill()
        begun.wait()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """llama.cpp's server, which wants a key."""
    files = gguf_model.write(BUILTIN, tmp_path_factory.mktemp("gguf"))
    script = Path(gguf_model.__file__).with_name("llama_server.py")
    with process(sys.executable, script, *files, KEY) as url:
        yield url


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve`."""
    home = tmp_path_factory.mktemp("hub")
    script = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    words = ("serve", BUILTIN, "--host", "127.0.0.1", "--port", "0", "--dtype", "float32", "--device", "cpu")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    with process(sys.executable, "-c", script, *words, **offline) as url:
        yield url


def test_llama_cpp_answers(llama: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_API_KEY", KEY)
    asked = run("ask", "--server", llama, "--stats", EXAMPLES / "shapes.png", QUESTION)
    assert asked.stdout == f"{RIGHT}\n"
    assert asked.stderr.startswith(f"llava-gguf · {llama}/v1 · first token ")
    assert " s of 75 · " in asked.stderr
    cut = json.loads(
        run("ask", "--server", llama, "--json", "--max-tokens", "3", EXAMPLES / "shapes.png", QUESTION).stdout
    )
    assert (cut["answer"], cut["finish_reason"], cut["answer_tokens"]) == ("a red circle", "length", 3)


def test_llama_cpp_refuses(llama: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = run("ask", "--server", llama, EXAMPLES / "shapes.png", QUESTION)
    assert wrong.exit_code == 69
    assert wrong.stderr.startswith(f"llava: {llama}/v1: Invalid API Key\n  LLAVA_API_KEY")
    monkeypatch.setenv("LLAVA_API_KEY", KEY)
    long = run("ask", "--server", llama, EXAMPLES / "shapes.png", "what? " * 2000)
    assert long.exit_code == 65
    assert long.stderr.startswith("llava: prompt: request (")


def test_llama_cpp_answers_in_a_form(llama: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its grammars choose, with probabilities near those of the model here; its schemas are kept."""
    monkeypatch.setenv("LLAVA_API_KEY", KEY)
    asked = ("ask", EXAMPLES / "shapes.png", "what color is the star?", "--json")
    choices = ("--choices", "red,orange,blue")
    there = json.loads(run(*asked, *choices, "--confidence", "--server", llama).stdout)
    here = json.loads(run(*asked, *choices, "-p", "fp32").stdout)
    assert there["answer"] == here["answer"] == "orange"
    assert list(there["probabilities"]) == list(here["probabilities"])
    assert there["probabilities"] == pytest.approx(here["probabilities"], abs=1e-3)
    assert 0.99 < there["confidence"]["lowest"] <= there["confidence"]["mean"]
    checked = run("check", "--server", llama, EXAMPLES / "shapes.png", "is there a star?")
    assert re.fullmatch(r"(yes|no) \(0\.[0-9]{4}\)\n", checked.stdout), checked.stderr
    data = json.loads(run(*asked, "--schema", "color red|orange", "--server", llama).stdout)["data"]
    assert data in ({"color": "red"}, {"color": "orange"})  # the form is kept; the model was not made for JSON
    refused = run(*asked, "--regex", "[0-9]", "--server", llama)
    assert (refused.exit_code, refused.stdout) == (2, "")


def test_transformers_has_no_forms(transformers: str, run: Run) -> None:
    """It has neither forms nor log-probabilities; what it says by itself may be one of the choices."""
    asked = ("ask", "--server", transformers, "-m", BUILTIN, EXAMPLES / "shapes.png", "what color is the star?")
    assert run(*asked, "--choices", "red,orange,blue").stdout == "orange\n"
    for words, code, message in (
        (("--choices", "red,blue"), 65, "its answer is none of the choices: orange"),
        (("--schema", "color"), 65, "its answer is not JSON, though it was asked for: orange"),
        (("--confidence", "--json"), 69, "does not tell how probable its tokens are"),
    ):
        refused = run(*asked, *words)
        assert (refused.exit_code, refused.stdout) == (code, ""), refused.stderr
        assert message in refused.stderr


@pytest.mark.parametrize("name", ["llama", "transformers"])
def test_chat(name: str, request: pytest.FixtureRequest, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_API_KEY", KEY)
    url: str = request.getfixturevalue(name)
    lines = f"{QUESTION}\nwhat color is the star?\n/image {EXAMPLES / 'triangle.png'}\nwhat color is the triangle?\n"
    words = ("-m", str(BUILTIN)) if name == "transformers" else ()
    talked = run("chat", "--server", url, *words, EXAMPLES / "shapes.png", input=lines)
    assert talked.stdout == f"{RIGHT}\norange\nyellow\n", talked.stderr


@pytest.mark.parametrize("name", ["llama", "transformers"])
def test_batch(
    name: str, request: pytest.FixtureRequest, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Answers are those of the model here, a row each; what is no picture is one too."""
    monkeypatch.setenv("LLAVA_API_KEY", KEY)
    url: str = request.getfixturevalue(name)
    (tmp_path / "photos").mkdir()
    for picture in ("shapes", "triangle"):
        (tmp_path / "photos" / f"{picture}.png").write_bytes((EXAMPLES / f"{picture}.png").read_bytes())
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    questions = ("--question", QUESTION, "--question", "what color is the background?")
    words = ("-m", str(BUILTIN)) if name == "transformers" else ()
    there = run("batch", "--server", url, *words, tmp_path / "photos", *questions, "-o", tmp_path / "there.jsonl")
    assert there.exit_code == 1, there.stderr
    here = run("batch", tmp_path / "photos", *questions, "-p", "fp32")
    same = ("image", "question", "answer", "status", "error", "sha256")
    texts = here.stdout, (tmp_path / "there.jsonl").read_text("utf-8")
    rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [[row[key] for key in same] for row in rows[0]] == [[row[key] for key in same] for row in rows[1]]
    assert len(rows[0]) == 6
