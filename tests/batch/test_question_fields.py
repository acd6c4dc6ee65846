"""Questions with fields: what stands in them, where they come from, and what cannot be filled in."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.faults import Told
from helpers.tables import for_each
from PIL import ExifTags, Image

from llava_cli import limits
from llava_cli.batch import run as module
from llava_cli.errors import BadImage, UsageError
from llava_cli.images.exif import ExifReader
from llava_cli.images.sandbox import REQUEST_HEADER
from llava_cli.prompts.question_fields import FIELDS, QuestionFields, fields_in
from llava_cli.prompts.question_template import TemplateRefused, TemplateSandbox
from llava_cli.sandbox.process import Worker

Row = dict[str, Any]


class Asked(Told):
    """Answers with what it is asked, and notes that."""

    questions: list[str] = []  # noqa: RUF012

    def say(self, question: str, name: str) -> str:
        self.questions.append(question)
        return f"it was: {question}"


@pytest.fixture(autouse=True)
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """A folder with pictures to stand in, and an engine that repeats questions."""
    found = Asked()
    found.questions = []
    monkeypatch.setattr(module, "open_engine", lambda *_: found)
    (tmp_path / "cats").mkdir()
    monkeypatch.chdir(tmp_path)
    photograph("cats/a.jpg")
    draw("cats/b.png")
    os.utime("cats/b.png", (day := time.mktime((2020, 2, 29, 12, 0, 0, 0, 0, -1)), day))
    yield found


@pytest.fixture(scope="module")
def sandbox() -> Iterator[TemplateSandbox]:
    it = TemplateSandbox()
    yield it
    it.close()


def draw(name: str | Path) -> None:
    Image.new("RGB", (20, 10), "teal").save(name)


def photograph(name: str | Path) -> None:
    """A picture with what cameras write, and what they never would."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Gogle\x1b[31m Inc.\n"
    exif[ExifTags.Base.Model] = "{row.city} {% for %} {{name}}"
    exif[ExifTags.Base.XPTitle] = "Über\u202eschrift\0".encode("utf-16-le")
    exif[ExifTags.Base.ImageDescription] = "x" * 5 * limits.EXIF_CHARACTERS
    more = exif.get_ifd(ExifTags.IFD.Exif)
    more[ExifTags.Base.DateTimeOriginal] = "2024:08:17 23:59:58"
    more[ExifTags.Base.FNumber] = 2.8
    more[ExifTags.Base.ISOSpeedRatings] = 400
    more[ExifTags.Base.UserComment] = b"ASCII\0\0\0by hand"
    more[ExifTags.Base.MakerNote] = bytes(range(256))
    where = exif.get_ifd(ExifTags.IFD.GPSInfo)
    where.update({1: "S", 2: (38.0, 30.0, 36.0), 3: "E", 4: (9.0, 15.0, 0.0)})
    Image.new("RGB", (40, 30), "red").save(name, exif=exif)


def rows_of(text: str) -> list[Row]:
    return [json.loads(line) for line in text.splitlines()]


def ask(run: Run, source: str, question: str, *options: str) -> list[str]:
    """The questions as they were asked."""
    result = run("batch", source, question, "--template-question", "-q", *options)
    assert result.exit_code == 0, result.stderr + result.stdout
    return [row.get("asked", row["question"]) for row in rows_of(result.stdout)]


# What stands in a question.


@for_each(
    ("question", "first", "second"),
    [
        ("{name} {stem} {folder} {path}", "a.jpg a cats a.jpg", "b.png b cats b.png"),
        ("{width} x {height}", "40 x 30", "20 x 10"),
        ("{date}", "2024-08-17", "2020-02-29"),
        ("{exif.Model or 'unknown'}?", "{row.city} {% for %} {{name}}?", "unknown?"),
        ("{exif['Make'] | default('no')}?", "Gogle Inc.?", "no?"),
        ("{exif.XPTitle or 1} {exif.UserComment or 2} {exif.MakerNote or 3}", "Überschrift by hand 3", "1 2 3"),
        ("{exif.FNumber or 0} {exif.ISOSpeedRatings or 0}", "2.8 400", "0 0"),
        ("{exif.GPSLatitude or 0} {exif.GPSLongitude or 0}", "-38.51 9.25", "0 0"),
        ("{exif.ImageDescription | default('') | length}", str(limits.EXIF_CHARACTERS), "0"),
        ("{name | upper} {% if width > 30 %}large{% else %}small{% endif %}", "A.JPG large", "B.PNG small"),
        ("{page or 'the only page'}", "the only page", "the only page"),
        ('{% raw %}{"json": 1}{% endraw %} {"{"}', '{"json": 1} {', '{"json": 1} {'),
        ("{[1, true]} } {# said to nobody #}.", "[1, true] } .", "[1, true] } ."),
    ],
)
def test_what_stands_in_a_question(question: str, first: str, second: str, run: Run, engine: Asked) -> None:
    engine.questions.clear()
    assert ask(run, "cats", question) == [first, second] == engine.questions


@for_each(
    ("source", "folder"),
    [("cats/a.jpg", "cats"), ("./cats/../cats/a.jpg", "cats"), ("cats", "cats"), (".", "cats"), ("cats/", "cats")],
)
def test_the_folder_is_the_one_that_a_picture_is_in(source: str, folder: str, run: Run) -> None:
    assert set(ask(run, source, "{folder}")) == {folder}


def test_strange_names_are_text(run: Run) -> None:
    os.makedirs(b"odd/{path}")
    draw("odd/{path}/{name}\u202e\x1b[2J.png")
    draw(b"odd/caf\xe9.png".decode("utf-8", "surrogateescape"))
    assert ask(run, "odd", "{folder}: {stem}") == ["odd: caf\ufffd", "{path}: {name}"]


def test_a_region_has_its_own_size_and_the_exif_of_its_picture(run: Run) -> None:
    asked = ask(run, "cats/a.jpg", "{exif.FNumber} {date} {width}x{height}", "--region", "0,0,50%,50%")
    assert asked == ["2.8 2024-08-17 20x15"]


def test_braces_are_text_unless_it_is_said(run: Run, engine: Asked) -> None:
    result = run("batch", "cats/a.jpg", 'what is {name} in {"a": {width}}?')
    assert engine.questions == ['what is {name} in {"a": {width}}?']
    assert "asked" not in rows_of(result.stdout)[0]
    assert "the question has {name}, {width} as text; --template-question fills fields in" in result.stderr
    assert run("batch", "cats/a.jpg", 'reply with {"shape": …} or {}').stderr.count("--template-question") == 0


# Rows.


def test_rows_keep_the_question_and_are_resumed_by_it(run: Run, engine: Asked) -> None:
    words = ("batch", "cats", "what is {name}?", "--template-question", "-o", "out.jsonl")
    assert run(*words).exit_code == 0
    whole = Path("out.jsonl").read_bytes()
    first, second = rows_of(whole.decode())
    assert (first["question"], first["asked"]) == ("what is {name}?", "what is a.jpg?")
    assert first["answer"] == "it was: what is a.jpg?" and first["flags"] == ["echoes_prompt"]
    Path("out.jsonl").write_bytes(whole[:-20])
    engine.questions.clear()
    result = run(*words, "--verify", "2")
    assert result.exit_code == 0 and Path("out.jsonl").read_bytes() == whole
    assert engine.questions == ["what is b.png?", "what is a.jpg?", "what is b.png?"]  # the first row was there
    assert "2 rows, asked alone: 0 differ" in result.stderr
    plain = run(*(word for word in words if word != "--template-question"))
    assert plain.exit_code == 65 and "template_question was" in plain.stderr
    assert second["asked"] == "what is b.png?"


def test_a_field_that_one_picture_lacks_is_the_error_of_its_row(run: Run) -> None:
    result = run("batch", "cats", "taken by {exif.Model}", "--template-question")
    first, second = rows_of(result.stdout)
    assert (result.exit_code, first["status"], second["status"]) == (1, "ok", "error")
    assert second["error"] == {"type": "BadData", "message": "it has no {exif.Model}"}
    assert second["question"] == "taken by {exif.Model}" and len(second["sha256"]) == 64


# Questions files.


def questions_file(*rows: Row) -> str:
    Path("questions.jsonl").write_text("".join(json.dumps({"image": "cats/a.jpg"} | row) + "\n" for row in rows))
    return "questions.jsonl"


def test_columns_of_a_row(run: Run) -> None:
    source = questions_file(
        {"row": {"city": "Lisbon", "two words": 2.0, "items": ["a", {"b": True}], "empty": ""}},
        {"row": {"city": "Porto\x1b[1m", "two words": 3.5, "items": []}},
    )
    question = "{row.city} {row['two words']} {row.items} {row.empty or 'nothing'}"
    asked = ['Lisbon 2 ["a", {"b": true}] nothing', "Porto 3.5 [] nothing"]
    assert ask(run, source, question) == asked
    assert ask(run, source, question, "-o", "out.jsonl") == []
    assert [row["asked"] for row in rows_of(Path("out.jsonl").read_text())] == asked


def test_questions_of_strangers_are_templates_only_if_it_is_said(run: Run, engine: Asked) -> None:
    source = questions_file({"question": "{name} {% bad"}, {"question": "{name}"})
    assert run("batch", source, "-q").exit_code == 0
    assert engine.questions == ["{name} {% bad", "{name}"]
    result = run("batch", source, "--template-question")
    assert result.exit_code == 65 and "line 1: QUESTION: as a template: " in result.stderr


def test_a_stranger_s_template_ends_in_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QUESTION_SECONDS", 1.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    result = run("batch", questions_file({"question": endless}, {"question": "{name}"}), "--template-question")
    first, second = rows_of(result.stdout)
    assert first["error"]["message"] == "its question cannot be filled in: takes longer than 1 s to fill in"
    assert second["asked"] == "a.jpg"


# What is wrong before anything is asked.


@for_each(
    ("question", "said"),
    [
        ("{nmae}", "llava: {nmae}: there is no such field\n  did you mean {name}?"),
        ("{nmae or 1}", "did you mean {name}?"),
        ("{xyzzy}", "the fields are: name, stem, "),
        ("{exif.Modle}", "{exif.Modle}: EXIF has no such value\n  did you mean {exif.Model}?"),
        ("{name | uper}", "no filter is called 'uper'; did you mean upper?"),
        ("{{name}}", "one brace on each side: {name}"),
        ('{"a": 1}', "{% raw %}…{% endraw %} around braces that are text"),
        ("{% if name %}", "QUESTION: as a template: unexpected end of template"),
        ("{", "QUESTION: as a template: "),
        ("{row.city}", "{row.city}: the pictures of this SOURCE have no columns"),
    ],
)
def test_what_no_question_can_have(question: str, said: str, run: Run, engine: Asked) -> None:
    for options in ((), ("-o", "out.jsonl")):
        result = run("batch", "cats", question, "--template-question", *options)
        assert (result.exit_code, result.stdout, engine.questions) == (2, "", []), result.stderr
        assert said in result.stderr


def test_a_column_that_no_row_has(run: Run, engine: Asked) -> None:
    source = questions_file({"row": {"city": "Lisbon"}}, {"row": {"a b": 1}})
    for options in ((), ("-o", "out.jsonl")):
        result = run("batch", source, "{row.citty or 1}", "--template-question", *options)
        assert (result.exit_code, engine.questions) == (2, [])
        assert "{row.citty}: no row has such a column\n  did you mean {row.city}?" in result.stderr
        assert 'did you mean {row["a b"]}?' in run("batch", source, "{row['ab']}", "--template-question").stderr


# Limits.


@for_each(
    "template",
    [
        "{'a' * 10 ** 10}",
        "{'x' | center(10 ** 11)}",
        "{% set x = namespace(v='a') %}{% for i in range(60) %}{% set x.v = x.v ~ x.v %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{''.__class__.__mro__[1].__subclasses__()}",
        "{'{0.__class__}'.format(name)}",
        "{" + "(" * 5000 + "1" + ")" * 5000 + "}",
        "{random(9)}",
        f"{{'a' * {limits.TEXT_CHARACTERS + 1}}}",
        "a" * (limits.TEXT_CHARACTERS + 1),
    ],
)
def test_a_hostile_template(template: str, sandbox: TemplateSandbox) -> None:
    with pytest.raises((TemplateRefused, Exception)) as raised:
        sandbox.render(template, {"name": "a"})
    assert len(str(raised.value)) <= limits.NAME_CHARACTERS and "\n" not in str(raised.value)
    assert sandbox.render("{name}", {"name": "b"}) == "b"  # others go on


def test_the_memory_of_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QUESTION_MEMORY", 2**28)
    sandbox = TemplateSandbox()
    with pytest.raises(TemplateRefused, match="takes too much memory"):
        sandbox.render("{('a' * 2 ** 28) | length}", {})
    sandbox.close()


def test_exif_that_is_broken_or_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, reader = Path("cats/a.jpg").read_bytes(), ExifReader()
    assert reader.read("a", whole)["FNumber"] == 2.8
    for data in (b"", b"\xff\xd8\xff", whole[:200], whole[:100] + bytes(60) + whole[160:], b"%PDF-1.4", b"GIF89a"):
        assert isinstance(reader.read("a", data), dict)
    monkeypatch.setattr(limits, "EXIF_BYTES", 100)
    with pytest.raises(BadImage, match="crashes what reads it"):
        reader.read("a", whole)
    monkeypatch.undo()
    monkeypatch.setattr(limits, "EXIF_SECONDS", 0.5)
    reader._workers[0] = Worker("helpers.hostile", limits.SANDBOX_MEMORY)
    with pytest.raises(BadImage, match=r"its EXIF takes longer than . s to read"):
        reader.read("a", bytes(REQUEST_HEADER.size) + b"SPIN")
    reader.close()


def test_what_reads_exif_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was taken over says what it likes: only known names with plain values count."""
    replies = [b'{"Model": {"a": 1}, "Evil": "b", "FNumber": 2, "ISO": [[1]]}', b"[1]", b"{", b"[" * 100_000]
    reader = ExifReader()
    monkeypatch.setattr(Worker, "ask", lambda *_: bytearray(replies.pop(0)))
    assert reader.read("a", b"") == {"FNumber": 2}
    assert reader.read("a", b"") == {}
    for _ in range(2):
        with pytest.raises(BadImage):
            reader.read("a", b"")


# Small parts.


def test_parameters_are_values_too() -> None:
    fields = QuestionFields({"lang": "{name}\x1b[1m"})
    assert fields.fill("{lang}", None) == "{name}"
    with pytest.raises(UsageError, match="every picture has a field of that name"):
        QuestionFields({"name": "x"})
    fields.close()


def test_fields_that_stand_in_a_plain_question() -> None:
    assert fields_in("{name} { exif.Model } {row['a b']} {nmae} {} {0} {\"name\": 1}") == ["name", "exif", "row"]
    assert all(fields_in(f"{{{field}}}") for field in FIELDS)
