"""`llava ask` as a user meets it, with the built-in model."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.command import Run


def test_answers_on_stdout_and_hints_on_stderr(run: Run, drawing: Path) -> None:
    result = run("ask", drawing, "what is this?", "--max-tokens", "8")
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert "demonstration model" in result.stderr


def test_json_has_every_field(run: Run, drawing: Path) -> None:
    result = run("ask", drawing, "how many shapes are there?", "--json")
    found = json.loads(result.stdout)
    assert list(found) == [
        "answer",
        "question",
        "images",
        "region",
        "model",
        "precision",
        "device",
        "finish_reason",
        "prompt_tokens",
        "answer_tokens",
        "seconds",
    ]
    assert list(found["seconds"]) == ["load", "first_token", "total"]
    assert (found["images"], found["region"]) == ([str(drawing)], None)
    result = run("ask", drawing, "how many shapes are there?", "--json", "--region", "0, 0, 50%, 50%")
    assert json.loads(result.stdout)["region"] == "0,0,50%,50%"


def test_an_answer_from_a_list(run: Run, drawing: Path) -> None:
    asked = ("ask", "-q", drawing, "what color is the circle?", "--choices", "blue,red,light red")
    assert run(*asked).stdout == "red\n"
    found = json.loads(run(*asked, "--json").stdout)
    assert found["answer"] == next(iter(found["probabilities"])) == "red"
    assert set(found["probabilities"]) == {"blue", "red", "light red"}
    assert found["answer_probability"] > 0.9
    told = run(*asked, "--stats", "--or", "unsure", "--at-least", "1")
    assert told.stdout == "unsure\n"
    assert " · 3 choices · " in told.stderr
    little = run("ask", drawing, "what color is the circle?", "--choices", "square,star")
    assert "of this model's answers are among the choices" in little.stderr
