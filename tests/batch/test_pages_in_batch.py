"""A batch over files of several pictures: a row for each page or frame, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.faults import Told
from helpers.pdf_bytes import encrypted_pdf, many_pages_pdf, text_pdf
from helpers.picture_bytes import encoded, frames, noise
from helpers.tables import for_each

from llava_cli import limits, regular_files
from llava_cli.batch import run as module
from llava_cli.batch.sources.parts_of_tasks import LeftOut, with_parts
from llava_cli.batch.sources.source import Source
from llava_cli.batch.tasks import Task
from llava_cli.settings import PictureOptions

pytest.importorskip("pypdfium2")
QUESTION = "what is this?"
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to stand in, with a document; the model is one that says anything."""
    monkeypatch.setattr(module, "open_engine", lambda *_: Told())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("doc.pdf").write_bytes(text_pdf("one", "two", "three"))
    yield tmp_path / "here"


def rows_of(text: str) -> list[Row]:
    return [json.loads(line) for line in text.splitlines()]


def places(run: Run, *words: str, **options: Any) -> list[tuple[str, int | None]]:
    """The file and the page of each row, all of which are answered."""
    result = run("batch", *words, "-q", **options)
    rows = rows_of(result.stdout)
    assert result.exit_code == 0 and all(row["status"] == "ok" for row in rows), (rows, result.stderr)
    return [(row["image"], row.get("page")) for row in rows]


@for_each(
    ("words", "pages"),
    [
        (["doc.pdf"], [1, 2, 3]),
        (["doc.pdf", "--pages", "2-"], [2, 3]),
        (["doc.pdf", "--pages", "3,1"], [3, 1]),
        (["doc.pdf", "--pages", "2-9"], [2, 3]),
        (["doc.pdf#2"], [2]),
        (["doc.pdf#page=3", "doc.pdf#1"], [3, 1]),
        (["./d*.pdf#2"], [2]),
    ],
    own=(folder,),
)
def test_pages_of_a_document(words: list[str], pages: list[int], run: Run) -> None:
    found = places(run, *words, "--question", QUESTION)
    assert [page for _, page in found] == pages
    assert {Path(image).name for image, _ in found} == {"doc.pdf"}


def test_a_folder_of_documents_just_works(run: Run, folder: Path) -> None:
    Path("docs").mkdir()
    for name, data in {
        "a.pdf": text_pdf("one", "two"),
        "b.tif": frames("TIFF"),
        "c": text_pdf("three", "four"),  # known by its first bytes
        "d.gif": frames("GIF"),
        "e.jpg": encoded(noise(), "JPEG"),
        "f": encoded(noise(), "AVIF"),
        "g.tiff": encoded(noise(), "TIFF"),
    }.items():
        Path("docs", name).write_bytes(data)
    pages = [("a.pdf", 1), ("a.pdf", 2), *(("b.tif", page) for page in (1, 2, 3)), ("c", 1), ("c", 2)]
    whole = [(name, None) for name in ("d.gif", "e.jpg", "f", "g.tiff")]
    assert places(run, "docs", QUESTION) == [*pages, *whole]
    few = places(run, "docs", QUESTION, "--pages", "2")
    assert few == [("a.pdf", 2), ("b.tif", 2), ("c", 2), ("d.gif", 2), *whole[1:]]


def test_frames_of_an_animation(run: Run) -> None:
    Path("a.gif").write_bytes(frames("GIF"))
    assert places(run, "a.gif", QUESTION) == [("a.gif", None)]
    assert places(run, "a.gif", QUESTION, "--frames", "2") == [("a.gif", 1), ("a.gif", 3)]
    assert places(run, "a.gif", QUESTION, "--every", "0.1") == [("a.gif", 1), ("a.gif", 2), ("a.gif", 3)]
    assert places(run, "a.gif#2", QUESTION) == [("a.gif", 2)]


def test_all_questions_about_a_page_come_before_the_next_page(run: Run) -> None:
    result = run("batch", "doc.pdf", "--pages", "1-2", "--question", "a?", "--question", "b?", "-q")
    asked = [(row["page"], row["question"]) for row in rows_of(result.stdout)]
    assert asked == [(1, "a?"), (1, "b?"), (2, "a?"), (2, "b?")]


def test_references_in_lists_and_files_of_questions(run: Run, folder: Path) -> None:
    Path("real.pdf#2").write_bytes(text_pdf("this is its name"))
    Path("real.pdf").write_bytes(text_pdf("one", "two"))
    url = f"file://{folder}/doc.pdf"
    listed = ["doc.pdf#2", "real.pdf#2", f"{url}#page=3", "doc.pdf"]
    wanted = [("doc.pdf", 2), ("real.pdf#2", None), (url, 3), *(("doc.pdf", page) for page in (1, 2, 3))]
    Path("list.txt").write_text("\n".join(listed))
    found = places(run, "list.txt", QUESTION)
    assert [pair for pair in found if pair[0] != "real.pdf#2"] == [pair for pair in wanted if pair[0] != "real.pdf#2"]
    assert ("real.pdf#2", 1) in found  # a document of one page
    Path("q.jsonl").write_text("".join(json.dumps({"image": name, "question": "q?"}) + "\n" for name in listed[:2]))
    assert places(run, "q.jsonl") == [("doc.pdf", 2), ("real.pdf#2", 1)]


@for_each(
    ("words", "page", "message"),
    [
        (["doc.pdf", "--pages", "7-9"], 7, "no page 7: it has 3 pages"),
        (["doc.pdf#9"], 9, "no page 9: it has 3 pages"),
        (["locked.pdf"], None, "needs a password"),
        (["cut.pdf"], None, "a damaged PDF"),
    ],
    own=(folder,),
)
def test_what_is_not_there_is_one_row(words: list[str], page: int | None, message: str, run: Run) -> None:
    Path("locked.pdf").write_bytes(encrypted_pdf(b"word"))
    Path("cut.pdf").write_bytes(text_pdf("one")[:200])
    result = run("batch", *words, "--question", QUESTION, "-q")
    (row,) = rows_of(result.stdout)
    assert result.exit_code == 1
    assert (row.get("page"), row["error"]) == (page, {"type": "BadImage", "message": message})


def test_no_more_pages_than_the_limit_are_asked_about_and_it_is_said(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PAGES", 3)
    Path("many.pdf").write_bytes(many_pages_pdf(1_000_000))
    result = run("batch", "many.pdf", QUESTION)
    assert [row["page"] for row in rows_of(result.stdout)] == [1, 2, 3]
    assert "many.pdf: only 3 of its pages are asked about; --pages 4- asks about the rest" in result.stderr


def test_a_run_over_pages_goes_on(run: Run, folder: Path) -> None:
    command = ("batch", "doc.pdf", QUESTION, "-o", "out.jsonl", "-q")
    assert run(*command).exit_code == 0
    whole = Path("out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    Path("out.jsonl").write_bytes(b"".join(lines[:1]))
    assert run(*command).exit_code == 0
    assert Path("out.jsonl").read_bytes() == whole
    assert len({json.loads(line)["sha256"] for line in lines}) == 1  # of the file


def test_photos_are_not_opened_to_see_how_many_pictures_they_have(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("photos").mkdir()
    for number in range(20):
        Path("photos", f"{number:02}.jpg").write_bytes(b"not looked at")

    def refuse(*_: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(regular_files, "open_regular", refuse)
    tasks = list(Source(["photos"], [QUESTION]).tasks())
    assert len(tasks) == 20 and all(task.page is None for task in tasks)


def test_a_picture_is_passed_on_before_the_next_one_comes() -> None:
    """A list may be typed, or be the output of a slow program."""
    read = 0

    def tasks() -> Iterator[Task]:
        nonlocal read
        for name in ("a.jpg", "b.jpg"):
            read += 1
            yield Task(name, QUESTION)

    found = with_parts(tasks(), lambda image: Path(image), PictureOptions(), LeftOut())
    assert next(found).image == "a.jpg" and read == 1


def test_a_file_is_looked_for_once_to_see_how_many_pictures_it_has() -> None:
    """It may be read from the beginning of an archive, or over a network."""
    for name in ("document", "other.pdf", "third"):
        Path(name).write_bytes(text_pdf("one", "two"))
    looked_for = []

    def find(image: str) -> Path:
        looked_for.append(image)
        return Path(image)

    names = ["document", "document", "other.pdf", "third", "third"]
    found = with_parts((Task(name, QUESTION) for name in names), find, PictureOptions(), LeftOut())
    assert [task.page for task in found] == [1, 1, 2, 2, 1, 2, 1, 1, 2, 2]
    assert looked_for == ["document", "other.pdf", "third"]


def test_a_document_that_is_mended_has_each_page_once(run: Run) -> None:
    """What was one row about a file that could not be read stays; its pages are added."""
    whole = Path("doc.pdf").read_bytes()
    Path("papers").mkdir()
    Path("papers/doc.pdf").write_bytes(whole[:40])
    command = ("batch", "papers", QUESTION, "-o", "out.jsonl")
    assert run(*command).exit_code == 1
    Path("papers/doc.pdf").write_bytes(whole)
    assert run(*command, "--extend", "--retry-errors").exit_code == 1
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [(row["status"], row.get("page")) for row in rows] == [("error", None), ("ok", 1), ("ok", 2), ("ok", 3)]
