"""Answers of a given form by servers elsewhere, each asked in its own words; what they cannot do is said."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.peer import Peer, Reply, answer, say, serving
from helpers.tables import for_each

from llava_cli.choices import spellings
from llava_cli.engine.remote import remote_engine
from llava_cli.engine.remote.choice_logprobs import TokenLogprobs, choice_probabilities

QUESTION = "what color is it?"
CHOICES = ("--choices", "red,blue,a b")
LISTED = ["red", "blue", "a b"]


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.setattr(remote_engine, "FIRST_DELAY", 0.0)
    with serving() as it:
        yield it


def owned(by: str) -> Reply:
    return say(200, {"data": [{"id": "its-model", "owned_by": by}]})


def told(*tokens: tuple[str, dict[str, float]], text: str | None = None, **message: Any) -> Reply:
    """An answer of these tokens, with the probabilities of those that could be in their places."""

    def logprob(token: str, probability: float) -> dict[str, Any]:
        return {"token": token, "logprob": math.log(probability), "bytes": list(token.encode())}

    content = [
        {**logprob(token, top[token]), "top_logprobs": [logprob(*pair) for pair in top.items()]}
        for token, top in tokens
    ]
    said = "".join(token for token, _ in tokens) if text is None else text
    choice = {
        "message": {"role": "assistant", "content": said, **message},
        "finish_reason": "stop",
        "logprobs": {"content": content} if tokens else None,
    }
    return say(200, {"choices": [choice]})


@for_each(
    ("server", "fields"),
    [
        ("vllm", {"structured_outputs": {"choice": LISTED}, "guided_choice": LISTED}),
        ("sglang", {"regex": " ?(red|blue|a b)"}),
        ("llamacpp", {"grammar": 'root ::= " "? ("red" | "blue" | "a b")'}),
        ("openai", {}),
    ],
)
def test_choices(server: str, fields: dict[str, Any], peer: Peer, run: Run, drawing: Path) -> None:
    peer.models, peer.usual = owned(server), told(("red", {"red": 0.6, "blue": 0.2, "x": 0.1}))
    row = json.loads(run("ask", "--server", peer.url, "--json", drawing, QUESTION, *CHOICES).stdout)
    assert row["answer"] == "red"
    assert row["probabilities"] == {"red": 0.75, "blue": 0.25, "a b": 0.0}
    assert "answer_probability" not in row
    sent = {name: value for name, value in peer.asked[-1].items() if name not in ("model", "messages")}
    assert sent == {"max_tokens": 16, "logprobs": True, "top_logprobs": 20, **fields}
    words = ("--or", "unsure", "--at-least", "0.8")
    assert run("ask", "--server", peer.url, drawing, QUESTION, *CHOICES, *words).stdout == "unsure\n"


def test_our_own_server_is_asked_for_all_of_it(peer: Peer, run: Run, drawing: Path) -> None:
    details = {
        "probabilities": {"blue": 0.5, "red": 0.25, "a b": 0.25},
        "answer_probability": 0.125,
        "confidence": {"mean": 0.5, "lowest": 0.25, "lowest_token": "blue"},
        "sight": 0.75,
    }
    peer.models, peer.usual = owned("llava"), told(text="blue", llava=details)
    words = (*CHOICES, "--or", "unsure", "--at-least", "0.3", "--confidence", "--sight")
    row = json.loads(run("ask", "--server", peer.url, "--json", drawing, QUESTION, *words).stdout)
    assert {name: row[name] for name in details} == details
    assert peer.asked[-1]["structured_outputs"] == {"choice": LISTED}
    assert peer.asked[-1]["llava"] == {"otherwise": "unsure", "at_least": 0.3, "confidence": True, "sight": True}
    assert "logprobs" not in peer.asked[-1]
    peer.usual = answer("blue")  # one of an older version would refuse; one that is none passes over what it is asked
    asked = run("ask", "--server", peer.url, drawing, QUESTION, *CHOICES)
    assert (asked.exit_code, asked.stdout) == (69, "")
    assert "answers as if there were no --choices" in asked.stderr


@for_each(
    ("server", "words", "fields", "text"),
    [
        ("vllm", ("--regex", "[a-z]+"), {"structured_outputs": {"regex": "[a-z]+"}, "guided_regex": "[a-z]+"}, "red"),
        ("sglang", ("--regex", "[a-z]+"), {"regex": "[a-z]+"}, "red"),
        (
            "vllm",
            ("--grammar", 'start: "red" | "blue"'),
            {"structured_outputs": {"grammar": 'start: "red" | "blue"'}, "guided_grammar": 'start: "red" | "blue"'},
            "blue",
        ),
        *((name, ("--schema", "a int"), {}, '{ "a":7}') for name in ("vllm", "sglang", "llamacpp", "ollama", "llava")),
    ],
)
def test_forms(
    server: str, words: tuple[str, ...], fields: dict[str, Any], text: str, peer: Peer, run: Run, drawing: Path
) -> None:
    peer.asked.clear()
    peer.models, peer.usual = owned(server), answer(text)
    asked = run("ask", "--server", peer.url, drawing, QUESTION, *words)
    assert asked.stdout == f"{text}\n", asked.stderr
    row = json.loads(run("ask", "--server", peer.url, "--json", drawing, QUESTION, *words).stdout)
    assert row.get("data") == ({"a": 7} if "--schema" in words else None)
    for sent in peer.asked:
        for name in ("model", "messages", "stream", "stream_options"):
            sent.pop(name, None)
        if "--schema" in words:
            form = sent.pop("response_format")
            assert form["type"] == "json_schema"
            assert form["json_schema"]["schema"]["properties"] == {"a": {"type": "integer"}}
        assert sent == fields


@for_each(
    ("server", "reply", "words", "code", "message"),
    [
        ("llamacpp", answer("a"), ("--regex", "a"), 2, "--regex: http://ADDRESS/v1 has nothing like it"),
        ("sglang", answer("a"), ("--grammar", 'start: "a"'), 2, "--grammar: http://ADDRESS/v1 has nothing like it"),
        ("openai", answer("a"), ("--regex", "a"), 2, "--regex: http://ADDRESS/v1 has nothing like it"),
        ("vllm", answer("a"), ("--sight",), 2, "--sight: http://ADDRESS/v1 has nothing like it"),
        ("vllm", answer("a"), ("--confidence",), 69, "does not tell how probable its tokens are"),
        ("vllm", answer("It is red."), CHOICES, 65, "its answer is none of the choices: It is red."),
        ("openai", answer("It is red."), CHOICES, 65, "its answer is none of the choices: It is red."),
        ("openai", answer("red"), (*CHOICES, "--or", "x", "--at-least", "0.9"), 69, "how probable the choices are"),
        ("vllm", answer("It is 7."), ("--schema", "a int"), 65, "its answer is not JSON, though it was asked for"),
        ("vllm", answer("It is 7."), ("--regex", "[0-9]"), 65, "its answer does not fit --regex: It is 7."),
        ("openai", say(400, {"error": {"message": "no response_format here"}}), ("--schema", "a"), 65, "no response_"),
    ],
)
def test_what_a_server_cannot_do_is_said(
    server: str, reply: Reply, words: tuple[str, ...], code: int, message: str, peer: Peer, run: Run, drawing: Path
) -> None:
    peer.models, peer.usual = owned(server), reply
    asked = run("ask", "--server", peer.url, "--json", drawing, QUESTION, *words)
    assert (asked.exit_code, asked.stdout) == (code, ""), asked.stderr
    assert message.replace("ADDRESS", peer.url.removeprefix("http://")) in asked.stderr
    assert asked.stderr.startswith("llava: ")


def test_a_server_without_logprobs_chooses_all_the_same(peer: Peer, run: Run, drawing: Path) -> None:
    """It refuses them, is asked without them, and is not asked for them again."""
    refusal = say(400, {"error": {"message": "logprobs are not supported with this model", "param": "logprobs"}})
    peer.replies, peer.usual = [refusal], answer("Blue.")
    row = json.loads(run("ask", "--server", peer.url, "--json", drawing, QUESTION, *CHOICES).stdout)
    assert row["answer"] == "blue"
    assert "probabilities" not in row
    assert ["logprobs" in sent or "top_logprobs" in sent for sent in peer.asked] == [True, False]
    checked = run("check", "--server", peer.url, drawing, "it is blue")
    assert checked.exit_code != 0
    assert "none of the choices" in checked.stderr
    assert not {"temperature", "top_p", "seed"} & peer.asked[-1].keys()  # which nobody has set


def test_our_own_servers_data_is_taken_as_it_is(peer: Peer, run: Run, drawing: Path) -> None:
    """A number beyond a double's range is the nearest one there, too."""
    number = int(1.7976931348623157e308)
    peer.models, peer.usual = owned("llava"), told(text='{"a": ' + "9" * 500 + "}", llava={"data": {"a": number}})
    asked = run("ask", "--server", peer.url, "--json", drawing, QUESTION, "--schema", "a int")
    assert json.loads(asked.stdout)["data"] == {"a": number}, asked.stderr


def test_a_batch_ends_where_the_server_cannot_do_it(peer: Peer, run: Run, drawing: Path) -> None:
    peer.models = owned("llamacpp")
    ended = run("batch", "--server", peer.url, drawing, QUESTION, "--regex", "a")
    assert (ended.exit_code, peer.asked) == (2, [])
    assert "--regex: " in ended.stderr


def test_a_row_that_the_server_cannot_do_is_that_rows_error(
    peer: Peer, run: Run, drawing: Path, tmp_path: Path
) -> None:
    peer.models, peer.usual = owned("llamacpp"), answer("a")
    rows = [{"image": drawing.name, "question": "a?"}, {"image": drawing.name, "question": "b?", "regex": "b"}]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in (*rows[::-1], rows[0])))
    ended = run("batch", "--server", peer.url, "--root", drawing.parent, questions)
    made = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [row.get("answer") for row in made] == [None, "a", "a"], ended.stderr
    assert "has nothing like it" in json.dumps(made[0])
    ended = run("batch", "--server", peer.url, drawing, QUESTION, "--sight-sample", "1")
    assert (ended.exit_code, ended.stdout) == (2, "")


@for_each(
    ("words", "text", "said"),
    [
        (("--regex", "  yes"), "  yes", "  yes"),
        (("--regex", "yes"), " yes", "yes"),
        (("--regex", r"\bcat\b"), "cat", "cat"),  # our own compiler has no look-around
    ],
)
def test_an_answer_that_fits_is_taken(
    words: tuple[str, ...], text: str, said: str, peer: Peer, run: Run, drawing: Path
) -> None:
    peer.models, peer.usual = owned("vllm"), answer(text)
    asked = run("ask", "--server", peer.url, "--json", drawing, QUESTION, *words)
    assert asked.exit_code == 0, asked.stderr
    assert json.loads(asked.stdout)["answer"] == said


def refuse(constant: str) -> None:
    raise AssertionError(constant)


def test_rows_are_json_whatever_a_server_says(peer: Peer, run: Run, drawing: Path) -> None:
    def asked() -> Any:
        return run("ask", "--server", peer.url, "--json", drawing, QUESTION, "--schema", "a float")

    peer.models, peer.usual = owned("vllm"), answer('{"a": 1e999}')
    assert json.loads(asked().stdout, parse_constant=refuse)["data"] == {"a": sys.float_info.max}
    peer.usual = answer('{"a": NaN}')
    assert (asked().exit_code, asked().stdout) == (65, "")
    peer.models, peer.usual = owned("llava"), told(text='{"a": 1}', llava={"data": {"a": float("nan")}})
    assert (asked().exit_code, asked().stdout) == (69, "")


@for_each("probabilities", [{}, {"z": -5, "q": 7}, {"red": 2, "blue": 0, "a b": 0}, {"red": 1.0}])
def test_probabilities_that_are_none(probabilities: Any, peer: Peer, run: Run, drawing: Path) -> None:
    peer.models, peer.usual = owned("llava"), told(text="red", llava={"probabilities": probabilities})
    asked = run("ask", "--server", peer.url, "--json", drawing, QUESTION, *CHOICES)
    assert (asked.exit_code, asked.stdout) == (69, ""), asked.stderr
    assert asked.stderr.startswith("llava: ")


def test_log_probabilities_beyond_reason(peer: Peer, run: Run, drawing: Path) -> None:
    least = ("x", {"x": -1.7e308})
    peer.models = owned("vllm")
    peer.usual = say(
        200,
        {
            "choices": [
                {
                    "message": {"content": "xx"},
                    "finish_reason": "stop",
                    "logprobs": {
                        "content": [
                            {"token": token, "logprob": top[token], "top_logprobs": []} for token, top in (least, least)
                        ]
                    },
                }
            ]
        },
    )
    row = json.loads(run("ask", "--server", peer.url, "--json", drawing, QUESTION, "--confidence").stdout)
    assert row["confidence"]["mean"] == 0.0


def test_confidence(peer: Peer, run: Run, drawing: Path) -> None:
    peer.usual = told((" dark", {" dark": 0.5}), (" red", {" red": 0.125}))
    row = json.loads(run("ask", "--server", peer.url, "--json", drawing, QUESTION, "--confidence").stdout)
    assert row["confidence"] == {"mean": 0.25, "lowest": 0.125, "lowest_token": " red"}
    assert peer.asked[-1]["logprobs"] is True


def tokens(*given: tuple[str, dict[str, float]]) -> list[TokenLogprobs]:
    return [TokenLogprobs(text, math.log(top[text]), {k: math.log(p) for k, p in top.items()}) for text, top in given]


@for_each(
    ("choices", "given", "expected"),
    [
        (["yes", "no"], [("yes", {"yes": 0.9, "no": 0.1})], {"yes": 0.9, "no": 0.1}),
        (["yes", "no"], [("Yes", {"Yes": 0.3, " yes": 0.3, "no": 0.2, "maybe": 0.2})], {"yes": 0.75, "no": 0.25}),
        # a space, or the beginning of both, before the one that differs
        (["yes", "no"], [(" ", {" ": 1.0}), ("no", {"no": 0.8, "yes": 0.2})], {"no": 0.8, "yes": 0.2}),
        (
            ["red car", "red cat"],
            [("red", {"red": 1.0}), (" cat", {" cat": 0.5, " car": 0.5})],
            {"red cat": 0.5, "red car": 0.5},
        ),
        # one begins the other: the end tells
        (["sun", "sunny"], [("sun", {"sun": 1.0}), ("", {"": 0.6, "ny": 0.4})], {"sun": 0.6, "sunny": 0.4}),
        (["sun", "sunny"], [("sun", {"sun": 1.0}), ("ny", {"<|end|>": 0.6, "ny": 0.4})], {"sun": 0.6, "sunny": 0.4}),
        (["sun", "sunny"], [("sun", {"sun": 1.0})], None),
        # what several begin with, and nobody knows how it goes on
        (["red car", "red cat", "blue"], [("blue", {"blue": 0.5, "red": 0.5})], None),
        (
            ["red car", "red cat", "blue"],
            [("blue", {"blue": 0.999, "red": 0.001})],
            {"blue": 1.0, "red car": 0.0, "red cat": 0.0},
        ),
        (["yes", "no"], [("maybe", {"maybe": 1.0})], None),
        (["yes", "no"], [], None),
    ],
)
def test_probabilities_of_choices(
    choices: list[str], given: list[tuple[str, dict[str, float]]], expected: dict[str, float] | None
) -> None:
    spelled = {spelling: choice for choice in choices for spelling in spellings(choice)}
    found = choice_probabilities(spelled, tokens(*given))
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found == pytest.approx(expected)
