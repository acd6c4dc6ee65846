"""SOURCE as people give it to `llava batch`: judged by its content, nothing of it left out in silence.

| kind | example | own variants | right value | test |
|---|---|---|---|---|
| several words | `*.jpg "…"` | one picture, folders, both, `--question`, no ending | a row each, as typed | test_pictures_and_folders |
| no question | `a.png b.png` | folders, one picture, a glob in quotes | 2, names QUESTION | test_the_question_that_is_missing |
| words of no use | `photos describe it` | question first, list among pictures | one line, next command | test_words_that_make_no_source |
| goes on | pictures and `-o` | one more word, `--extend`, the folder of an old run | the rows of before | test_going_on |
| no text | zip | gz, tar, PDF, xlsx, parquet, HTML, LFS, NULs | 65, named with a command | test_files_that_are_no_source |
| marks | UTF-8's | UTF-16, UTF-32, both orders, list and questions | all rows | test_lists_in_any_encoding |
| ends of lines | CRLF | CR, none, blank lines, NUL, Latin-1 names | all rows | test_lists_with_any_ends |
| questions | on stdin | any name, array, CSV, TSV, `;`, array of paths | rows as of .jsonl | test_questions_under_any_name |
| JSON of others | over several lines | VQA's, too large an array | 65, jq's command | test_json_that_is_no_rows |
| other keys | `text` | `img`, `file_name`, `conversations`, columns | 65, the right key | test_keys_of_others |
| keys nobody reads | `text` beside QUESTION | `question_id`, many | one line, counts | test_keys_that_nobody_reads |
| twice | a question | a path, three times, resumed, old runs | a row a line, in order | test_what_is_there_twice |
| left out | linked folder | `.jfif`, `@eaDir`, hidden, endings | found, or one line | test_what_a_folder_has_besides |
| other names | a JPEG without an ending | `.txt`, `.jpg.1`, a cache's name | found, as `ask` opens it | test_a_picture_by_another_name_is_found_as_ask_opens_it |
| `file:` in lists | `file:///a%20b.png` | one slash, localhost, another host | opened; a row that says why | test_file_urls_in_a_list |
| unreadable | mode 000 | an error while it is read, the SOURCE itself | a note and 1; 66 | test_a_folder_that_cannot_be_read |
| known causes | `find -print0` | `-0` of lines, `-o -`, URL, `~`, -o as SOURCE | cause, command | test_causes_that_are_known |
| elsewhere | `ls photos` | a list beside its pictures, questions | names `--root` | test_paths_that_begin_elsewhere |
| pipes | `<(find …)` | questions, a named pipe, a stop | rows; a command to type again | test_pipes |
| no model | an empty folder | an empty list, bad line, all the above | said before one is loaded | test_nothing_is_loaded_for_nothing |
"""  # noqa: E501

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.faults import Told
from helpers.homes import home
from helpers.pdf_bytes import pages_pdf
from helpers.tables import for_each
from PIL import Image

from llava_cli import limits
from llava_cli.batch import run as module
from llava_cli.batch.journal import Journal
from llava_cli.batch.sources import folders, source_kinds
from llava_cli.images.reader import SUFFIXES

QUESTION = "what is this?"
Row = dict[str, Any]


def picture(number: int) -> bytes:
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


class Loads:
    """How many models were loaded."""

    count = 0


@pytest.fixture(autouse=True)
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loads]:
    """A folder to stand in, with a few pictures; the model is one that says anything."""
    found = Loads()

    def load(*_: object) -> Told:
        found.count += 1
        return Told()

    monkeypatch.setattr(module, "open_engine", load)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("a.png", "b.png", "photos/c.png", "photos/d.png", "more/e.png"):
        draw(name)
    yield found


def draw(name: str | Path) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), "teal").save(name, "PNG")


def rows_of(text: str | bytes) -> list[Row]:
    return [json.loads(line) for line in text.splitlines()]


def images(text: str | bytes) -> list[str]:
    rows = rows_of(text)
    assert all(row["status"] == "ok" for row in rows), rows
    return [row["image"] for row in rows]


def refused(result: Any, code: int, *said: str) -> None:
    """One line and perhaps a hint, before anything is answered."""
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) <= 2 and lines[0].startswith("llava: ") and (not lines[1:] or lines[1].startswith("  ")), lines
    assert all(words in result.stderr for words in said), result.stderr


# Words.


@for_each(
    ("words", "found"),
    [
        (["a.png", QUESTION], ["a.png"]),
        (["a.png", "b.png", QUESTION], ["a.png", "b.png"]),
        (["b.png", "a.png", "b.png", QUESTION], ["b.png", "a.png", "b.png"]),
        (["photos", "more", QUESTION], ["photos/c.png", "photos/d.png", "more/e.png"]),
        (["photos/", "a.png", QUESTION], ["photos/c.png", "photos/d.png", "a.png"]),
        (["a.png", "b.png", "--question", QUESTION], ["a.png", "b.png"]),
        (["a.png", "--question", QUESTION], ["a.png"]),
        (["*.png", QUESTION], ["a.png", "b.png"]),
        (["photos/?.png", "a.png", QUESTION], ["photos/c.png", "photos/d.png", "a.png"]),
        (["**/e.png", QUESTION], ["more/e.png"]),
        (["~/home.png", QUESTION], ["HOME/home.png"]),
        (["$HOME/home.png", QUESTION], ["HOME/home.png"]),
        (["file://HOME/home.png", QUESTION], ["HOME/home.png"]),
        (["no ending", QUESTION], ["no ending"]),
        (["a.png", "is it like b.png"], ["a.png"]),
        (["[1].png", QUESTION], ["[1].png"]),
        (["-", "a.png", QUESTION][1:], ["a.png"]),
    ],
    own=(home, loads),
)
def test_pictures_and_folders(words: list[str], found: list[str], run: Run, home: Path) -> None:
    draw(home / "home.png")
    draw("[1].png")
    Path("no ending").write_bytes(Path("a.png").read_bytes())
    if words[0] == "*.png":
        Path("[1].png").unlink()
    result = run("batch", *(word.replace("HOME", str(home)) if "file" in word else word for word in words))
    assert images(result.stdout) == [image.replace("HOME", str(home)) for image in found], result.stderr
    assert result.exit_code == 0


@for_each(
    "words",
    [["a.png"], ["a.png", "b.png"], ["photos", "more"], ["photos", "a.png"], ["photos/*.png"], ["photos"]],
    own=(loads,),
)
def test_the_question_that_is_missing(words: list[str], run: Run) -> None:
    way = "--question more" if words[-1] == "more" else "llava batch "
    refused(run("batch", *words), 2, "llava: QUESTION: there is none", way)


def test_a_question_that_is_a_files_name(run: Run) -> None:
    """It is taken for a SOURCE; how to ask it all the same is said, and works."""
    refused(run("batch", "photos", "more"), 2, "--question more asks it")
    rows = rows_of(run("batch", "photos", "--question", "more").stdout)
    assert [row["question"] for row in rows] == ["more", "more"]


@for_each(
    ("words", "code", "said"),
    [
        (["photos", "describe", "the", "photo"], 66, ["describe: no such file", "is in quotes: 'describe the "]),
        ([QUESTION, "a.png", "b.png"], 66, [f"{QUESTION}: no such file", "the question comes last"]),
        (["gone.png", "a.png", QUESTION], 66, ["gone.png: no such file"]),
        (["photos/*.jpg", QUESTION], 66, ["photos/*.jpg: no file has a name like that", "llava batch photos QUESTION"]),
        (["q.jsonl", "list.txt"], 2, ["QUESTION: there is none"]),
        (["-", "-", QUESTION], 2, ["-: it is there twice"]),
        (["a.png", "empty", QUESTION], 65, ["empty: its end is missing"]),
        (["x.zip"], 2, ["QUESTION: there is none"]),
        (["x.zip", QUESTION, "--root", "photos"], 2, ["--root: "]),
        (["s-{1..3}.zip", QUESTION], 66, ["s-1.zip: no such file"]),
        (["s-{1..1000000}.zip", QUESTION], 2, ["more than 100,000 names"]),
        (["a.png", QUESTION, "--root", "photos"], 2, ["--root: "]),
        (["https://example.org/a.png", QUESTION], 2, ["https://example.org/a.png: a URL", "--allow-urls"]),
        (["a.png", "http://example.org/", QUESTION], 2, ["http://example.org/: a URL"]),
        (["ftp://host/photos", QUESTION], 66, ["ftp://host/photos: a URL that is not read"]),
        (["/dev/null", QUESTION], 66, ["/dev/null: neither a file nor a folder"]),
    ],
    own=(loads,),
)
def test_words_that_make_no_source(words: list[str], code: int, said: list[str], run: Run, loads: Loads) -> None:
    Path("list.txt").write_text("a.png\n")
    Path("q.jsonl").write_text('{"image": "a.png", "question": "x?"}\n')
    Path("r.jsonl").write_text('{"image": "a.png", "question": "x?"}\n')
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.write("a.png")
    Path("empty").write_bytes(Path("x.zip").read_bytes()[:40])
    refused(run("batch", *words), code, *said)
    assert loads.count == 0


def test_a_pipe_that_is_called_like_a_picture(run: Run) -> None:
    """Nothing waits for its other end."""
    os.mkfifo("pipe.png")
    (row,) = rows_of(run("batch", "pipe.png", QUESTION).stdout)
    assert row["error"]["message"] == "not a regular file"


def test_a_url_that_is_allowed_is_a_picture(run: Run) -> None:
    (row,) = rows_of(run("batch", "http://127.0.0.1:9/a.png", QUESTION, "--allow-urls").stdout)
    assert row["error"]["message"] == "not a public address"


# Going on.


def test_going_on(run: Run, loads: Loads) -> None:
    command = ("batch", "a.png", "photos", QUESTION, "-o", "out.jsonl")
    assert run(*command).exit_code == 0
    before = Path("out.jsonl").read_bytes()
    assert images(before) == ["a.png", "photos/c.png", "photos/d.png"]
    assert run(*command).stderr.endswith("nothing left to do\n") and loads.count == 1
    more = ("batch", "a.png", "photos", "b.png", QUESTION, "-o", "out.jsonl")
    assert "1 rows were added to the source since and are left out" in run(*more).stderr
    assert Path("out.jsonl").read_bytes() == before
    assert run(*more, "--extend").exit_code == 0
    assert Path("out.jsonl").read_bytes().startswith(before)
    assert images(Path("out.jsonl").read_bytes()) == ["a.png", "photos/c.png", "photos/d.png", "b.png"]


def test_a_run_of_pictures_that_was_cut_off(run: Run) -> None:
    command = ("batch", "a.png", "b.png", "more", QUESTION, "-o", "out.jsonl")
    assert run(*command).exit_code == 0
    whole = Path("out.jsonl").read_bytes()
    os.truncate("out.jsonl", whole.index(b"\n") + 20)
    assert run(*command).exit_code == 0
    assert Path("out.jsonl").read_bytes() == whole


def test_a_manifest_of_pictures_names_no_others(run: Run) -> None:
    """Whoever put one beside an output chooses among the words and what is below them."""
    command = ("batch", "a.png", "photos", QUESTION, "-o", "out.jsonl")
    assert run(*command).exit_code == 0
    planted = ["b.png", "photos/../b.png", "/etc/passwd", "photos/c.png", "./a.png"]
    manifest = "".join(json.dumps({"image": image, "question": QUESTION}) + "\n" for image in planted)
    Path("out.jsonl.run/manifest").write_text(manifest)
    Path("out.jsonl").write_text("")
    assert run(*command).exit_code == 1
    rows = rows_of(Path("out.jsonl").read_bytes())
    assert [row["status"] for row in rows] == ["error", "error", "error", "ok", "ok"]


# What a file is.


def tar() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.add("a.png")
    return data.getvalue()


def zipped(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return data.getvalue()


FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "x.zip": (lambda: zipped("a.png")[:-1], "its end is missing\n  load it again, or repair it: zip -FF x.zip"),
    "x.tar": (lambda: b"\1" + tar()[1:], "is an archive that is damaged, or comes through a pipe\n  save it as a file"),
    "x.tar.gz": (lambda: gzip.compress(b"{}"), "is an archive that is damaged"),
    "q.jsonl.gz": (lambda: gzip.compress(b"{}"), "is compressed\n  gunzip -c q.jsonl.gz | llava batch - …"),
    "list.xz": (lambda: b"\xfd7zXZ\0" + bytes(20), "is compressed\n  xz -dc list.xz | llava batch - …"),
    "x.7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(20), "is an archive\n  7z x x.7z"),
    "x.rar": (lambda: b"Rar!\x1a\x07\1\0" + bytes(20), "is an archive\n  unrar x x.rar"),
    "x.mp3": (lambda: b"ID3\4" + bytes(20), "is a sound"),
    "x.xlsx": (lambda: zipped("[Content_Types].xml", "xl/workbook.xml"), "is a spreadsheet\n  save it as CSV"),
    "x.docx": (lambda: zipped("[Content_Types].xml", "word/document.xml"), "is a document of an office program"),
    "x.parquet": (lambda: b"PAR1\x15\4" + bytes(20), "damaged: parquet magic bytes not found in footer\n  load it"),
    "x.db": (lambda: b"SQLite format 3\0" + bytes(20), "is a database"),
    "x.html": (lambda: b"\n<!DOCTYPE html><html>", "is an HTML page"),
    "q.jsonl": (lambda: b"<html><body>sign in", "is an HTML page"),
    "list.txt": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a pointer of Git LFS"),
    "x.bin": (lambda: bytes(range(256)) * 4, "is binary, not pictures, a list or questions"),
    "paths": (lambda: b"./a.png\0./b.png\0", "has NUL bytes: its paths do not end in line ends\n  -0 says"),
    "utf-16": (
        lambda: "a.png\nb.png\n".encode("utf-16-le"),
        "is UTF-16 without a byte-order mark\n  iconv -f utf-16le",
    ),
    "utf-16be": (lambda: "a.png\nb.png\n".encode("utf-16-be"), "\n  iconv -f utf-16be -t utf-8 utf-16be | llava batch"),
}


@for_each("name", FOREIGN, own=(loads,))
def test_files_that_are_no_source(name: str, run: Run, loads: Loads) -> None:
    make, said = FOREIGN[name]
    Path(name).write_bytes(make())
    refused(run("batch", name, QUESTION), 65, f"llava: {name}: {said}" if said[0] != "\n" else said)
    refused(run("batch", name, QUESTION, "-o", "out.jsonl"), 65)
    assert loads.count == 0 and not Path("out.jsonl").exists()


@for_each("name", ["x.zip", "x.docx", "paths", "x.bin"], own=(loads,))
def test_the_same_on_stdin(name: str, run: Run, loads: Loads) -> None:
    data = zipped("a.png") if name == "x.zip" else FOREIGN[name][0]()
    refused(run("batch", "-", QUESTION, input=data), 65, "llava: -: ")
    assert loads.count == 0


@for_each("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"], own=(loads,))
def test_a_picture_under_any_name(kind: str, run: Run) -> None:
    Image.new("RGB", (20, 10), "teal").save("photo.txt", kind)
    rows = rows_of(run("batch", "photo.txt", QUESTION).stdout)
    assert [row["image"] for row in rows] == ["photo.txt"]
    refused(run("batch", "-", QUESTION, input=Path("photo.txt").read_bytes()), 2, "a picture on stdin", "llava ask -")


@for_each(
    "name",
    ["BMW/a.png", "GIF89a/a.png", "ID3/a.png", "PAR1/a.png", "GGUF/a.png", "II*/a.png", "[x/a.png", "{/a.png"],
    own=(loads,),
)
def test_names_that_begin_like_other_files(name: str, run: Run) -> None:
    draw(name)
    for ends in ("", "\n"):
        assert images(run("batch", "-", QUESTION, input=name + ends).stdout) == [name]


# Text.


MARKED = {"utf-8-sig": "utf-8-sig", "utf-16": "utf-16", "utf-32": "utf-32"}
ORDERS = {"utf-16-be": b"\xfe\xff", "utf-32-be": b"\0\0\xfe\xff"}


@for_each("encoding, ends", itertools.product([*MARKED, *ORDERS], ["\n", "\r\n", "\r"]), own=(loads,))
def test_lists_in_any_encoding(encoding: str, ends: str, run: Run) -> None:
    draw("é 漢.png")
    names = ["a.png", "é 漢.png", "b.png"]
    asked = [json.dumps({"image": name, "question": "ü?"}, ensure_ascii=False) for name in names]
    table = ["image,question", *(f"{name},ü?" for name in names)]
    for source, lines, options in (("list.txt", names, ["ü?"]), ("-", asked, []), ("list.txt", table, [])):
        data = ORDERS.get(encoding, b"") + (ends.join(lines) + ends).encode(encoding)
        Path("list.txt").write_bytes(data)
        result = run("batch", source, *options, input=data)
        assert [(row["image"], row["question"]) for row in rows_of(result.stdout)] == [(n, "ü?") for n in names]


@for_each(
    "data, where",
    itertools.product(
        [
            b"a.png\r\nb.png\r\n",
            b"a.png\rb.png\r",
            b"a.png\nb.png",
            b"\n\na.png\n\r\n\nb.png\n\n",
            b"a.png\r\nb.png\n",
        ],
        ["file", "stdin"],
    ),
    own=(loads,),
)
def test_lists_with_any_ends(data: bytes, where: str, run: Run) -> None:
    Path("list.txt").write_bytes(data)
    result = run("batch", "-" if where == "stdin" else "list.txt", QUESTION, input=data)
    assert images(result.stdout) == ["a.png", "b.png"]


def test_names_that_are_no_text(run: Run) -> None:
    """Bytes of Latin-1 stay bytes, in a list with NULs also line ends."""
    latin, lines = os.fsdecode(b"caf\xe9.png"), "two\nlines.png"
    draw(latin)
    draw(lines)
    assert images(run("batch", "-", QUESTION, input=b"caf\xe9.png\na.png\n").stdout) == [latin, "a.png"]
    for end in (b"", b"\0"):
        assert images(run("batch", "-", "-0", QUESTION, input=b"two\nlines.png" + end).stdout) == [lines]


def test_text_that_is_not_in_the_encoding_of_its_mark(run: Run, loads: Loads) -> None:
    Path("list.txt").write_bytes(b"\xff\xfea\0\n\0\0\xdc\0\0x\0")
    refused(run("batch", "list.txt", QUESTION, "-o", "out.jsonl"), 65, "damaged: it is not in UTF-16-LE")
    assert loads.count == 0


ROWS = [{"image": "a.png", "question": "one?", "id": "x"}, {"image": "b.png", "question": "two?", "id": "y"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
QUESTIONS = {
    "q.txt": LINES,
    "q": "\n\n" + LINES,
    "q.json": json.dumps(ROWS),
    "q2.json": json.dumps(ROWS, indent=2),
    "array": json.dumps(ROWS),
    "lines.json": LINES,
    "q.ndjson": LINES,
    "q.csv": "image,question,id\na.png,one?,x\nb.png,two?,y\n",
    "q2.csv": 'id;"image";question\r\nx;"a.png";one?\r\ny;b.png;"two?"\r\n',
    "q.tsv": "question\timage\tid\none?\ta.png\tx\n\ntwo?\tb.png\ty\n",
    "other.txt": "id\timage\tlicense\tquestion\nx\ta.png\t\tone?\ny\tb.png\t\ttwo?\n",
    "header.txt": "Image,Question,ID\na.png,one?,x\nb.png,two?,y",
}


@for_each("name", QUESTIONS, own=(loads,))
def test_questions_under_any_name(name: str, run: Run) -> None:
    wanted = [(row["image"], row["question"], row["id"]) for row in ROWS]
    text = QUESTIONS[name]
    Path(name).write_text(text, newline="")
    for result in (run("batch", name), run("batch", "-", input=text)):
        assert (result.exit_code, result.stderr.count("\n")) == (0, 1), result.stderr
        assert [(row["image"], row["question"], row["id"]) for row in rows_of(result.stdout)] == wanted
    for _ in range(2):
        assert run("batch", name, "-o", "out.jsonl").exit_code == 0
        assert len(rows_of(Path("out.jsonl").read_bytes())) == 2


def test_a_table_says_all_that_a_row_may(run: Run) -> None:
    Path("q.csv").write_text('image,question,max_tokens,answer,system\na.png,"a, ""b""\nc?",7,yes,Brief.\nb.png,,,,\n')
    first, second = rows_of(run("batch", "q.csv", QUESTION).stdout)
    assert (first["question"], first["expected"]) == ('a, "b"\nc?', "yes")
    assert (second["question"], "expected" in second) == (QUESTION, False)


def test_an_array_of_paths(run: Run) -> None:
    Path("q.json").write_text('["a.png", "b.png"]')
    assert images(run("batch", "q.json", QUESTION).stdout) == ["a.png", "b.png"]


def test_questions_lead_no_further_than_their_folder(run: Run) -> None:
    """Whatever they are called: on stdin no further than the current one."""
    for name, text in {
        "photos/q.txt": LINES,
        "photos/q.csv": QUESTIONS["q.csv"],
        "photos/q": QUESTIONS["q.json"],
    }.items():
        Path(name).write_text(text.replace("a.png", "../a.png").replace("b.png", "c.png"))
        first, second = rows_of(run("batch", name).stdout)
        assert (first["error"]["message"], second["status"]) == ("is outside photos", "ok")
    (row,) = rows_of(run("batch", "-", QUESTION, input='{"image": "/etc/passwd"}').stdout)
    assert row["error"]["message"] == "is outside the current folder"


VQA = {"info": {}, "questions": [{"image_id": 1, "question": "x?"}]}


@for_each(
    ("name", "text", "said"),
    [
        ("q.json", json.dumps(ROWS[0], indent=2), ["JSON over several lines", "jq -c . q.json | llava batch -"]),
        (
            "q.json",
            json.dumps(VQA, indent=2),
            ["JSON over several lines", "jq -c '.questions[]' q.json | llava batch -"],
        ),
        (
            "q.json",
            json.dumps(VQA),
            ["q.json, line 1: 'image' is missing", "jq -c '.questions[]' q.json | llava batch -"],
        ),
        ("q.json", "[1, 2", ["q.json: not JSON"]),
        ("q.json", '"a.png"', ["q.json: JSON, but no array of objects"]),
        ("q.json", "[[1]]", ["q.json, item 1: not a JSON object"]),
        ("q.json", json.dumps([{"img": "a.png"}]), ["q.json, item 1: 'image'", "jq -c '.[] | .image = .img' q.json"]),
        ("q.csv", "image,question\ncaf\udce9.png,x?\n", ["q.csv, line 2: not UTF-8", "iconv -f latin1 -t utf-8 q.csv"]),
        ("q.jsonl", '{"image": "caf\udce9.png"}\n', ["q.jsonl, line 1: not UTF-8", "iconv -f latin1 -t utf-8 q.jsonl"]),
        (
            "q.csv",
            "filename,label\na.png,x\n",
            ["none of its columns is 'image': 'filename', 'label'", "sed 1s/filename/image/ q"],
        ),
        ("q.csv", "a.png,x\nb.png,y\n", ["none of its columns is 'image'", "cut -d , -f 1 q.csv | llava batch -"]),
        ("q.csv", "x,y\n", ["none of its columns is 'image': 'x', 'y'", "image,question"]),
        ("q.csv", "image,question\na.png,\n", ["q.csv, line 2: 'question' is missing"]),
    ],
    own=(loads,),
)
def test_json_that_is_no_rows(name: str, text: str, said: list[str], run: Run, loads: Loads) -> None:
    Path(name).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(run("batch", name), 65, *said)
    assert loads.count == 0


def test_an_array_that_is_too_large(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROW_BYTES", 100)
    Path("q.json").write_text(json.dumps(ROWS * 10))
    refused(run("batch", "q.json"), 65, "q.json: larger than 100 bytes", "jq -c '.[]' q.json | llava batch -")
    Path("q.json").write_text(json.dumps({"questions": ROWS * 10}))
    refused(run("batch", "q.json"), 65, "line 1: larger than 100 bytes", "jq -c '.questions[]' q.json | llava batch -")


# Keys.


@for_each(
    ("row", "said"),
    [
        ({"image": "a.png", "text": "x?"}, ["'question' is missing; 'text' is ignored", ".question = .text"]),
        ({"image": "a.png", "prompt": "x?"}, ["'question' is missing; 'prompt' is ignored", ".question = .prompt"]),
        ({"img": "a.png", "question": "x?"}, ["'image' is missing; 'img' is ignored", ".image = .img"]),
        ({"image_path": "a.png", "question": "x?"}, ["'image' is missing; 'image_path' is ignored"]),
        ({"file_name": "a.png", "question": "x?"}, ["'image' is missing; 'file_name' is ignored"]),
        ({"Image File": "a.png", "question": "x?"}, ["'Image File' is ignored", '.image = .["Image File"]']),
        ({"Image": "a.png", "Question": "x?"}, ["'Image' is ignored", ".image = .Image | .question = .Question"]),
        (
            {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nx?"}]},
            ["'conversations' is ignored"],
        ),
        ({"image_id": 7, "question": "x?"}, ["'image_id' is ignored", '.image = "\\(.image_id).jpg"']),
        ({"image": "a.png", "\x1b[2J": 1}, ["'question' is missing"]),
    ],
    own=(loads,),
)
def test_keys_of_others(row: Row, said: list[str], run: Run, loads: Loads) -> None:
    Path("photos/q.jsonl").write_text(json.dumps(row) + "\n")
    result = run("batch", "photos/q.jsonl")
    refused(result, 65, "llava: photos/q.jsonl, line 1: ", *said)
    if "is ignored" in said[0]:
        assert result.stderr.endswith("photos/q.jsonl | llava batch - --root photos …\n")
    assert loads.count == 0


def test_keys_that_nobody_reads(run: Run) -> None:
    """Counted in one line; LLaVA's own layout beside a QUESTION is asked that, and said to be."""
    rows = [{"question_id": n, "image": "a.png", "text": "x?", "category": "conv"} for n in range(3)]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"image": "a.png", "none": None}]))
    wanted = (
        "llava: q.jsonl: ignored keys: 'question_id' (3 rows; 'id' is read), 'text' (3 rows; 'question' is read), "
        "'category' (3 rows)"
    )
    for options in ([], ["-o", "out.jsonl"]):
        result = run("batch", "q.jsonl", QUESTION, *options)
        first, _ = result.stderr.splitlines()
        assert first == wanted
    piped = run("batch", "-", QUESTION, input=Path("q.jsonl").read_bytes())
    assert piped.stderr.count("ignored keys") == 1 and "'text' (3 rows" in piped.stderr
    assert run("batch", "q.jsonl", QUESTION, "-q").stderr == ""


def test_many_keys_that_nobody_reads_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in them, and however many they are: some are counted."""
    monkeypatch.setattr(limits, "COUNTED_NAMES", 200)
    row = {"image": "a.png", **{f"{number}\x1b[2J\n" * 50: 1 for number in range(5000)}}
    Path("q.jsonl").write_text(json.dumps(row))
    first, _ = run("batch", "q.jsonl", QUESTION).stderr.splitlines()
    assert first.isprintable() and len(first) < 600 and first.endswith(" and 194 others")
    for number in range(300):
        Path(f"photos/x.{number}").touch()
    first, _ = run("batch", "photos", QUESTION).stderr.splitlines()
    assert first.startswith("llava: photos: 300 files are no pictures (100 others, 1 .") and len(first) < 600


# Nothing twice is lost.


TWICE = [("a.png", "x?", 1), ("a.png", "x?", 1), ("b.png", "x?", None), ("a.png", "x?", 1), ("b.png", "x?", None)]


def asked(tasks: list[tuple[str, str, Any]]) -> bytes:
    lines = ({"image": image, "question": question, "id": number} for image, question, number in tasks)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def test_what_is_there_twice(run: Run) -> None:
    """Each line has its row, in order; a run that was cut off ends with the same file, and what came is added."""
    Path("q.jsonl").write_bytes(asked(TWICE))
    whole = run("batch", "q.jsonl").stdout.encode()
    assert [(row["image"], row["question"], row.get("id")) for row in rows_of(whole)] == TWICE
    command = ("batch", "q.jsonl", "-o", "out.jsonl")
    assert run(*command).exit_code == 0
    ends = [number + 1 for number, byte in enumerate(whole) if byte == 10]
    for end in (0, *ends[:-1], ends[1] + 5):
        Path("out.jsonl").write_bytes(whole[:end])
        assert run(*command).exit_code == 0
        assert Path("out.jsonl").read_bytes() == whole
    assert run(*command).stderr.endswith("nothing left to do\n")
    Path("q.jsonl").write_bytes(asked([*TWICE, TWICE[0], ("b.png", "new?", None)]))
    assert "2 rows were added" in run(*command).stderr
    assert run(*command, "--extend").exit_code == 0
    rows = rows_of(Path("out.jsonl").read_bytes())
    assert [(row["image"], row["question"], row.get("id")) for row in rows[5:]] == [TWICE[0], ("b.png", "new?", None)]
    Path("q.jsonl").write_bytes(asked(TWICE[:1]))
    assert "6 rows are about what is no longer in it" in run(*command).stderr


def test_paths_that_are_there_twice(run: Run) -> None:
    listed = "a.png\nb.png\na.png\na.png\n"
    assert images(run("batch", "-", QUESTION, input=listed).stdout) == listed.split()
    assert run("batch", "-", QUESTION, "-o", "out.jsonl", input=listed).exit_code == 0
    assert images(Path("out.jsonl").read_bytes()) == listed.split()


def test_runs_of_before_go_on(run: Run) -> None:
    """Whose manifest has no task twice: what it has no row for was added, as far as it knows."""
    Path("q.jsonl").write_bytes(asked([TWICE[0], TWICE[2], ("photos/c.png", "x?", None)]))
    command = ("batch", "q.jsonl", "-o", "out.jsonl")
    assert run(*command).exit_code == 0
    whole = Path("out.jsonl").read_bytes()
    Path("q.jsonl").write_bytes(asked([*TWICE, ("photos/c.png", "x?", None)]))
    os.truncate("out.jsonl", whole.index(b"\n") + 1)
    result = run(*command)
    assert result.exit_code == 0
    assert "3 rows were added to the source since and are left out; --extend takes them in\n" in result.stderr
    assert Path("out.jsonl").read_bytes() == whole
    assert run(*command, "--extend").exit_code == 0
    assert len(rows_of(Path("out.jsonl").read_bytes())) == 6


def test_a_question_that_is_typed_twice_is_asked_once(run: Run) -> None:
    """Of each picture, whatever names it: it is the same wish, and no line of anybody's file."""
    Path("q.jsonl").write_text('{"image": "a.png"}\n' * 2)
    for source, count in (("q.jsonl", 2), ("photos", 2), ("a.png", 1)):
        rows = rows_of(run("batch", source, "--question", "x?", "--question", "x?").stdout)
        assert [row["question"] for row in rows] == ["x?"] * count


def test_many_lines_about_one_picture(run: Run, tmp_path: Path) -> None:
    """In time that does not grow with their square."""
    Path("q.jsonl").write_bytes(asked([TWICE[0]] * 3_000))
    assert run("batch", "q.jsonl", "-o", "out.jsonl", "-q").exit_code == 0
    assert Path("out.jsonl").read_bytes().count(b"\n") == 3_000


@for_each(
    "given, row",
    itertools.product(
        ["file://HERE/photos/c%20d.png", "file:HERE/photos/c%20d.png", "file://localhost/…"], [False, True]
    ),
    own=(loads,),
)
def test_file_urls_in_a_list(given: str, row: bool, run: Run) -> None:
    """What file managers and other programs export; a report shows their pictures, too."""
    draw("photos/c d.png")
    here = given.replace("/…", "HERE/photos/c%20d.png").replace("HERE", str(Path.cwd()))
    elsewhere = "file://nas/photos/c.png"
    lines = [json.dumps({"image": image, "question": QUESTION}) if row else image for image in (here, elsewhere)]
    Path("x.list").write_text("\n".join(lines))
    result = run("batch", "x.list", *([] if row else [QUESTION]), "-o", "out.jsonl")
    first, second = rows_of(Path("out.jsonl").read_bytes())
    assert (first["image"], first["status"]) == (here, "ok"), first
    assert second["status"] == "error" and "another machine (nas)" in second["error"]["message"], second
    assert "its first picture" not in result.stderr
    report = run("report", "out.jsonl")
    assert report.exit_code == 0 and "2 rows, 1 without their picture" in report.stderr, report.stderr
    assert "data:image/" in Path("out.html").read_text()


# Folders.


def test_what_a_folder_has_besides(run: Run) -> None:
    for name in ("notes.txt", "notes.doc", "two.txt", "none", ".hidden.png", "._c.png"):
        (Path("photos") / name).write_text("x")
    for folder in ("@eaDir/c.png", "sub/@eaDir/d.png", "$RECYCLE.BIN", "lost+found", "__MACOSX", "#recycle", ".git"):
        draw(f"photos/{folder}/x.png")
    Path("photos/link").symlink_to("../more")
    Path("photos/round").symlink_to(".")
    Path("photos/link.png").symlink_to("c.png")
    result = run("batch", "photos", QUESTION)
    assert images(result.stdout) == ["c.png", "d.png", "link.png"]
    first, _ = result.stderr.splitlines()
    assert first.startswith("llava: photos: 4 files are no pictures (")
    for part in ("2 .txt", "1 .doc", "1 without ending", "3 hidden names", "6 folders of the system's (", "@eaDir"):
        assert part in first
    assert "2 linked folders (" in first and "--include takes other names" in first
    assert first.endswith("a linked folder can be a SOURCE, too")
    assert run("batch", "photos", QUESTION, "-q").stderr == ""
    both = run("batch", "photos", "photos/link", QUESTION)
    assert images(both.stdout) == ["photos/c.png", "photos/d.png", "photos/link.png", "photos/link/e.png"]


@for_each(
    "kind, name",
    [("JPEG", "none"), ("PNG", "f_00a1b2"), ("GIF", "photo.jpg.1"), ("WEBP", "photo.txt"), ("BMP", "none")],
    own=(loads,),
)
def test_a_picture_by_another_name_is_found_as_ask_opens_it(kind: str, name: str, run: Run) -> None:
    Image.new("RGB", (20, 20), "red").save(Path("photos") / name, kind)
    os.mkfifo("photos/pipe")
    (Path("photos") / "short").write_bytes(b"\xff")
    result = run("batch", "photos", QUESTION)
    assert images(result.stdout) == sorted(["c.png", "d.png", name])
    assert "2 files are no pictures (2 without ending)" in result.stderr
    assert run("ask", f"photos/{name}", QUESTION).exit_code == 0
    only = run("batch", "photos", QUESTION, "--include", "*.png")
    assert images(only.stdout) == ["c.png", "d.png"]


def test_a_folder_of_pictures_alone_is_not_spoken_of(run: Run) -> None:
    for _ in range(2):
        result = run("batch", "photos", QUESTION, "-o", "out.jsonl")
        assert (result.exit_code, result.stderr.count("\n")) == (0, 1)


def test_one_thing_passed_over(run: Run) -> None:
    Path("photos/x.txt").touch()
    result = run("batch", "photos", QUESTION)
    assert result.stderr.startswith("llava: photos: 1 file is no picture (1 .txt); --include takes other names\n")
    Path("photos/x.txt").rename("photos/@eaDir")
    assert "1 file is no picture (1 without ending)" in run("batch", "photos", QUESTION).stderr


def test_a_system_folder_that_is_named_is_taken(run: Run) -> None:
    draw("photos/@eaDir/x.png")
    assert images(run("batch", "photos/@eaDir", QUESTION).stdout) == ["x.png"]


@for_each("ending", SUFFIXES, own=(loads,))
def test_what_ask_opens_is_found(ending: str, run: Run) -> None:
    for name in (f"set/x{ending}", f"set/sub/Y{ending.upper()}"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), "teal").save(name, "JPEG")
    rows = rows_of(run("batch", "set", QUESTION).stdout)
    assert len(rows) == 2


def fail_below(folder: str, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Makes a folder one that cannot be read, at once or once its first name is read."""
    scandir = os.scandir

    class Failing:
        def __init__(self, path: str) -> None:
            self.entries = scandir(path)

        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *error: object) -> None:
            self.entries.close()

        def __iter__(self) -> Iterator[os.DirEntry[str]]:
            yield next(self.entries)
            raise OSError(5, "Input/output error", folder)

    def opened(path: str) -> Any:
        if not str(path).rstrip("/").endswith(folder):
            return scandir(path)
        if when == "at once":
            raise PermissionError(13, "Permission denied", path)
        return Failing(path)

    monkeypatch.setattr(folders.os, "scandir", opened)


@for_each("when, output", itertools.product(["at once", "later"], [[], ["-o", "out.jsonl"]]), own=(loads,))
def test_a_folder_that_cannot_be_read(when: str, output: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are answered, it is said, and the exit code is that of rows that could not be had."""
    draw("photos/locked/x.png")
    with monkeypatch.context() as patch:
        fail_below("locked", patch, when)
        for _ in range(2):
            result = run("batch", "photos", QUESTION, *output)
            assert result.exit_code == 1
            reason = "permission denied" if when == "at once" else "input/output error"
            assert f"llava: photos: 1 folder cannot be read (locked: {reason})\n" in result.stderr
            found = images(result.stdout or Path("out.jsonl").read_bytes())
            assert found == ["c.png", "d.png", *["locked/x.png"] * (when == "later")]
        fail_below("photos", patch, "at once")
        refused(run("batch", "photos", QUESTION), 66, "llava: photos: permission denied")
    result = run("batch", "photos", QUESTION, *output)
    assert result.exit_code == 0


def test_a_folder_of_mode_000(run: Run) -> None:
    """As it is for who may not read it; who may, as root does, has all rows."""
    draw("photos/locked/x.png")
    os.chmod("photos/locked", 0)
    may = os.access("photos/locked", os.R_OK)
    try:
        result = run("batch", "photos", QUESTION)
    finally:
        os.chmod("photos/locked", 0o700)
    assert (result.exit_code, len(images(result.stdout))) == ((0, 3) if may else (1, 2))


# Causes that are known.


@for_each(
    ("words", "given", "code", "said"),
    [
        (["-", QUESTION], b"./a.png\0./b.png\0", 65, ["-0 says that paths end in NUL"]),
        (["-", QUESTION, "-0"], b"a.png\nb.png\n", 2, ["-0: the paths of - end in line ends", "leave out -0"]),
        (["list.txt", QUESTION, "-0"], None, 2, ["-0: the paths of list.txt end in line ends"]),
        (["list.txt", QUESTION, "-o", "list.txt"], None, 2, ["-o: list.txt is a SOURCE"]),
        (["a.png", "b.png", QUESTION, "-o", "./b.png"], None, 2, ["-o: b.png is a SOURCE"]),
        (["photos", QUESTION, "-o", "more"], None, 73, ["more: a folder", "-o more/out.jsonl"]),
        (["photos", QUESTION, "-o", "-", "--extend"], None, 2, ["--extend"]),
        (["photos/c.jpg", QUESTION], None, 66, ["photos/c.jpg: no such file"]),
    ],
    own=(loads,),
)
def test_causes_that_are_known(
    words: list[str], given: bytes | None, code: int, said: list[str], run: Run, loads: Loads
) -> None:
    Path("list.txt").write_text("a.png\nb.png\n")
    before = sorted(Path().rglob("*"))
    refused(run("batch", *words, input=given), code, *said)
    assert (loads.count, sorted(Path().rglob("*"))) == (0, before)


def test_o_minus_is_stdout(run: Run) -> None:
    before = sorted(Path().rglob("*"))
    assert images(run("batch", "photos", QUESTION, "-o", "-").stdout) == ["c.png", "d.png"]
    assert sorted(Path().rglob("*")) == before


def test_paths_that_begin_elsewhere(run: Run) -> None:
    """Rows of errors, as ever; and before them, one line with the way out."""
    Path("photos/list.txt").write_text("c.png\nd.png\n")
    Path("more/q.jsonl").write_text('{"image": "a.png"}\n')
    for words, given, said in (
        (["photos/list.txt"], None, "c.png, is not in the current folder; --root photos has it"),
        (["-"], "c.png\n", "c.png, is not in the current folder; --root FOLDER names where its paths begin"),
        (["more/q.jsonl"], None, "a.png, is not in more; --root . has it"),
    ):
        result = run("batch", *words, QUESTION, input=given)
        assert result.exit_code == 1
        assert any(line.endswith(f"its first picture, {said}") for line in result.stderr.splitlines()), result.stderr
    assert run("batch", "photos/list.txt", QUESTION, "--root", "photos").exit_code == 0
    assert "--root" not in run("batch", "-", QUESTION, input="a.png\ngone.png\n").stderr


def feed(path: str, data: bytes) -> threading.Thread:
    """Writes to a pipe once somebody reads it."""
    thread = threading.Thread(target=lambda: Path(path).write_bytes(data), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("data", [b"a.png\nb.png\n", LINES.encode(), QUESTIONS["q.csv"].encode()])
def test_pipes(data: bytes, run: Run) -> None:
    """Read once; what is in them begins in the current folder."""
    os.mkfifo("photos/pipe")
    for output in ([], ["-o", "out.jsonl"], ["-o", "out.jsonl"]):
        writer = feed("photos/pipe", data)
        result = run("batch", "photos/pipe", *([QUESTION] if data.startswith(b"a") else []), *output)
        writer.join(60)
        assert result.exit_code == 0, result.stderr
        assert images(result.stdout or Path("out.jsonl").read_bytes()) == ["a.png", "b.png"]


def test_a_command_with_a_substitution_can_be_typed_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that a shell made for a pipe is gone with it."""
    reading, writing = os.pipe()
    os.write(writing, b"a.png\nb.png\n")
    os.close(writing)
    name = f"/dev/fd/{reading}"
    words = ["batch", name, QUESTION, "-o", "out.jsonl"]
    monkeypatch.setattr("sys.argv", ["llava", *words])
    stop = Journal.append

    def stopped(self: Journal, row: Row) -> None:
        stop(self, row)
        os.kill(os.getpid(), 15)

    monkeypatch.setattr(Journal, "append", stopped)
    result = run(*words)
    os.close(reading)
    assert result.exit_code == 143
    assert result.stderr.endswith(
        f"stopped; to go on:\n  llava batch '<(…)' '{QUESTION}' -o out.jsonl\n".replace("'<(…)'", "<(…)")
    )


# Before a model is loaded.


@for_each(
    ("make", "code", "said"),
    [
        (lambda: Path("it").mkdir(), 66, "llava: it: an empty folder\n"),
        (lambda: draw("it/.hidden.png"), 66, "llava: it: no pictures in it\n"),
        (lambda: Path("it").write_text(""), 66, "llava: it: there is nothing to ask about in it\n"),
        (lambda: Path("it").write_text("\n\n"), 66, "llava: it: there is nothing to ask about in it\n"),
        (lambda: Path("it").write_text("[]"), 66, "llava: it: there is nothing to ask about in it\n"),
        (lambda: Path("it").write_text(LINES + "{\n"), 65, "llava: it, line 3: not JSON\n"),
        (lambda: Path("it").write_text(LINES + '{"img": 1}\n'), 65, "llava: it, line 3: 'image' is missing; 'img'"),
    ],
    own=(loads,),
)
def test_nothing_is_loaded_for_nothing(
    make: Callable[[], object], code: int, said: str, run: Run, loads: Loads
) -> None:
    make()
    for output in ([], ["-o", "out.jsonl"]):
        result = run("batch", "it", QUESTION, *output)
        assert (result.exit_code, result.stdout) == (code, "")
        assert said in result.stderr
        assert loads.count == 0


def test_stdin_is_looked_at_first(run: Run, loads: Loads) -> None:
    refused(run("batch", "-", input='{"image": "a.png"}\n'), 65, "-, line 1: 'question' is missing")
    assert loads.count == 0
    assert (run("batch", "-", QUESTION, input="").exit_code, loads.count) == (0, 0)


@pytest.mark.parametrize("name", ["a.png", "scan.pdf#1"])
def test_a_signed_url_is_fetched_and_its_secrets_are_nowhere(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()
    base, _, page = name.partition("#")
    signed = f"https://user:hunter2@example.org/{base}?X-Amz-Signature=abcdef" + (f"#{page}" if page else "")

    def read(url: str, public: bool) -> bytes:
        asked.append(url)
        return picture(1) if base.endswith("png") else pages_pdf(b"")

    monkeypatch.setattr(source_kinds, "read", read)
    run("batch", signed, QUESTION, "-o", "out.jsonl", "--allow-urls")
    row = json.loads(Path("out.jsonl").read_text())
    assert (row["status"], row["image"]) == ("ok", f"https://example.org/{base}")
    assert row.get("page") == (int(page) if page else None)
    assert set(asked) == {signed.partition("#")[0]}
    for path in Path().glob("out.jsonl*/**/*"):
        assert not path.is_file() or not any(word in path.read_text() for word in ("hunter2", "abcdef"))
    same = run("batch", signed, signed.replace("abcdef", "other"), QUESTION, "--allow-urls")
    assert "two URLs differ only behind `?`" in same.stderr


def test_a_run_that_cannot_begin_leaves_nothing(run: Run) -> None:
    Path("a.png").write_bytes(picture(1))
    Path("q.csv").write_text("image,city\na.png,Rome\n")
    Path("bad.jsonl").write_text('{"image": "a.png"}\n')
    unknown = ("q.csv", "in {row.town}?", "--template-question")
    for words in (unknown, ("bad.jsonl",), (*unknown, "--shard", "1/2"), ("bad.jsonl", "--shard", "1/2")):
        assert run("batch", *words, "-o", "out.jsonl").exit_code in (2, 65)
        assert not list(Path().glob("out.jsonl*"))
    Path("out.jsonl").touch()
    run("batch", *unknown, "-o", "out.jsonl")
    assert Path("out.jsonl").exists()
