"""Pages, regions, the clipboard and the screen in a chat, and what is kept of them."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from helpers.command import Run
from helpers.desktop import HEIGHT, WIDTH, Copy, copy, display
from helpers.pages import animation, document
from helpers.tables import for_each
from PIL import Image

from llava_cli import open_picture, open_pictures
from llava_cli.chat.store import Store

__all__ = ["animation", "copy", "display", "document"]


def chat(run: Run, *lines: str, words: tuple[str | Path, ...] = ()) -> tuple[list[str], list[str]]:
    """What `llava chat WORDS` prints and notes for these lines."""
    result = run("chat", *words, input="\n".join(lines))
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines(), [line for line in result.stderr.splitlines() if "demonstration" not in line]


def test_pages_of_a_document(run: Run, document: Path, animation: Path) -> None:
    lines = ["/images", f"/image {document}#2 {animation} --frames 2 what is this?", "/images"]
    printed, noted = chat(run, f"/image {document} --pages 5- --dpi=72", *lines)
    assert noted == [
        f"{document}#5 (400x400) goes with the next question",
        f"{document}#6 (400x400) goes with the next question",
    ]
    assert printed[:2] == [
        f"{document}#5 (400x400) with the next question",
        f"{document}#6 (400x400) with the next question",
    ]
    assert printed[2].startswith("a green circle")
    assert [line.split(" ")[0] for line in printed[3:]] == [
        *(f"{document}#{page}" for page in (5, 6, 2)),
        *(f"{animation}#{frame}" for frame in (1, 3)),
    ]
    _, noted = chat(run, f"/image {document}", words=("-q", document, "--pages", "6"))
    assert noted == []
    _, noted = chat(run, f"/image {document}", words=(document, "--pages", "6"))  # that is said of the first file only
    assert noted[-1] == f"{document}: pages 1 to 4 of 6; --pages 1-6 takes all"


def test_a_region_of_the_last_picture(run: Run, drawing: Path) -> None:
    printed, noted = chat(
        run,
        "/region",
        "/region 0,0,120,100%",
        "what is this?",
        "/region 50%, 0, 100%, 100% what is this?",
        "/images",
        words=(drawing,),
    )
    assert printed[0].startswith("/region LEFT,TOP,RIGHT,BOTTOM [QUESTION]")
    assert printed[2:] == [
        "a red circle on a white background",
        "a blue triangle on a white background",
        f"{drawing} at 0,0,120,100% (120x200) with question 1",
        f"{drawing} at 50%,0,100%,100% (150x200) with question 2",
    ]
    assert noted == [f"{drawing} at 0,0,120,100% (120x200) goes with the next question, in the place of all of it"]


@for_each(
    "line, code, error",
    [
        ("/region 0,0,9,9", 2, "/region: there is no picture yet\n  /image PATH"),
        ("/image {0}\n/region 0,0,9", 2, "/region: '0,0,9' is no region: left,top,right,bottom\n  /region 0,0,50%,50%"),
        ("/image {0}\n/region 900,0,999,9", 65, "{0}: 300x200, without a region 900,0,999,9\n  /region 0,0,50%,50%"),
        ("/image {0} --dpi many", 2, "--dpi: 'many' is not a whole number"),
        ("/image {0} --frames 2 --every 5s", 2, "--every: --frames says already which frames"),
    ],
)
def test_what_is_no_region(line: str, code: int, error: str, run: Run, drawing: Path) -> None:
    result = run("chat", "-q", input=line.format(drawing))
    assert (result.exit_code, result.stdout) == (code, "")
    assert f"llava: {error.format(drawing)}" in result.stderr


def test_what_is_kept_of_parts(
    run: Run, document: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages and regions are kept as they were seen, also where the document is gone."""
    monkeypatch.chdir(tmp_path)
    chat(run, f"/image {document} --pages 2,3", "what is this?", "/region 0,0,50%,50%", "and this?")
    labels = [f"{document}#2", f"{document}#3", f"{document}#3 at 0,0,50%,50%"]
    assert [line[1:-1] for line in run("chats", "show", "1").stdout.splitlines() if line[:1] == "["] == labels
    pages = open_pictures(str(document), pages="2,3")
    document.rename(tmp_path / "moved.pdf")
    loaded = Store().load(1).pictures
    assert [picture.label for picture in loaded] == labels
    assert [picture.sha256 for picture in loaded] == [pages[0].sha256] * 3
    assert [picture.identity for picture in loaded[:2]] == [picture.identity for picture in pages]
    assert [picture.image for picture in loaded[:2]] == [picture.image for picture in pages]
    printed, _ = chat(run, "/images", "/export out.md", "/save out.json", words=("--continue",))
    assert printed == [
        f"{label} ({s}x{s}) with question {n}" for label, s, n in zip(labels, (834, 834, 417), (1, 1, 2), strict=True)
    ]
    assert Path("out.md").read_text().count("](out_pictures/") == 3
    assert sorted(file.name for file in Path("out_pictures").iterdir()) == ["1-doc-2.png", "2-doc-3.png", "3-doc-3.png"]
    images = [image for turn in json.loads(Path("out.json").read_text())["turns"] for image in turn["images"]]
    assert [(image["page"], image.get("region")) for image in images] == [(2, None), (3, None), (3, "0,0,50%,50%")]
    lost = run("chat", "-q", "--continue", input="/region 0,0,9,9\n")
    assert lost.exit_code == 66
    assert f"llava: {document}: no such file or directory" in lost.stderr
    assert len(list((home / "data" / "pictures").iterdir())) == 3
    run("chats", "delete", "1")
    assert list((home / "data" / "pictures").iterdir()) == []


def test_the_resolution_of_a_page_is_kept(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (720, 720), "red").save(page := tmp_path / "page.pdf", resolution=72)
    for dpi in (36, 18):
        chat(run, "what is this?", "/region 0,0,50%,50%", "and this?", words=(page, "--dpi", str(dpi)))
    for number, side in ((1, 360), (2, 180)):
        printed, _ = chat(run, "/images", "/region 0,0,25%,25%", "hm?", "/images", words=("--resume", str(number)))
        sizes = [line.split("(")[1].split("x")[0] for line in printed if "page.pdf" in line]
        assert sizes[:2] == [str(side), str(side // 2)] and sizes[-1] == str(side // 4)


def test_a_region_is_one_of_the_whole_picture_the_next_day_too(run: Run, drawing: Path) -> None:
    chat(run, "/region 0,0,50%,100%", "what is this?", words=(drawing,))
    printed, _ = chat(run, "/region 50%,0,100%,100% what is this?", words=("--continue",))
    assert printed == ["a blue triangle on a white background"]
    Image.new("RGB", (300, 200), "black").save(drawing)
    changed = run("chat", "-q", "--continue", input="/region 0,0,9,9\n")
    assert (changed.exit_code, changed.stderr) == (
        66,
        f"llava: {drawing}: is not the picture any more: it has changed\n  /image PATH\n",
    )


def test_a_store_of_before_there_were_parts(run: Run, drawing: Path, home: Path) -> None:
    chat(run, "what is this?", words=(drawing,))
    with sqlite3.connect(home / "data" / "chats.db") as database:
        database.execute("DROP TABLE parts")
    printed, _ = chat(run, "/region 0,0,50%,100%", "what is this?", "/images", words=("--continue",))
    assert printed[-2:] == [
        f"{drawing} (300x200) with question 1",
        f"{drawing} at 0,0,50%,100% (150x200) with question 2",
    ]


def test_what_is_pasted_is_kept(run: Run, copy: Copy, drawing: Path, home: Path) -> None:
    copy(drawing, "image/png")
    printed, noted = chat(run, "/paste", "/screen", "/paste what is this?", "/images", "/region 50%,0,100%,100%", "hm?")
    assert noted == [
        "clipboard (300x200) goes with the next question",
        f"screen ({WIDTH}x{HEIGHT}) goes with the next question",
        "clipboard at 50%,0,100%,100% (150x200) goes with the next question, besides what was shown before",
    ]
    assert printed[0] == "a red circle and a blue triangle on a white background"
    copy(b"another thing")
    picture = home / "data" / "pictures" / f"{open_picture(str(drawing)).sha256}.png"
    assert picture.is_file()
    again, _ = chat(run, "/images", "/undo", "what color is the triangle?", words=("--continue",))
    assert [line.split(" (")[0] for line in again[:4]] == [
        *("clipboard", "screen", "clipboard", "clipboard at 50%,0,100%,100%")
    ]
    assert again[4] == "blue"
    nothing = run("chat", "-q", input="/paste\n")
    assert (nothing.exit_code, nothing.stderr) == (
        66,
        "llava: clipboard: has text, no picture\n  copy a picture first\n",
    )
