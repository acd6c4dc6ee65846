"""Schemas that keep a server or a batch busy, or end it: a stranger's are compiled in a sandbox first."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers.command import Run
from helpers.servers import Endpoint, in_thread
from helpers.tables import for_each

from llava_cli import Conversation, Sampling, limits, load
from llava_cli.engine.generate import form_sandbox
from llava_cli.engine.generate.form_sandbox import FormSandbox
from llava_cli.engine.remote.remote_engine import RemoteEngine
from llava_cli.errors import SandboxUnavailable, UsageError
from llava_cli.sandbox.process import WorkerDied, WorkerLate
from llava_cli.server.api_error import ApiError
from llava_cli.settings import OPTIONS

ENDLESS = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.{{{i + 10}}}{chr(97 + i)}.*"} for i in range(20)]}
"""All of these patterns in one automaton: more states than anybody waits for."""
LARGE = r"\w?" * 1300
"""Takes the compiler some 400 MB."""
MESSAGES: Any = [{"role": "user", "content": "what is this?"}]


def nested(levels: int, refs: int) -> dict[str, Any]:
    """A schema of which every answer has so many levels of lists, in as many steps of references."""
    schemas: dict[str, Any] = {"0": {"const": []}}
    for number in range(1, refs + 1):
        schema: dict[str, Any] = {"$ref": f"#/$defs/{number - 1}"}
        for _ in range(levels * number // refs - levels * (number - 1) // refs):
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
        schemas[str(number)] = schema
    return {"$defs": schemas, "$ref": f"#/$defs/{refs}"}


def raising(error: Exception) -> Callable[..., bytes]:
    def ask(*_: Any) -> bytes:
        raise error

    return ask


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with in_thread(load("builtin", precision="fp32", device="cpu"), tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[FormSandbox]:
    """With too little memory for what is large; a process has 36 MB of address space to begin with, on some more."""
    monkeypatch.setattr(limits, "FORM_MEMORY", 2**28)
    it = FormSandbox()
    yield it
    it.close()


def ask(server: Endpoint, schema: Any, **options: Any) -> Any:
    create = server.client().chat.completions.create
    return create(model="builtin", messages=MESSAGES, extra_body={"guided_json": schema}, **options).choices[0]


@for_each(
    ("schema", "message"),
    [
        (ENDLESS, "guided_json: takes longer than 0 s to compile"),
        (nested(120, 120), "guided_json: nested too deep"),
        (nested(800, 400), "guided_json: its $refs nest more than"),
        (nested(limits.ANSWER_DEPTH, 8), "schema: the answer is nested deeper than 60 levels"),
    ],
)
def test_a_server_goes_on(schema: Any, message: str, server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FORM_SECONDS", 0.3)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, schema)
    assert message in refused.value.message
    assert ask(server, {"const": "next"}).message.content == '"next"'


def test_an_answer_as_deep_as_it_may_be(server: Endpoint) -> None:
    """It comes back over a server as it was made."""
    schema, text = nested(limits.ANSWER_DEPTH - 1, 8), "[" * limits.ANSWER_DEPTH + "]" * limits.ANSWER_DEPTH
    assert ask(server, schema).message.content == text
    engine = RemoteEngine(f"http://127.0.0.1:{server.port}", None, None, 1, print)
    assert engine.answer(Conversation().ask("what is this?"), Sampling(schema=schema)).data == json.loads(text)  # type: ignore[arg-type]


def test_what_takes_too_much_memory_ends_the_sandbox_alone(sandbox: FormSandbox) -> None:
    """It is refused as often as it comes, and the next form has a new process."""
    for _ in range(2):
        with pytest.raises(UsageError, match="--regex: too large or too deep to compile"):
            sandbox.check(OPTIONS["regex"], LARGE)
        sandbox.check(OPTIONS["regex"], "a+")


def test_a_failure_that_may_pass_is_not_remembered(sandbox: FormSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    option = OPTIONS["regex"]
    with monkeypatch.context() as patch:
        patch.setattr(sandbox._worker, "ask", raising(WorkerLate("3")))
        with pytest.raises(UsageError, match="takes longer than 3 s to compile"):
            sandbox.check(option, "a+")
        patch.setattr(sandbox._worker, "ask", raising(WorkerDied("its process cannot be started (no room)")))
        with pytest.raises(SandboxUnavailable, match="cannot be started") as error:
            sandbox.check(option, "a+")
    assert ApiError.from_engine(error.value).status == 503
    sandbox.check(option, "a+")


def test_a_row_of_a_questions_file_cannot_keep_a_batch_busy(
    run: Run, drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FORM_SECONDS", 0.3)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"image": str(drawing), "question": "a?", "schema": ENDLESS}) + "\n")
    result = run("batch", questions, "--root", drawing.parent)
    assert (result.exit_code, result.stdout) == (65, "")
    assert "line 1: 'schema': takes longer than 0 s to compile" in result.stderr


def test_reasons_are_those_of_the_compiler(sandbox: FormSandbox) -> None:
    for key, text, reason in (("regex", "(", "unclosed group"), ("grammar", "start: b", "unknown name")):
        with pytest.raises(UsageError, match=f"--{key}: .*{reason}"):
            sandbox.check(OPTIONS[key], text)


def test_the_sandbox_has_less_stack_than_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What just passes there must not end the server."""
    told = list[tuple[int, ...]]()
    monkeypatch.setattr(resource, "setrlimit", lambda kind, bounds: told.append((kind, *bounds)))
    form_sandbox.prepare()
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    assert told == [(resource.RLIMIT_STACK, limits.FORM_STACK_BYTES, hard)]
