"""What servers say to `--server`, and how their addresses are typed.

| kind | example | own variants | right value | test |
|---|---|---|---|---|
| content | a list of parts | strings, `output_text`, thinking beside it | its text | `test_content_in_parts` |
| no answer | a refusal | a filter, thoughts, a tool call, nothing | 65, and a line | `test_no_answer_is_an_error` |
| unset | `temperature` | environment, config, `/set` | sent if somebody set it | `test_what_nobody_set_is_not_sent` |
| newer | `max_completion_tokens` | no `stream_options` | asked again | `test_other_names` |
| addresses | the endpoint's | no scheme, slashes | the API's | `test_addresses` |
| errors | inside a 200 | FastAPI, Ollama, lists, pages | their words | `test_the_words_of_an_error` |
| shapes | whole for a stream | a stream for a whole, CRLF, empty choices | the answer | `test_shapes_of_answers` |
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.peer import Peer, Reply, delta, say, serving, stream
from helpers.tables import for_each

from llava_cli.conversation import Conversation, Turn
from llava_cli.engine.remote import remote_engine
from llava_cli.engine.remote.openai_messages import messages

QUESTION = "what color is the circle?"


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.setattr(remote_engine, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(remote_engine, "MAX_ATTEMPTS", 2)
    with serving() as it:
        yield it


def said(message: Any, reason: str | None = "stop") -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": reason}]}


@for_each(
    "content, words",
    itertools.product(
        [
            [{"type": "text", "text": "red"}],
            ["r", "ed"],
            [{"type": "output_text", "text": "red", "annotations": []}],
            [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "red"}],
            {"type": "text", "text": "red"},
        ],
        [(), ("--json",)],
    ),
    own=(peer,),
)
def test_content_in_parts(content: Any, words: tuple[str, ...], peer: Peer, run: Run, drawing: Path) -> None:
    peer.usual = say(200, said({"content": content}))
    asked = run("ask", "--server", peer.url, drawing, QUESTION, *words)
    assert (json.loads(asked.stdout)["answer"] if words else asked.stdout.strip()) == "red", asked.stderr


@for_each(
    ("message", "reason", "words"),
    [
        ({"content": None, "refusal": "I can't help with that."}, "stop", "refuses to answer: I can't help with that."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "stop", "refuses to answer: No."),
        ({"content": ""}, "content_filter", "its content filter holds the answer back"),
        ({"content": "It is"}, "SAFETY", "its content filter cuts the answer off"),
        ({"content": None, "reasoning_content": "The circle …"}, "length", "thinks, and does not answer: The circle …"),
        ({"content": "", "reasoning": "Hm."}, "stop", "thinks, and does not answer: Hm."),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls", "calls a tool, and does not answer"),
        ({"content": None}, "stop", "answers with nothing"),
    ],
    own=(peer,),
)
def test_no_answer_is_an_error(
    message: dict[str, Any], reason: str, words: str, peer: Peer, run: Run, drawing: Path, tmp_path: Path
) -> None:
    chunk = json.dumps({"choices": [{"delta": message, "finish_reason": reason}]})
    for reply in (say(200, said(message, reason)), stream(f"data: {chunk}", "data: [DONE]")):
        peer.usual = reply
        asked = run("ask", "--server", peer.url, "--json", drawing, QUESTION)
        assert (asked.exit_code, asked.stdout) == (65, "")
        assert asked.stderr.startswith(f"llava: {peer.url}/v1: {words}\n")
    (tmp_path / "photos").mkdir()
    for number in range(12):  # a row each, for it is the picture's fault and no other's
        (tmp_path / "photos" / f"{number}.png").write_bytes(drawing.read_bytes())
    rows = run("batch", "--server", peer.url, "--concurrency", "2", tmp_path / "photos", QUESTION).stdout.splitlines()
    assert [json.loads(row)["status"] for row in rows] == ["error"] * 12
    assert json.loads(rows[0])["error"]["message"].startswith(words)


OPTIONS = ("max_tokens", "temperature", "top_p", "seed", "stop")


def test_what_nobody_set_is_not_sent(
    peer: Peer, run: Run, drawing: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sent(*words: str) -> dict[str, Any]:
        assert run("ask", "--server", peer.url, drawing, QUESTION, *words).stdout == "red\n"
        return {name: peer.asked[-1][name] for name in OPTIONS if name in peer.asked[-1]}

    assert sent() == {}
    assert sent("--temperature", "0") == {"temperature": 0.0}
    assert sent("--max-tokens", "512", "--stop", ".") == {"max_tokens": 512, "stop": ["."]}
    (home / "config.toml").write_text("max_tokens = 512\n")
    monkeypatch.setenv("LLAVA_TOP_P", "1")
    assert sent() == {"max_tokens": 512, "top_p": 1.0}
    talk = f"/set temperature 0\n{QUESTION}\n/set temperature default\n{QUESTION}\n"
    assert run("chat", "--server", peer.url, drawing, input=talk).exit_code == 0
    assert ["temperature" in asked for asked in peer.asked[-2:]] == [True, False]


def test_other_names(peer: Peer, run: Run, drawing: Path) -> None:
    newer = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    peer.replies = [
        say(400, {"error": {"message": newer, "param": "max_tokens", "code": "unsupported_parameter"}}),
        say(422, {"detail": [{"loc": ["body", "stream_options"], "msg": "Extra inputs are not permitted"}]}),
    ]
    assert run("ask", "--server", peer.url, "--max-tokens", "9", drawing, QUESTION).stdout == "red\n"
    last = peer.asked[-1]
    assert (last["max_completion_tokens"], "max_tokens" in last, "stream_options" in last) == (9, False, False)
    error = {"error": {"message": "'temperature' does not support 0.5", "param": "temperature"}}
    peer.usual = say(400, error)
    asked = run("ask", "--server", peer.url, "--temperature", "0.5", drawing, QUESTION)
    assert asked.exit_code == 65
    assert asked.stderr.endswith("  without --temperature it may answer\n")


@for_each(
    "form, scheme",
    itertools.product(
        ["{}", "{}/", "{}/v1", "{}/v1/", "{}/v1/chat/completions", "{}/v1/chat/completions/", "{}//v1", "{}/v1/models"],
        ["http://", ""],
    ),
    own=(peer,),
)
def test_addresses(scheme: str, form: str, peer: Peer, run: Run, drawing: Path) -> None:
    url = form.format(peer.url).replace("http://", scheme)
    assert run("ask", "--server", url, drawing, QUESTION).stdout == "red\n"


def test_tls_where_there_is_none(peer: Peer, run: Run, drawing: Path) -> None:
    asked = run("ask", "--server", peer.url.replace("http:", "https:"), drawing, QUESTION)
    assert asked.exit_code == 69
    assert asked.stderr.endswith(f"speaks HTTP there, without TLS\n  --server {peer.url}/v1\n")


def test_a_web_page(peer: Peer, run: Run, drawing: Path) -> None:
    peer.usual = say(200, b"<!doctype html><title>Chat</title>")
    asked = run("ask", "--server", f"{peer.url}/v1", drawing, QUESTION)
    assert (asked.exit_code, "sends a web page there" in asked.stderr) == (69, True)
    peer.usual = say(502, b"<html><head><title>502 Bad Gateway</title></head>")
    assert "fails (502 Bad Gateway)" in run("ask", "--server", peer.url, drawing, QUESTION).stderr


@for_each(
    ("reply", "code", "words"),
    [
        (say(200, {"error": {"message": "no such picture", "code": 400}}), 65, "no such picture"),
        (say(200, {"error": "model 'x' not found", "code": "model_not_found"}), 69, "model 'x' not found"),
        (say(200, {"object": "error", "message": "too many pictures", "code": 400}), 65, "too many pictures"),
        (say(422, {"detail": [{"loc": ["body", "messages"], "msg": "field required"}]}), 65, "body.messages: field re"),
        (say(404, {"error": 'model "x" not found, try pulling it first'}), 69, 'model "x" not found, try pulling'),
        (say(400, {"message": ["first", "second"]}), 65, "first; second"),
        (say(400, b"plain words"), 65, "plain words"),
        (say(429, {"error": {"message": "no money", "code": "insufficient_quota"}}), 69, "no money"),
        (stream('data: {"object": "error", "message": "bad", "code": 400}'), 65, "bad"),
        (stream('error: {"code": 400, "message": "older llama.cpp"}'), 65, "older llama.cpp"),
    ],
    own=(peer,),
)
def test_the_words_of_an_error(reply: Reply, code: int, words: str, peer: Peer, run: Run, drawing: Path) -> None:
    peer.usual = reply
    asked = run("ask", "--server", peer.url, drawing, QUESTION)
    assert (asked.exit_code, asked.stdout) == (code, "")
    assert words in asked.stderr
    assert len(peer.asked) == 1


def test_what_to_type(peer: Peer, run: Run, drawing: Path) -> None:
    peer.usual = say(401, {"error": {"message": "no key"}})
    assert "LLAVA_API_KEY=" in run("ask", "--server", peer.url, drawing, QUESTION).stderr
    peer.usual = say(404, {"error": {"message": "no such model"}})
    asked = run("ask", "--server", peer.url, "-m", "other", drawing, QUESTION)
    assert asked.stderr.endswith("no such model\n  -m NAME asks for one of its-model\n")


@for_each(
    "reply, command",
    itertools.product(
        [
            say(200, said({"content": "red"}), Content_Type="application/json"),
            say(200, json.dumps(said({"content": "red"}), indent=2).encode()),
            say(200, {"choices": [{"text": "red", "finish_reason": "stop"}]}),
            stream('data: {"choices": [], "prompt_filter_results": []}', delta("red", "stop")),
            stream(": keep-alive", 'data:{"choices":[{"delta":{"content":"red"}}]}', "data:[DONE]"),
            stream("event: message\r\n" + delta("red") + "\r", "data: [DONE]\r"),
            stream(delta("red"), delta(None, "eos_token")),
        ],
        ["ask", "batch"],
    ),
    own=(peer,),
)
def test_shapes_of_answers(command: str, reply: Reply, peer: Peer, run: Run, drawing: Path) -> None:
    """Streamed or not, whichever was asked for."""
    peer.usual = reply
    asked = run(command, "--server", peer.url, *(["-q", drawing.parent] if command == "batch" else [drawing]), QUESTION)
    found = json.loads(asked.stdout.splitlines()[0])["answer"] if command == "batch" else asked.stdout.strip()
    assert found == "red", asked.stderr


def test_the_order_of_what_is_asked() -> None:
    talk = Conversation((Turn("", answer="Hello.", is_unasked=True), Turn("and now?")))
    assert messages(talk, lambda picture: "") == [
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "and now?"},
    ]


def test_a_date_to_come_back_at(peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote_engine.time, "sleep", pauses.append)
    peer.replies = [say(429, {}, Retry_After="Fri, 31 Dec 2100 23:59:59 GMT")]
    assert run("ask", "--server", peer.url, drawing, QUESTION).stdout == "red\n"
    assert pauses == [remote_engine.MAX_RETRY_AFTER]
