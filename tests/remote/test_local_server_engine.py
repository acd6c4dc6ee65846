"""Commands that find the model loaded already, by the user's own server, and that lose it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.command import Run, Shell
from helpers.servers import Serve, Server, begin, end
from helpers.tables import for_each
from helpers.terminal import Open
from PIL import Image

from llava_cli.engine.remote.local_socket import server_info

QUESTION = "what color is the circle?"
FP32 = ("-p", "fp32")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One with the built-in model, for all that leaves it as it was."""
    server = begin(tmp_path_factory.mktemp("server"))
    yield server
    assert end(server) == 0


@pytest.fixture
def share(running: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Server]:
    """Once it is called, the test's commands find the server that the tests share."""

    def find() -> Server:
        monkeypatch.setenv("LLAVA_SOCKET", str(running.socket))
        return running

    return find


def begun(*words: str | Path) -> subprocess.Popen[bytes]:
    """A command of its own, whose output is read as it comes."""
    command = [sys.executable, "-m", "llava_cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, bufsize=0)


def test_ask_is_answered_by_the_server(share: Callable[[], Server], run: Run, drawing: Path) -> None:
    alone = run("ask", "--json", drawing, QUESTION, *FP32)
    server = share()
    asked = run("ask", "--stats", drawing, QUESTION, *FP32)
    assert asked.stdout == "red\n"
    assert f"builtin fp32 cpu · llava serve (pid {server.process.pid}) · first token" in asked.stderr
    one, other = json.loads(alone.stdout), json.loads(run("ask", "--json", drawing, QUESTION, *FP32).stdout)
    assert one.pop("seconds")["load"] > other.pop("seconds")["load"] == 0
    assert one == other


@for_each(
    "words",
    [
        ("--choices", "red,blue,green", "--or", "unsure", "--at-least", "1", "--confidence", "--sight"),
        ("--schema", "color red|blue"),
        ("--regex", "(red|blue) [a-z]{3}"),
        ("--grammar", 'start: "red" | "blue"'),
        ("--confidence", "--sight"),
    ],
)
def test_answers_of_a_form_are_the_same(
    words: tuple[str, ...], running: Server, monkeypatch: pytest.MonkeyPatch, run: Run, drawing: Path
) -> None:
    asked = ("ask", "--json", drawing, QUESTION, *words, *FP32)
    monkeypatch.setenv("LLAVA_SOCKET", str(drawing.with_name("none")))
    alone = json.loads(run(*asked).stdout)
    monkeypatch.setenv("LLAVA_SOCKET", str(running.socket))
    served = json.loads(run(*asked).stdout)
    assert served.pop("seconds")["load"] == 0
    del alone["seconds"]
    assert served == alone


def test_nothing_heavy_is_imported(share: Callable[[], Server], drawing: Path) -> None:
    share()
    script = (
        "import atexit, sys; from llava_cli.start import main\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'httpx'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules))))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "ask", drawing, QUESTION, *FP32], capture_output=True, text=True
    )
    assert done.stdout == "red\n[]\n", done.stderr


@for_each(
    "other",
    [
        ("-p", "bf16"),
        ("-p", "fp32", "--fit", "crop"),
        ("-p", "fp32", "--template", "native"),
        ("-p", "fp32", "--visual-tokens", "16"),
    ],
)
def test_another_model_is_loaded_here(
    other: tuple[str, ...], share: Callable[[], Server], run: Run, drawing: Path
) -> None:
    share()
    asked = run("ask", "--stats", drawing, QUESTION, *other)
    assert asked.stdout == "red\n"
    assert " · load " in asked.stderr


def test_how_a_server_answers_others_is_not_how_it_answers_us(serve: Serve, run: Run, drawing: Path) -> None:
    alone = run("ask", drawing, "what is this?", *FP32)
    serve("--system", "Answer in one word.", "--max-tokens", "1", "--temperature", "5")
    asked = run("ask", "--stats", drawing, "what is this?", *FP32)
    assert "llava serve" in asked.stderr
    assert asked.stdout == alone.stdout


def test_chat_is_answered_by_the_server(share: Callable[[], Server], run: Run, drawing: Path) -> None:
    lines = f"what is this?\n{QUESTION}\n/prompt\n"
    alone = run("chat", drawing, *FP32, input=lines)
    share()
    talked = run("chat", "--stats", drawing, *FP32, input=lines)
    assert talked.stdout == alone.stdout
    assert talked.stderr.count("llava serve (pid") == 2
    assert "first token" in talked.stderr


def test_batch_is_answered_by_the_server(share: Callable[[], Server], run: Run, drawing: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(5):
        (tmp_path / "photos" / f"{number}.png").write_bytes(drawing.read_bytes() if number != 3 else b"no picture")
    words = ("batch", tmp_path / "photos", QUESTION, "--question", "what is this?", *FP32, "-q")
    alone = run(*words)
    before = (server := share()).metric("llava_requests_total")
    assert run(*words, "--verify", "2").stdout == alone.stdout
    assert server.metric("llava_requests_total") >= before + 8
    assert f" · llava serve (pid {server.process.pid})\n" in run(*words[:-1]).stderr


def test_a_picture_that_is_not_whole(share: Callable[[], Server], run: Run, drawing: Path) -> None:
    """It is taken as far as it goes, here as there."""
    share()
    drawing.write_bytes(drawing.read_bytes()[:-40])
    assert run("ask", drawing, QUESTION, *FP32).exit_code == 65
    asked = run("ask", "--stats", "--allow-truncated", drawing, QUESTION, *FP32)
    assert asked.stdout == "red\n"
    assert "llava serve" in asked.stderr


def test_a_file_that_others_may_not_send(share: Callable[[], Server], run: Run, tmp_path: Path) -> None:
    """As large as it may be without a server."""
    share()
    Image.effect_noise((4800, 4800), 90).convert("RGB").save(picture := tmp_path / "noise.bmp")
    assert picture.stat().st_size > 64_000_000
    asked = run("ask", "--stats", picture, QUESTION, *FP32)
    assert asked.exit_code == 0
    assert "llava serve (pid" in asked.stderr
    assert "going on without it" not in asked.stderr


def test_what_the_server_refuses(share: Callable[[], Server], run: Run, drawing: Path) -> None:
    share()
    asked = run("ask", drawing, "what? " * 3000, *FP32)
    assert asked.exit_code == 65
    assert "\nllava: prompt: " in asked.stderr


def test_a_server_that_takes_no_more(serve: Serve, run: Run, drawing: Path, checkpoint: Callable[[str], Path]) -> None:
    server = serve("-m", checkpoint("llava-llama"), "--queue", "1", "--max-tokens", "1900")
    messages = [{"role": "user", "content": "what is this?"}]
    words = ("ask", "-m", checkpoint("llava-llama"), drawing, "hm?", *FP32)
    answered = run(*words, "--max-tokens", "4", "--stats")
    assert f"llava serve (pid {server.process.pid})" in answered.stderr
    with begun(*words, "--max-tokens", "1900", "-q") as process:
        server.until_running(1)  # what others ask for does not keep the user's own from it: the next one is let in
        stream = server.client().chat.completions.create(model="default", messages=messages, stream=True)  # type: ignore[call-overload]
        next(iter(stream))
        server.until_running(2)
        asked = run(*words, "--max-tokens", "4", "--stats")
        assert "llava: serve: takes no more" in asked.stderr
        assert " · load " in asked.stderr
        assert asked.stdout == answered.stdout
        process.kill()
    stream.close()
    server.until_running(0)


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_a_server_that_is_killed_in_the_midst_of_an_answer(
    command: str, serve: Serve, shell: Shell, drawing: Path, checkpoint: Callable[[str], Path]
) -> None:
    """The answer goes on from where it was."""
    words = ("-m", checkpoint("llava-llama"), "--max-tokens", "500", "-q", *FP32)
    question = b"what is this?\n"
    asked = (command, drawing, *([question.decode().strip()] if command == "ask" else []), *words)
    alone = shell(*asked, input=question)
    server = serve("-m", checkpoint("llava-llama"))
    process = begun(*asked)
    assert process.stdin
    assert process.stdout
    process.stdin.write(question)
    process.stdin.close()
    process.stdin = None
    first = process.stdout.read(1)
    server.process.send_signal(signal.SIGKILL)
    rest, errors = process.communicate(timeout=120)
    assert first + rest == alone.stdout
    assert process.returncode == 0
    assert errors.count(b"going on without it") == 1
    assert b"Traceback" not in errors


def test_what_is_said_in_the_midst_of_an_answer_has_a_line_of_its_own(
    serve: Serve, drawing: Path, checkpoint: Callable[[str], Path], terminal: Open
) -> None:
    server = serve("-m", checkpoint("llava-llama"))
    model = ["-m", checkpoint("llava-llama"), *FP32]
    child = terminal("ask", drawing, "what is this?", *model, "--max-tokens", "500", "-q")
    child.expect(r"\S")
    server.process.send_signal(signal.SIGKILL)
    child.expect(r"\r\nllava: serve: [^\r\n]*; going on without it\r\n")
    assert child.leave() == 0


def test_a_server_that_is_killed_in_the_midst_of_a_batch(
    serve: Serve, shell: Shell, drawing: Path, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(20):
        (tmp_path / "photos" / f"{number:02}.png").write_bytes(drawing.read_bytes())
    words = ("-m", checkpoint("llava-llama"), "--max-tokens", "40", *FP32)
    questions = ("--question", "what is this?", "--question", QUESTION)
    assert shell("batch", tmp_path / "photos", *questions, "-o", tmp_path / "alone.jsonl", *words).returncode == 0
    server = serve("-m", checkpoint("llava-llama"))
    process = begun("batch", tmp_path / "photos", *questions, "-o", tmp_path / "out.jsonl", *words)
    while process.poll() is None and not server.metric('llava_requests_total{status="200"}'):
        pass
    server.process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert b"going on without it" in errors
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_a_socket_of_somebody_else_is_left_alone(home: Path, run: Run, drawing: Path) -> None:
    (home / "server.sock").write_text("no socket")
    assert server_info(home / "server.sock") is None
    assert run("ask", drawing, QUESTION, *FP32).stdout == "red\n"
