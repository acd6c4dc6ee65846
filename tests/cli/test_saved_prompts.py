"""`llava prompts`, and `-t NAME -P lang=de`: prompts that have a name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command import Run
from helpers.faults import Told
from helpers.tables import for_each
from PIL import Image

from llava_cli import limits
from llava_cli import loader as loading
from llava_cli.batch import run as batch
from llava_cli.checking import Check
from llava_cli.conversation import Conversation
from llava_cli.engine import Answer, Chunk
from llava_cli.paths import prompts_folder
from llava_cli.prompts.saved_prompts import BUILTIN
from llava_cli.settings import Sampling, Settings


class Repeats(Told):
    """Answers with what it is asked, and notes that and how."""

    settings: Settings
    asked: list[tuple[str | None, str]]

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        question = conversation.turns[-1].question
        self.asked.append((conversation.system, question))
        yield Chunk(question, Answer(question, "stop", 5, 0, 1, 0.0, 0.0))


@pytest.fixture(autouse=True)
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repeats:
    """A folder with a picture to stand in, and an engine that repeats questions."""
    found = Repeats()
    found.asked = []

    def load(settings: Settings, *_: object) -> Repeats:
        found.settings = settings
        return found

    monkeypatch.setattr(loading, "open_engine", load)
    monkeypatch.setattr(batch, "open_engine", load)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("a.png")
    return found


def said(run: Run, *words: str, code: int = 0) -> str:
    """What a command prints: on stdout, or on stderr if it fails."""
    result = run(*words)
    assert result.exit_code == code, result.stderr
    if code:
        assert result.stdout == "" and len(result.stderr.splitlines()) <= 2, result.stderr
    return (result.stderr if code else result.stdout).rstrip("\n")


def test_a_chat_begins_with_a_prompt(run: Run, engine: Repeats) -> None:
    run("prompts", "save", "sign", "/{stem}: a {lang} sign?", "--system", "Be terse.")
    words = ("chat", "-q", "a.png", "-t", "sign", "-P", "lang=de")
    assert run(*words, input="and now?\n").stdout.splitlines() == ["/a: a de sign?", "and now?"]
    assert engine.asked == [("Be terse.", "/a: a de sign?"), ("Be terse.", "and now?")]
    assert "-P lang=…" in run("chat", "a.png", "-t", "sign").stderr


def test_a_statement_may_be_a_prompt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(engine: Repeats, pictures: object, statement: str, *_: object) -> Check:
        return Check(statement, 1.0, 0.5)

    monkeypatch.setattr(Repeats, "check", check)
    run("prompts", "save", "button", "the {name_of} button is on {name}")
    words = ("check", "a.png", "-t", "button", "-P", "name_of=Save")
    assert json.loads(said(run, *words, "--json"))["statement"] == "the Save button is on a.png"
    assert "there is another question already" in said(run, *words, "it is red", code=2)
    assert "STATEMENT: there is none" in said(run, "check", code=2)
    for option, value in (("--choices", "a,b"), ("--schema", "shop"), ("--regex", "[0-9]+")):
        run("prompts", "save", "formed", "is it red?", option, value)
        told = said(run, "check", "a.png", "-t", "formed", code=2)
        assert told == (
            f"llava: -t formed: it has {option}, and a check is answered with yes or no\n  llava ask a.png -t formed"
        )
        run("prompts", "delete", "formed")


def test_a_prompt_from_its_saving_to_its_end(run: Run) -> None:
    note = run("prompts", "save", "sign", "Is {stem} a {lang} sign?").stderr
    assert "sign.toml" in note and "llava ask img.jpg -t sign -P lang=… asks it" in note
    assert said(run, "ask", "a.png", "-t", "sign", "-P", "lang=de") == "Is a a de sign?"
    assert json.loads(said(run, "batch", "a.png", "-t", "sign", "-P", "lang=de"))["asked"] == "Is a a de sign?"
    assert said(run, "prompts", "show", "sign") == 'text = "Is {stem} a {lang} sign?"'
    found = {"name": "sign", "text": "Is {stem} a {lang} sign?", "parameters": {}, "builtin": False}
    assert json.loads(said(run, "prompts", "show", "sign", "--json")) == found
    assert found in json.loads(said(run, "prompts", "list", "--json"))
    assert "sign\tIs {stem} a {lang} sign?\t" in said(run, "prompts").splitlines()
    assert "another prompt is saved" in said(run, "prompts", "save", "sign", "other", code=2)
    said(run, "prompts", "save", "sign", "Is {stem} a {lang} sign?")  # the same one
    said(run, "prompts", "save", "sign", "other", "--force")
    assert said(run, "ask", "a.png", "-t", "sign") == "other"
    said(run, "prompts", "delete", "sign")
    assert "llava: sign: no prompt has that name" in said(run, "ask", "a.png", "-t", "sign", code=2)
    assert list(prompts_folder().iterdir()) == []


def test_parameters_and_what_they_are_without_the_user(run: Run) -> None:
    said(run, "prompts", "save", "p", "{lang} {words or 25} {% if tone %}{tone}{% endif %}!", "-P", "lang=en")
    assert said(run, "ask", "-t", "p") == "en 25 !"
    assert said(run, "ask", "-t", "p", "-P", "lang={name}", "-P", "words=3", "-P", "tone=a=b") == "{name} 3 a=b!"
    assert 'parameters]\nlang = "en"' in said(run, "prompts", "show", "p")


def test_several_lines_and_stdin(run: Run) -> None:
    text = 'one "two"\n\tthree \\ \x1b[1m\u202e {name}'
    assert run("prompts", "save", "long", input=text + "\n").exit_code == 0
    assert json.loads(said(run, "prompts", "show", "long", "--json"))["text"] == text
    assert said(run, "ask", "a.png", "-t", "long", "-q") == text.replace("{name}", "a.png")
    assert (prompts_folder() / "long.toml").read_text().count("\n") >= 2


def test_options_that_belong_to_a_prompt(run: Run, engine: Repeats) -> None:
    words = ("--system", "Be terse.", "--max-tokens", "7", "--choices", "sun,rain", "--or", "?", "--at-least", "0.5")
    said(run, "prompts", "save", "w", "the weather?", *words)
    said(run, "ask", "a.png", "-t", "w")
    sampling = engine.settings.sampling
    assert (sampling.choices, sampling.otherwise, sampling.max_tokens) == (("sun", "rain"), "?", 7)
    assert engine.asked.pop() == ("Be terse.", "the weather?")
    said(run, "ask", "a.png", "-t", "w", "--system", "Be long.", "--regex", "[a-z]+")
    sampling = engine.settings.sampling
    assert (sampling.choices, sampling.regex, sampling.otherwise, sampling.max_tokens) == ((), "[a-z]+", None, 7)
    assert engine.asked.pop() == ("Be long.", "the weather?")
    said(run, "prompts", "save", "s", "read", "--schema", "shop, total float")
    said(run, "batch", "a.png", "-t", "s", "-o", "out.jsonl")
    assert json.loads(str(engine.settings.sampling.schema))["required"] == ["shop", "total"]
    kept = json.loads(Path("out.jsonl.run/settings.json").read_text())
    assert (kept["questions"], kept["template_question"], kept["parameters"]) == (["read"], "prompt", {})
    assert "give one of them" in said(run, "prompts", "save", "x", "y", "--regex", "a", "--choices", "a,b", code=2)


@for_each("name", BUILTIN)
def test_built_in_prompts(name: str, run: Run) -> None:
    plain = said(run, "ask", "a.png", "-t", name)
    assert plain and not set("{}") & set(plain)
    if "lang" in BUILTIN[name].text:
        in_german = said(run, "ask", "a.png", "-t", name, "-P", "lang=German")
        assert in_german == f"{plain} Write it in this language: German."
    assert f"{name}: a built-in prompt" in said(run, "prompts", "delete", name, code=2)
    said(run, "prompts", "save", name, "mine")
    assert said(run, "ask", "a.png", "-t", name) == "mine"
    said(run, "prompts", "delete", name)
    assert said(run, "ask", "a.png", "-t", name) == plain


@for_each(
    ("words", "reason"),
    [
        (["ask", "a.png", "-t", "captoin"], "captoin: no prompt has that name\n  did you mean caption?"),
        (["ask", "a.png", "-t", "../x"], "../x: no name for a prompt"),
        (["ask", "a.png", "-t", "p"], "p: {lang} is not given\n  -P lang=…"),
        (["batch", "a.png", "-t", "p"], "p: {lang} is not given\n  -P lang=…"),
        (
            ["ask", "a.png", "-t", "p", "-P", "lnag=de"],
            "-P lnag: the prompt has no such parameter\n  did you mean lang?",
        ),
        (["ask", "a.png", "-t", "p", "-P", "lang"], "-P: 'lang' is not NAME=VALUE"),
        (["ask", "a.png", "-t", "p", "-P", "name=x"], "-P name: every picture has a field of that name"),
        (["ask", "a.png", "hello?", "-t", "p"], "-t p: there is another question already"),
        (["batch", "a.png", "hello?", "-t", "p"], "-t p: there is another question already"),
        (["ask", "a.png", "hello?", "-P", "lang=de"], "-P lang=de: there is no prompt to fill in"),
        (["prompts", "save", "", "x"], "'': no name for a prompt"),
        (["prompts", "save", "a b", "x"], "a b: no name for a prompt"),
        (["prompts", "save", "a", " "], "TEXT: it is empty"),
        (["prompts", "save", "a", "{% if %}"], "QUESTION: as a template: expected an expression"),
        (
            ["prompts", "save", "a", "{exif.Modle}"],
            "{exif.Modle}: EXIF has no such value\n  did you mean {exif.Model}?",
        ),
        (["prompts", "save", "a", "x", "-P", "lang=de"], "-P lang: the prompt has no such parameter\n  it has none"),
        (["prompts", "delete", "x"], "x: no prompt has that name"),
    ],
)
def test_what_cannot_be_done(words: list[str], reason: str, run: Run, engine: Repeats) -> None:
    run("prompts", "save", "p", "in {lang}")
    assert said(run, *words, code=2).startswith(f"llava: {reason}")
    assert engine.asked == []


def test_a_picture_that_lacks_what_is_asked(run: Run) -> None:
    said(run, "prompts", "save", "e", "{exif.Model}")
    assert said(run, "ask", "a.png", "-t", "e", code=65).startswith("llava: a.png: it has no {exif.Model}")
    said(run, "prompts", "save", "n", "{name or 'stdin'} {width}")
    piped = run("ask", "-", "-t", "n", input=Path("a.png").read_bytes())
    assert piped.stdout == "stdin 40\n"


@for_each(
    ("content", "reason"),
    [
        (b"text = ", "repair or delete that file"),
        (b"a = 1", "it has no text"),
        (b'text = "a"\nb = 1', "unknown key 'b'; the keys are: text, parameters, system"),
        (b'text = "a"\nmax_tokens = "many"', "max_tokens: 'many' is not a whole number"),
        (b'text = "a"\nparameters = 3', "its parameters are no texts"),
        (b"text = '''" + b"a" * limits.SAVED_PROMPT_BYTES + b"'''", "is larger than"),
        (b"\xff", "damaged.toml"),
    ],
)
def test_a_file_that_is_damaged(content: bytes, reason: str, run: Run) -> None:
    prompts_folder().mkdir(parents=True, exist_ok=True)
    (prompts_folder() / "damaged.toml").write_bytes(content)
    assert reason in said(run, "ask", "a.png", "-t", "damaged", code=2)


def test_a_plain_question_knows_nothing_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("llava_cli.prompts.")]:
        monkeypatch.delitem(sys.modules, name)
    assert said(run, "ask", "a.png", "what is {this}?") == "what is {this}?"
    new = {f"llava_cli.prompts.{name}" for name in ("saved_prompts", "question_fields", "question_template")}
    assert not new & sys.modules.keys()
