"""`llava check`, `Engine.check` and pytest's fixture, with the built-in model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command import Run
from helpers.tables import for_each
from PIL import Image

import llava_cli
from llava_cli import Check, Engine
from llava_cli.checking import question_about
from llava_cli.errors import UsageError


@for_each(
    "probability, at_least, verdict",
    [
        (0.5, 0.5, "yes"),
        (0.49, 0.5, "no"),
        (0.9, 0.9, "yes"),
        (0.89, 0.9, "unsure"),
        (0.11, 0.9, "unsure"),
        (0.1, 0.9, "no"),
        (1.0, 1.0, "yes"),
        (0.0, 1.0, "no"),
    ],
)
def test_a_verdict_needs_probability(probability: float, at_least: float, verdict: str) -> None:
    checked = Check("it is so", probability, at_least)
    assert checked.verdict == verdict
    assert bool(checked) == (verdict == "yes")


def test_the_exit_code_says_it(run: Run, drawing: Path) -> None:
    yes, no = run("check", drawing, "is there a circle?"), run("check", drawing, "is there a star?")
    assert (yes.exit_code, no.exit_code) == (0, 1)
    assert yes.stdout.startswith("yes (0.9")
    assert no.stdout.startswith("no (0.0")
    assert "demonstration model" in yes.stderr


def test_not_sure_enough(run: Run, drawing: Path) -> None:
    unsure = run("check", drawing, "is there a circle?", "--at-least", "1", "--json")
    found = json.loads(unsure.stdout)
    assert unsure.exit_code == 3
    assert list(found) == ["statement", "verdict", "probability", "at_least", "answer_probability"]
    assert found["verdict"] == "unsure" and 0.9 < found["probability"] <= 1


def test_quiet_prints_nothing(run: Run, drawing: Path) -> None:
    quiet = run("check", "-q", drawing, "is there a star?")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (1, "", "")


def test_a_statement_that_does_not_fit_the_model(run: Run, drawing: Path) -> None:
    assert "of this model's answers are among the choices" in run("check", drawing, "the weather is fine").stderr


@for_each(
    "words, code, line",
    [
        (["{drawing}"], 2, "llava: STATEMENT: there is none\n  llava check page.png"),
        (["{drawing}", "x", "--at-least", "0.4"], 2, "llava: --at-least: 0.4 is not between 0.5 and 1"),
        (["nowhere.png", "x"], 66, "llava: nowhere.png: no such file"),
    ],
)
def test_errors(run: Run, drawing: Path, words: list[str], code: int, line: str) -> None:
    result = run("check", *(word.replace("{drawing}", str(drawing)) for word in words))
    assert result.exit_code == code
    assert result.stderr.startswith(line)


def test_a_question_is_asked_as_it_is() -> None:
    ending = "\nAnswer the question using a single word or phrase."
    assert question_about(" Is it red? ", "llava-1.5-7b") == "Is it red?" + ending
    assert question_about("it is red", "x") == "Is this statement about the image true? it is red" + ending


def test_the_fixture_looks_at_screenshots(llava: Engine, drawing: Path) -> None:
    question = "is there a circle?"
    checks = [llava.check(picture, question) for picture in (drawing, drawing.read_bytes(), Image.open(drawing))]
    assert all(checks)
    assert [check.probability for check in checks] == pytest.approx([checks[0].probability] * 3)
    assert not llava.check([drawing], "is there a star?", at_least=0.9)
    with pytest.raises(UsageError, match="not between"):
        llava.check(drawing, question, at_least=2)


def test_images_of_pillow_are_upright_and_of_any_mode(llava: Engine, drawing: Path, tmp_path: Path) -> None:
    image, question = Image.open(drawing), "is the circle left of the triangle?"
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    image.transpose(Image.Transpose.ROTATE_90).save(path := tmp_path / "turned.png", exif=exif)
    turned, upright = llava.check(Image.open(path), question), llava.check(drawing, question)
    assert turned.probability == pytest.approx(upright.probability)
    assert llava.check(image.convert("CMYK"), "is there a circle?")
    with pytest.raises(UsageError, match="list is neither a path"):
        llava.check([[1, 2]], question)  # type: ignore[list-item]


def test_a_program_checks_with_the_users_own_model(llava: Engine, drawing: Path) -> None:
    assert llava_cli.check(drawing, "is there a circle?")
