"""Pages, frames and regions of files in `ask`, `check`, `prompt` and from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command import Run
from helpers.pages import animation, document, shapes
from helpers.pdf_bytes import many_pages_pdf
from helpers.tables import for_each
from PIL import Image

import llava_cli
from llava_cli import LlavaError, limits, load, open_pictures
from llava_cli.images.reader import looks_like_picture, split_source
from llava_cli.parts import WHOLE, Part

__all__ = ["animation", "document"]


@pytest.fixture
def here(document: Path, animation: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a document, an animation, a page by itself, and a picture that is called like a page."""
    monkeypatch.chdir(document.parent)
    shapes()[0].save("scan.tiff")
    shapes()[2].save("doc.pdf#3", "PNG")
    return document.parent


@for_each(
    "words, images, notes",
    [
        ("doc.pdf", "doc.pdf#1 doc.pdf#2 doc.pdf#3 doc.pdf#4", "doc.pdf: pages 1 to 4 of 6; --pages 1-6 takes all"),
        ("doc.pdf --pages 1-3", "doc.pdf#1 doc.pdf#2 doc.pdf#3", ""),
        ("doc.pdf --pages 6,2", "doc.pdf#6 doc.pdf#2", ""),
        ("doc.pdf --pages 5-9", "doc.pdf#5 doc.pdf#6", "doc.pdf: 6 pages; --pages 5-9 goes beyond that"),
        ("doc.pdf --pages 5-", "doc.pdf#5 doc.pdf#6", ""),
        ("doc.pdf#2 moving.gif#3 --pages 1", "doc.pdf#2 moving.gif#3", ""),
        ("doc.pdf#page=2", "doc.pdf#2", ""),
        ("doc.pdf#3", "doc.pdf#3", ""),  # a file of this name
        ("scan.tiff", "scan.tiff", ""),
        ("scan.tiff --pages 1", "scan.tiff", "--pages: none of the pictures has pages or frames"),
        ("scan.tiff --pages 2", "scan.tiff", "--pages: none of the pictures has pages or frames"),
        ("moving.gif --pages 3-5", "moving.gif#3", "moving.gif: 3 frames; --pages 3-5 goes beyond that"),
        ("moving.gif", "moving.gif", "moving.gif: the first of 3 frames; --frames 3 takes more"),
        ("moving.gif --frames 3", "moving.gif#1 moving.gif#2 moving.gif#3", ""),
        ("moving.gif --every 2s", "moving.gif#1 moving.gif#3", ""),
        ("moving.gif --pages 2", "moving.gif#2", ""),
        ("doc.pdf#3 --every 5s", "doc.pdf#3", "--every: none of the pictures has pages or frames"),
        ("doc.pdf --pages 1 --frames 2", "doc.pdf#1", "doc.pdf: a document, where --frames chooses nothing"),
    ],
)
def test_which_pictures(words: str, images: str, notes: str, here: Path, run: Run) -> None:
    result = run("ask", *words.split(), "what is this?", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["images"] == images.split()
    told = [line.removeprefix("llava: ") for line in result.stderr.splitlines() if line.startswith("llava: ")]
    assert told == [notes] * bool(notes)
    assert run("prompt", "-q", *words.split(), "what is this?").stdout.count("<image>") == len(images.split())


def test_more_pages_than_a_question_may_have(here: Path, run: Run) -> None:
    Path("long.pdf").write_bytes(many_pages_pdf(1000))
    note = "llava: long.pdf: pages 1 to 4 of 1,000; --pages 5-8 takes others"
    assert note in run("prompt", "long.pdf", "what is this?").stderr.splitlines()


def test_pages_are_shown_in_order(here: Path, run: Run) -> None:
    asked = run("ask", "-q", "doc.pdf", "--pages", "2,3", "what is this?")
    assert asked.stdout == "a green circle on a white background\n"  # the built-in model sees the last one
    asked = run("ask", "-q", "-", "--pages", "1", "what is this?", input=Path("doc.pdf").read_bytes())
    assert asked.stdout == "a red circle on a white background\n"
    assert run("check", "-q", "doc.pdf#2", "there is a circle").exit_code == 1


@for_each(
    "words, code, error",
    [
        ("doc.pdf --pages 7", 65, "doc.pdf: 6 pages, and --pages 7 names none of them\n  --pages 1-6"),
        ("gone.pdf#2", 66, "gone.pdf: no such file or directory"),
        ("moving.gif#9", 65, "moving.gif#9: no "),
        (
            "doc.pdf --region 5000,0,6000,100%",
            65,
            "doc.pdf#1: 834x834, without a region 5000,0,6000,100%\n  --region 0,0,50%,50%",
        ),
        (
            f"doc.pdf --pages {'1,' * limits.QUESTION_PICTURES}1",
            65,
            "doc.pdf: 101 pictures; a question has at most 100\n  --pages 1-4",
        ),
        (
            f"doc.pdf --pages {'1-,' * 10}1",
            65,
            "prompt: 3975 tokens; builtin reads at most 1024\n  61 pages or frames are in it; --pages 1-30 takes fewer",
        ),
        (
            "moving.gif --pages 1-,1-,1-,1-,1-,1-",
            65,
            "prompt: 1180 tokens; builtin reads at most 1024\n  18 pages or frames are in it; --pages 1-9 takes fewer",
        ),
    ],
)
def test_which_pictures_are_not_there(words: str, code: int, error: str, here: Path, run: Run) -> None:
    result = run("ask", "-q", *words.split(), "what is this?")
    assert (result.exit_code, result.stdout) == (code, "")
    assert f"llava: {error}" in result.stderr


def test_a_region_is_cut_in_full_resolution(here: Path, drawing: Path, run: Run) -> None:
    (left,) = open_pictures(str(drawing), region="0,0,50%,200")
    assert (left.image, left.region) == (Image.open(drawing).crop((0, 0, 150, 200)), "0,0,50%,200")
    view, expected = here / "view.png", here / "expected.png"
    left.image.save("left.png")
    assert run("prompt", drawing, "--region", "0,0,50%,200", "hm?", "--save-view", view).exit_code == 0
    assert run("prompt", "left.png", "hm?", "--save-view", expected).exit_code == 0
    assert Image.open(view) == Image.open(expected)
    asked = run("ask", "-q", drawing, "--region", "50%,0,100%,100%", "what is this?")
    assert asked.stdout == "a blue triangle on a white background\n"


def test_from_python(here: Path) -> None:
    assert llava_cli.open_pictures is open_pictures
    pictures = open_pictures("doc.pdf", pages="2-3")
    assert [picture.part for picture in pictures] == [Part(2), Part(3)]
    assert pictures[0].sha256 == pictures[1].sha256
    assert pictures[0].identity != pictures[1].identity
    assert [p.image for p in open_pictures(Path("doc.pdf").read_bytes(), pages="2-3")] == [p.image for p in pictures]
    assert open_pictures("doc.pdf", pages="1", dpi=72)[0].image.size == (400, 400)
    (corner,) = open_pictures(pictures[0], region="0,0,10,10")
    assert (corner.part, corner.image.size) == (Part(2), (10, 10))
    engine = load("builtin")
    assert engine.ask("doc.pdf#2", "what is this?").startswith("a blue ")
    assert engine.ask(open_pictures("doc.pdf", pages="1"), "what is this?") == "a red circle on a white background"
    with pytest.warns(UserWarning, match=r"^doc.pdf: pages 1 to 4 of 6"):
        engine.ask("doc.pdf", "what is this?")
    assert len(open_pictures("doc.pdf", pages="all")) > limits.ASK_PAGES
    with pytest.raises(LlavaError, match=r"^region: 'everything' is no region"):
        open_pictures("doc.pdf", region="everything")


def test_words_that_name_a_part(here: Path) -> None:
    Path("report 2.pdf").touch()
    assert all(map(looks_like_picture, ("doc.pdf#2", "gone.pdf#2", "clip.mp4#t=12.5", "report 2.pdf#1", "doc.pdf#3")))
    assert not any(map(looks_like_picture, ("what is #2", "which is it#2", "is it doc.pdf#x")))
    assert split_source("doc.pdf#3") == ("doc.pdf#3", WHOLE)
    assert split_source("doc.pdf#2") == ("doc.pdf", Part(2))
    assert split_source("https://example.org/a.pdf#page=2") == ("https://example.org/a.pdf", Part(2))
    assert split_source(f"{here.as_uri()}/doc.pdf#2") == (f"{here}/doc.pdf", Part(2))
    assert split_source(f"{here.as_uri()}/doc.pdf#3") == (f"{here}/doc.pdf#3", WHOLE)
    assert split_source("clip.mp4#t=12.5") == ("clip.mp4", Part(time=12.5))
