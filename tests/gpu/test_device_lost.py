"""An error after which a GPU does nothing more for a process ends the process, in one line."""

from __future__ import annotations

import gc
import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.command import Run
from helpers.tables import for_each
from PIL import Image

from llava_cli import Conversation, Sampling, load
from llava_cli.chat.repl import converse
from llava_cli.engine import Request
from llava_cli.engine.forward import Forward
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import DeviceLost, is_device_lost
from llava_cli.server.address import Address
from llava_cli.server.run import ServePolicy, serve
from llava_cli.settings import Settings

ILLEGAL = "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in …"
SAID = "the GPU has failed (CUDA error: an illegal memory access was encountered)"
OPTIONS = ("--device", "cpu", "-p", "fp32", "-q")


class Failing:
    """Lets a model read so many inputs, and then raises what a GPU raises from its first such error on."""

    def __init__(self, patch: pytest.MonkeyPatch, after: int) -> None:
        self.left, forward = after, Forward.__call__

        def read(one: Forward, *args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError(ILLEGAL)
            return forward(one, *args, **options)

        patch.setattr(Forward, "__call__", read)


@for_each(
    "words, is_lost",
    [
        (ILLEGAL, True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: unspecified launch failure", True),
        ("HIP error: an illegal memory access was encountered", True),
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", False),
        ("CUDA error: no kernel image is available for execution on the device", False),
        ("CUDA error: operation not permitted when stream is capturing", False),
    ],
)
def test_which_errors_those_are(words: str, is_lost: bool) -> None:
    assert is_device_lost(RuntimeError(words)) == is_lost
    assert not is_device_lost(OSError(words))


def test_a_question_ends_in_one_line(run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, after=1)
    done = run("ask", drawing, "what color is the circle?", *OPTIONS)
    assert done.exit_code == 69
    first, hint = done.stderr.splitlines()
    assert first == f"llava: builtin: {SAID}"
    assert "LLAVA_FAST=0" in hint


@pytest.mark.parametrize("is_batchable", [True, False])
def test_a_batch_keeps_its_rows_and_goes_on_later(
    is_batchable: bool, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were not answered are not marked as failed."""
    for number, color in enumerate(("red", "blue", "green", "black")):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{number}.png")
    batch = ("batch", tmp_path, "what color is this?", "-o", tmp_path / "out.jsonl", "--max-tokens", "1", *OPTIONS)

    def answered() -> list[str]:
        return [json.loads(line)["status"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    with monkeypatch.context() as patch:
        if is_batchable:
            Failing(patch, after=2)
        else:
            patch.setattr("llava_cli.engine.local.can_batch", lambda model, inputs: False)
            fail_alone(patch, after=2)
        done = run(*batch, "--batch-size", "1")
        assert done.exit_code == 69
        assert SAID in done.stderr
        assert answered() == ["ok", "ok"]
    assert run(*batch).exit_code == 0
    assert answered() == ["ok"] * 4


def fail_alone(patch: pytest.MonkeyPatch, after: int) -> None:
    answer, count = LocalEngine.answer, iter(range(after))

    def failing(self: LocalEngine, *args: Any) -> Any:
        if next(count, None) is None:
            raise DeviceLost("builtin", SAID)
        return answer(self, *args)

    patch.setattr(LocalEngine, "answer", failing)


def test_a_prompt_that_meets_it_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are put on the device, too."""
    engine = load("builtin", precision="fp32", device="cpu")
    monkeypatch.setattr(LocalEngine, "_sequence_of", lost)
    with pytest.raises(DeviceLost):
        list(engine.answer_many([Request(Conversation().ask("what?"), Sampling())]))


def lost(*args: object) -> None:
    raise RuntimeError(ILLEGAL)


def test_a_chat_at_a_terminal_ends() -> None:
    def ask(question: str) -> None:
        raise DeviceLost("builtin", SAID)

    chat: Any = SimpleNamespace(ask=ask)
    with pytest.raises(DeviceLost):
        converse(chat, lambda: "what is this?", quiet=True)


@pytest.mark.parametrize("where", ["model", "prompt"])
def test_a_server_answers_what_it_has_and_ends(where: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "model":
        Failing(monkeypatch, after=0)
    else:
        monkeypatch.setattr(LocalEngine, "_sequence_of", lost)
    told: list[tuple[int, str]] = []

    def ask(url: str) -> None:
        body = json.dumps({"messages": [{"role": "user", "content": "what is a circle?"}]}).encode()
        request = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            told.append((error.code, json.load(error)["error"]["code"]))

    def on_ready(info: dict[str, Any]) -> None:
        client.append(threading.Thread(target=ask, args=(info["url"],)))
        client[0].start()

    client: list[threading.Thread] = []
    settings = Settings.resolve(model="builtin", precision="fp32", device="cpu")
    try:
        with pytest.raises(DeviceLost, match="the GPU has failed") as raised:
            serve(settings, Address(port=0), ServePolicy(), on_ready, lambda line: None)
    finally:
        gc.unfreeze()
    client[0].join(60)
    assert told == [(500, "model_failed")]
    assert raised.value.exit_code == 69
