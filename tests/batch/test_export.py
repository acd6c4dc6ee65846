"""`llava export`: what other programs read of a batch's rows, and what is left alone."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import shutil
import tarfile
import tracemalloc
import zipfile
from importlib import util
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyexiv2
import pytest
from helpers.command import Run
from helpers.rows import row, sha256, write
from helpers.tables import for_each
from PIL import Image, ImageCms

from llava_cli import limits
from llava_cli.batch.export import export_shards, export_tables
from llava_cli.batch.export.xmp_packet import NotMergeable, OtherDescription, merged, new_packet
from llava_cli.conversation import Picture
from llava_cli.images.sandbox import Sandbox

ALL = ("parquet", "csv", "txt", "xmp", "webdataset")


@pytest.fixture
def photos(tmp_path: Path, drawing: Path) -> Path:
    """A folder with two pictures that differ, and the rows about them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(drawing, folder / "a.png")
    Image.open(drawing).transpose(Image.Transpose.ROTATE_90).save(folder / "b.c.jpg")
    described(folder, "a.png", "b.c.jpg")
    return folder


def described(folder: Path, *images: str, **more: Any) -> Path:
    """Rows beside their pictures, whose answer is `a drawing of IMAGE`."""
    rows = (row(image, f"a drawing of {image}", sha256=sha256(folder / image), **more) for image in images)
    return write(folder / "out.jsonl", *rows)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, by its name: its inode and its bytes."""
    files = filter(Path.is_file, sorted(folder.rglob("*")))
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.read_bytes()) for path in files}


@for_each("to", [*ALL, "embedded"])
def test_a_second_time_changes_nothing(to: str, tmp_path: Path, run: Run, drawing: Path) -> None:
    shutil.copy(drawing, tmp_path / "a.png")
    described(tmp_path, "a.png")
    words = ["export", tmp_path / "out.jsonl", *(["--to", "xmp", "--embed"] if to == "embedded" else ["--to", to])]
    first = run(*words)
    assert (first.exit_code, first.stdout) == (0, "")
    assert "written" in first.stderr
    there = contents(tmp_path)
    for force in ([], ["--force"]):
        done = run(*words, *force)
        assert (done.exit_code, done.stdout) == (0, "")
        assert "unchanged" in done.stderr and "left out" not in done.stderr
        assert contents(tmp_path) == there
    assert run(*words, "-q").stderr == ""


@for_each(
    "to, name",
    [
        ("parquet", "out.parquet"),
        ("csv", "out.csv"),
        ("txt", "a.txt"),
        ("xmp", "a.png.xmp"),
        ("webdataset", "out-000000.tar"),
    ],
)
def test_what_says_something_else_is_replaced_only_with_force(
    to: str, name: str, tmp_path: Path, run: Run, drawing: Path
) -> None:
    shutil.copy(drawing, tmp_path / "a.png")
    source = described(tmp_path, "a.png")
    other = new_packet("mine") if to == "xmp" else b"mine"
    (tmp_path / name).write_bytes(other)
    done = run("export", source, "--to", to)
    assert done.exit_code == (1 if to in ("txt", "xmp") else 73)
    assert "--force" in done.stderr
    assert (tmp_path / name).read_bytes() == other
    assert run("export", source, "--to", to, "--force").exit_code == 0
    assert (tmp_path / name).read_bytes() != other
    assert run("export", source, "--to", to).exit_code == 0
    # What is there may lead elsewhere: nothing is written through a link.
    (tmp_path / name).rename(tmp_path / "mine")
    there = (tmp_path / "mine").read_bytes()
    (tmp_path / name).symlink_to("mine")
    assert run("export", source, "--to", to, "--force").exit_code in (1, 73)
    assert (tmp_path / "mine").read_bytes() == there


# Tables.


VALUES = [
    row("a.png", id=1, expected="cat", right=True, page=2, flags=["cut_off"], sight=-0.25),
    row("b.png", None, id="two", data={"n": [1, None]}),
    row("c.png", "", probabilities={"yes": 0.75, "no": 0.25}, expected=["cat", "dog"], right=False, time=12, flags=[]),
    row("d.png", "=1+1", confidence={"mean": 0.9, "lowest": 0.5, "lowest_token": " é"}, time=0.5, answer_tokens=2**60),
    row(
        "\udcff.png", 'a "b",\r\nc\0', path_b64="/w==", escalated={"model": "m", "answer": "x", "data": 1}, sight=2**70
    ),
]


def test_parquet_has_a_typed_column_for_each_key(tmp_path: Path, run: Run) -> None:
    assert run("export", write(tmp_path / "out.jsonl", *VALUES), "--to", "parquet").exit_code == 0
    table = pq.read_table(tmp_path / "out.parquet")
    types = {
        **{"error.type": pa.string(), "error.message": pa.string(), "answer_tokens": pa.int64(), "id": pa.string()},
        **{"right": pa.bool_(), "page": pa.int64(), "time": pa.float64(), "flags": pa.list_(pa.string())},
        **{"probabilities": pa.map_(pa.string(), pa.float64()), "expected": pa.list_(pa.string())},
        **{"confidence.mean": pa.float64(), "escalated.data": pa.int64(), "data": pa.string(), "sight": pa.string()},
    }
    assert {name: table.schema.field(name).type for name in types} == types
    rows = table.to_pylist()
    assert [one["image"] for one in rows] == ["a.png", "b.png", "c.png", "d.png", r"\udcff.png"]
    assert [one["id"] for one in rows] == ["1", "two", None, None, None]
    assert [one["answer"] for one in rows] == ["a cat", None, "", "=1+1", 'a "b",\r\nc\0']
    assert rows[1]["error.type"] == "BadImage" and json.loads(rows[1]["data"]) == {"n": [1, None]}
    assert rows[2]["probabilities"] == [("yes", 0.75), ("no", 0.25)]
    assert [one["expected"] for one in rows[:3]] == [["cat"], None, ["cat", "dog"]]
    assert rows[3]["answer_tokens"] == 2**60 and rows[3]["confidence.lowest_token"] == " é"
    assert rows[4]["sight"] == str(2**70)


def test_csv_is_read_back(tmp_path: Path, run: Run) -> None:
    done = run("export", write(tmp_path / "out.jsonl", *VALUES), "--to", "csv")
    assert done.stderr.startswith(f"{tmp_path / 'out.csv'}: 5 rows, written\n  cells that begin like a formula")
    assert done.stderr.endswith(": 1\n")
    data = (tmp_path / "out.csv").read_bytes()
    assert data.count(b"\r\n") == 1 + len(VALUES) + 1  # one is in an answer
    first, *others = csv.DictReader(io.StringIO(data.decode(), newline=""))
    assert first | {"id": "1", "right": "true", "page": "2", "flags": '["cut_off"]', "sight": "-0.25"} == first
    assert [one["answer"] for one in others] == ["", "", "'=1+1", 'a "b",\r\nc\0']
    assert json.loads(others[1]["probabilities"]) == {"yes": 0.75, "no": 0.25}
    assert run("export", tmp_path / "out.jsonl", "--to", "csv", "-o", "-").stdout_bytes == data


@for_each(
    "text", ["=1", "+a", "-2+3|cmd", "@x", "\t=1", "\uff1d1", "'=1", "- a cat", "-5", "+1.5e3", "5%", "a=b", "'a"]
)
def test_no_cell_is_a_formula(text: str, tmp_path: Path, run: Run) -> None:
    """And what stands before it can be taken away again: the first of the apostrophes."""
    assert run("export", write(tmp_path / "out.jsonl", row("a", text)), "--to", "csv").exit_code == 0
    cell = next(csv.DictReader((tmp_path / "out.csv").open(newline="")))["answer"]
    assert not re.match(r"[=@\t\uff1d]|[+-](?![\d.]+(e\d+)?$)", cell)
    assert re.sub(r"^'(?='*[=+\-@\t\uff1d])", "", cell) == text


@for_each("to", ["parquet", "csv"])
def test_memory_does_not_grow_with_the_rows(to: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "out.jsonl", *(row("a", f"{n} " + 1000 * "x") for n in range(6_000)))
    monkeypatch.setattr(export_tables, "GROUP_CHARACTERS", 100_000)
    assert run("export", write(tmp_path / "one.jsonl", row("a")), "--to", to).exit_code == 0  # imports what it needs
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    assert run("export", source, "--to", to).exit_code == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000
    assert pa.total_allocated_bytes() - before < 1_000_000
    if to == "parquet":
        assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups > 50


@for_each("to", ["parquet", "csv"])
def test_rows_that_are_no_table(to: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("export", write(tmp_path / "out.jsonl"), "--to", to)
    assert done.exit_code == 0  # a table without rows, with the columns that all tables have
    monkeypatch.setattr(limits, "EXPORT_COLUMNS", 20)
    for more, reason in (
        ({f"k{n}": 1 for n in range(20)}, "has keys beyond 20"),
        ({"error": {"type": "a"}, "error.type": 1}, "has 'error.type' twice"),
    ):
        done = run("export", write(tmp_path / "out.jsonl", row("a"), row("a", **more)), "--to", to)
        assert (done.exit_code, done.stderr.startswith(f"llava: {tmp_path / 'out.jsonl'}, line 2: {reason}")) == (
            65,
            True,
        )


# Captions and XMP beside pictures.


def test_captions(photos: Path, run: Run) -> None:
    rows = [row("a.png", "a  cat\nand a dog\x1b[31m ", sha256=sha256(photos / "a.png"))]
    rows += [row("b.c.jpg", f"page {n}", page=n) for n in (1, 2)] + [row("b.c.jpg", "moment", time=1.5)]
    rows += [row("b.c.jpg", "part", region="0,0,1,1"), row("b.c.jpg", None), row("b.c.jpg", " "), row("s3://b/a.png")]
    done = run("export", write(photos / "out.jsonl", *rows), "--to", "txt")
    assert {path.name: path.read_text() for path in photos.glob("*.txt")} == {
        **{"a.txt": "a cat and a dog\\u001b[31m\n", "b.c.1.txt": "page 1\n", "b.c.2.txt": "page 2\n"},
        **{"b.c.1.5s.txt": "moment\n"},
    }
    assert done.exit_code == 0
    assert done.stderr.splitlines()[0] == f"{photos / 'out.jsonl'}: 4 captions written"
    assert [line.split(":")[0] for line in done.stderr.splitlines()[1:]] == ["  1 left out"] * 4


def test_pictures_that_are_not_what_they_were(photos: Path, run: Run) -> None:
    rows = [row("a.png", sha256="0" * 64), row("gone.png"), row("../drawing.png"), row("out.jsonl/a.png")]
    source = write(photos / "out.jsonl", *rows)
    for to in ("txt", "xmp", "webdataset"):
        done = run("export", source, "--to", to)
        assert done.exit_code == 1
        for words in ("changed since", "is not there", "outside the folders that may be used (../drawing.png)"):
            assert words in done.stderr
    assert sorted(path.name for path in photos.iterdir()) == ["a.png", "b.c.jpg", "out.jsonl"]
    assert not list(photos.parent.glob("drawing.*.*")) and not list(photos.parent.glob("*.txt"))
    shutil.copy(photos / "a.png", photos.parent / "a.png")
    assert "1 caption written" in run("export", source, "--to", "txt", "--root", photos.parent).stderr
    assert (photos.parent / "drawing.txt").exists()


def test_a_stranger_cannot_have_us_write_elsewhere(photos: Path, run: Run) -> None:
    """Through links in the folder that came with the rows, or settings that nobody here has signed."""
    elsewhere = photos.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(photos / "a.png", elsewhere / "a.png")
    (elsewhere / "back.png").symlink_to(photos / "a.png")
    (photos / "folder").symlink_to(elsewhere)
    (photos / "link.png").symlink_to(elsewhere / "a.png")
    (photos / "out.jsonl.run").mkdir()
    (photos / "out.jsonl.run" / "settings.json").write_text(json.dumps({"root": str(elsewhere), "signed": "0" * 64}))
    digest = sha256(photos / "a.png")
    names = ["folder/a.png", "folder/back.png", "link.png", str(elsewhere / "a.png")]
    source = write(photos / "out.jsonl", *(row(name, sha256=digest) for name in names))
    before = contents(elsewhere)
    for words in (["txt"], ["xmp"], ["xmp", "--embed"]):
        done = run("export", source, "--force", "--to", *words)
        assert done.exit_code == 1
        assert "outside the folders" in done.stderr
        assert contents(elsewhere) == before


def test_a_stranger_cannot_have_us_write_beside_other_files(photos: Path, run: Run) -> None:
    """Below the folders that may be used: a row without a hash may name any file."""
    (photos / "requirements.in").write_text("torch\n")
    (photos / "empty").touch()
    source = write(photos / "out.jsonl", row("requirements.in", "evil"), row("empty"), row("out.jsonl"), row("a.png"))
    for to, made in (("txt", "a.txt"), ("xmp", "a.png.xmp")):
        before = {path.name for path in photos.iterdir()}
        done = run("export", source, "--to", to, "--force")
        assert done.exit_code == 1
        assert "3 left out: it does not begin like a picture, document or film (requirements.in, …)" in done.stderr
        assert {path.name for path in photos.iterdir()} - before == {made}


def test_a_picture_has_the_answer_to_one_question(photos: Path, run: Run) -> None:
    rows = [
        row("a.png", "one", "first 'question'?"),
        row("a.png", "two", "second?"),
        row("b.c.jpg", "three", "second?"),
    ]
    source = write(photos / "out.jsonl", *rows)
    for to in ("txt", "xmp"):
        done = run("export", source, "--to", to)
        assert done.exit_code == 2
        hint = "--question 'first '\"'\"'question'\"'\"'?'"
        assert (
            done.stderr
            == f"llava: --to {to}: a picture has one text, and these rows have several questions\n  {hint}\n"
        )
    assert run("export", source, "--to", "txt", "--question", "second?").exit_code == 0
    assert (photos / "a.txt").read_text() == "two\n"
    assert run("export", source, "--to", "csv", "--question", "third?").exit_code == 2
    assert run("export", source, "--to", "csv", "--question", "second?", "-o", "-").stdout.count("\n") == 3


def test_two_rows_for_one_file(photos: Path, run: Run) -> None:
    shutil.copy(photos / "a.png", photos / "a.gif")
    source = write(photos / "out.jsonl", row("a.png", "one"), row("a.gif", "two"), row("a.png", "one"))
    for _ in range(2):
        done = run("export", source, "--to", "txt", "--force")
        assert (done.exit_code, "another row has another text for the same file (a.gif)" in done.stderr) == (1, True)
        assert (photos / "a.txt").read_text() == "one\n"


def test_only_text_is_replaced(photos: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(photos / "a.png", photos / "picture.txt")
    (photos / "a.txt").write_bytes(b"a\0b")
    (photos / "b.c.txt").write_text(100 * "long ")
    source = described(photos, "a.png", "b.c.jpg", "picture.txt")
    monkeypatch.setattr(limits, "SIDECAR_BYTES", 400)
    before = contents(photos)
    done = run("export", source, "--to", "txt", "--force")
    assert (done.exit_code, contents(photos)) == (1, before)
    assert (
        "0 captions written" in done.stderr
        and "3 left out: what is in the place of the text is no text file" in done.stderr
    )


SIDECAR = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="uuid:1" xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/" crs:Exposure2012="a > b">
   <crs:Look><rdf:Description>
    <d:description xmlns:d="http://purl.org/dc/elements/1.1/">of it</d:description>
   </rdf:Description></crs:Look>%s
  </rdf:Description><!-- kept -->
 </rdf:RDF>
</x:xmpmeta>"""
GERMAN = b"""<dc:description xmlns:dc="http://purl.org/dc/elements/1.1/"><rdf:Alt>
<rdf:li xml:lang='de' title=">">Katze</rdf:li>
<rdf:li xml:lang="x-default">%s</rdf:li></rdf:Alt></dc:description>"""


def test_xmp_is_what_exiv2_reads(photos: Path, run: Run) -> None:
    texts = ['a <cat> & a "dog"\n\n]]> é \U0001f408', "\x00\ufffe\ud800 \u202e"]
    source = write(photos / "out.jsonl", row("a.png", texts[0]), row("b.c.jpg", texts[1]))
    assert run("export", source, "--to", "xmp").exit_code == 0
    found = []
    for name in ("a.png.xmp", "b.c.jpg.xmp"):
        with pyexiv2.Image(str(photos / name)) as image:
            found.append(image.read_xmp()["Xmp.dc.description"])
    assert found == [{'lang="x-default"': texts[0]}, {'lang="x-default"': r"\u0000" + "\ufffd" + r"\ud800 \u202e"}]


def test_an_xmp_file_keeps_what_else_it_says(tmp_path: Path) -> None:
    packet = SIDECAR % b""
    added = merged(packet, "a <cat>")
    cut = added.index(b"  <rdf:Description xmlns")
    assert added[:cut] + added[-len(packet) + cut :] == packet
    (tmp_path / "a.xmp").write_bytes(added)
    with pyexiv2.Image(str(tmp_path / "a.xmp")) as image:
        found = image.read_xmp()
    assert found["Xmp.dc.description"] == {'lang="x-default"': "a <cat>"}
    assert found["Xmp.crs.Exposure2012"] == "a > b"
    assert merged(added, "a <cat>") == added
    german = SIDECAR % (GERMAN % b"a &lt;cat&gt;")
    assert merged(german, "a <cat>") == german
    with pytest.raises(OtherDescription):
        merged(german, "a dog")
    assert merged(german, "a & b", replace=True) == SIDECAR % (GERMAN % b"a &amp; b")
    assert merged(SIDECAR % (GERMAN % b" "), "a dog") == SIDECAR % (GERMAN % b"a dog")


@for_each(
    "packet, reason",
    [
        (b"", "no XML"),
        (b"<a/>", "no XMP"),
        (b"\xff\xfe<\0a\0/\0>\0", "not in UTF-8"),
        (b'<?xml version="1.0" encoding="iso-8859-1"?><a/>', "not in UTF-8"),
        (b'<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><a>&d;</a>', "it declares a document type"),
        (b"<a>" * 200 + b"</a>" * 200, "nested deeper than 100 levels"),
        (SIDECAR % b"<unclosed>", "no XML"),
        (SIDECAR % b'<d:description xmlns:d="http://purl.org/dc/elements/1.1/">plain</d:description>', "unusual form"),
        (SIDECAR % b'<d:description xmlns:d="http://purl.org/dc/elements/1.1/" rdf:resource="a"/>', "unusual form"),
        (
            SIDECAR.replace(b"crs:Exp", b'd:description="a" xmlns:d="http://purl.org/dc/elements/1.1/" crs:Exp') % b"",
            "unusual",
        ),
    ],
)
def test_an_xmp_file_that_is_not_added_to(packet: bytes, reason: str) -> None:
    with pytest.raises(NotMergeable, match=reason):
        merged(packet, "a cat", replace=True)
    assert limits.SIDECAR_DEPTH == 100


def test_mutated_xmp_files(photos: Path) -> None:
    """Whatever is in one: it is refused, or what comes out has the description, and can be added to again."""
    chance = random.Random(0)
    good = SIDECAR % (GERMAN % b"Katze")
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            place = chance.randrange(len(data))
            data[place : place + chance.randint(0, 20)] = chance.choice([b"", b"<", b">", b"</", b"\xff", b"&", b'"'])
        try:
            new = merged(bytes(data), "a cat", replace=True)
        except NotMergeable:
            continue
        assert merged(new, "a cat") == new


# XMP inside pictures.


@pytest.fixture
def rich(tmp_path: Path) -> dict[str, Path]:
    """Pictures of the formats that are written into, each with metadata of all kinds."""
    picture = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    exif.get_ifd(0x8825)[1] = "N"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    paths = {}
    for ending in ("jpg", "png", "webp"):
        paths[ending] = tmp_path / f"rich.{ending}"
        picture.save(paths[ending], exif=exif, icc_profile=profile, lossless=True)
        with pyexiv2.Image(str(paths[ending])) as image:
            image.modify_xmp({"Xmp.xmp.Rating": "4", "Xmp.dc.description": {'lang="de"': "Verlauf"}})
            if ending != "webp":
                image.modify_iptc({"Iptc.Application2.Keywords": ["gray"]})
    return paths


def metadata(path: Path) -> dict[str, Any]:
    with pyexiv2.Image(str(path)) as image:
        return {**image.read_exif(), **image.read_iptc(), **image.read_xmp(), "icc": image.read_icc()}


def test_only_the_description_inside_a_picture_changes(rich: dict[str, Path], run: Run) -> None:
    folder = rich["jpg"].parent
    source = described(folder, *(path.name for path in rich.values()))
    before = {path: (metadata(path), Image.open(path).tobytes(), path.read_bytes()) for path in rich.values()}
    done = run("export", source, "--to", "xmp", "--embed")
    assert (done.exit_code, done.stderr) == (0, f"{source}: 3 pictures written\n")
    for path, (old, pixels, data) in before.items():
        text, new = f"a drawing of {path.name}", metadata(path)
        assert new.pop("Exif.Image.ImageDescription") == text
        assert new.pop("Xmp.dc.description") == {'lang="x-default"': text, 'lang="de"': "Verlauf"}
        if path.suffix != ".webp":
            assert new.pop("Iptc.Application2.Caption") == text
            assert new.pop("Iptc.Envelope.CharacterSet") == "\x1b%G"
        del old["Xmp.dc.description"]
        moved = [key for key in old if key.endswith("Tag")]  # the places of tables in the file
        assert {key: new[key] for key in new if key not in moved} == {key: old[key] for key in old if key not in moved}
        assert Image.open(path).tobytes() == pixels
        pixels_of = {".jpg": rb"\xff\xda.*", ".png": rb"IDAT.*", ".webp": rb"VP8L.{40}"}[path.suffix]
        same = [re.search(pixels_of, one, re.DOTALL) for one in (data, path.read_bytes())]
        assert same[0] and same[1] and same[0][0] == same[1][0]
    assert (
        run("export", source, "--to", "xmp", "--embed").stderr == f"{source}: 3 pictures unchanged, nothing written\n"
    )
    for path in rich.values():  # another answer later: the picture is the one that has the other
        write(source, row(path.name, "another", sha256=sha256(path)))
        done = run("export", source, "--to", "xmp", "--embed")
        assert (done.exit_code, "there is another text" in done.stderr) == (1, True)
        assert run("export", source, "--to", "xmp", "--embed", "--force").exit_code == 0
        assert metadata(path)["Exif.Image.ImageDescription"] == "another"


def test_pictures_that_are_not_written_into(photos: Path, run: Run) -> None:
    picture = Image.open(photos / "a.png")
    for ending in ("gif", "bmp", "tiff"):
        picture.save(photos / f"a.{ending}")
    (photos / "link.png").symlink_to("a.png")
    (photos / "text.jpg").write_bytes(b"\xff\xd8\xffno picture")
    names = ["a.gif", "a.bmp", "a.tiff", "link.png", "text.jpg"]
    source = described(photos, *names)
    before = contents(photos)
    done = run("export", source, "--to", "xmp", "--embed", "--force")
    assert (done.exit_code, contents(photos)) == (1, before)
    assert "4 left out: the picture cannot be written into" in done.stderr
    assert "1 left out: the picture is a link" in done.stderr


def test_mutated_pictures_are_left_alone_or_keep_their_pixels(rich: dict[str, Path], run: Run) -> None:
    chance, folder = random.Random(1), rich["jpg"].parent / "mutated"
    folder.mkdir()
    for number in range(60):
        path = chance.choice(list(rich.values()))
        data = bytearray(path.read_bytes())
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(min(len(data), 2000))] = chance.randrange(256)
        (folder / f"{number}{path.suffix}").write_bytes(data)
    names = sorted(os.listdir(folder))
    source = described(folder, *names)
    before = {name: (folder / name).read_bytes() for name in names}
    done = run("export", source, "--to", "xmp", "--embed", "--force")
    assert done.exit_code == 1 and "written" in done.stderr
    changed = [name for name in names if (folder / name).read_bytes() != before[name]]
    assert 0 < len(changed) < 60
    decoder = Sandbox()
    for name in changed:
        new, old = (decoder.open(name, data, True) for data in ((folder / name).read_bytes(), before[name]))
        assert isinstance(new, Picture) and isinstance(old, Picture)
        assert new.image.tobytes() == old.image.tobytes()
    decoder.end()


# Shards.


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_shards_have_the_pictures_as_they_are(photos: Path, run: Run) -> None:
    rows = [row("a.png", "one", sha256=sha256(photos / "a.png")), row("b.c.jpg", None), row("b.c.jpg", "two", "why?")]
    rows.append(row("a.png", "three", region="50%,0,100%,100%", sha256=sha256(photos / "a.png")))
    source = write(photos / "out.jsonl", *rows)
    done = run("export", source, "--to", "webdataset", "-o", photos / "train.tar")
    assert done.stderr.splitlines()[0] == f"{photos / 'train-000000.tar'}: 3 samples; 1 shard written"
    found = members(photos / "train-000000.tar")
    assert list(found)[:4] == ["000000001.png", "000000001.json", "000000001.txt", "000000003.jpg"]
    assert found["000000001.png"] == (photos / "a.png").read_bytes()
    assert found["000000003.jpg"] == (photos / "b.c.jpg").read_bytes()
    assert (found["000000003.txt"], json.loads(found["000000003.json"])) == (b"two", rows[2])
    part = Image.open(io.BytesIO(found["000000004.png"]))
    whole = Image.open(photos / "a.png")
    assert part.tobytes() == whole.crop((150, 0, 300, 200)).tobytes()


def test_shards_are_bounded(photos: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = described(photos, *["a.png"] * 7)
    (photos / "out").mkdir()  # which has nothing to do with it
    monkeypatch.setattr(export_shards, "SHARD_SAMPLES", 3)
    assert "7 samples; 3 shards written" in run("export", source, "--to", "webdataset").stderr
    shards = sorted(photos.glob("*.tar"))
    assert [len(members(path)) // 3 for path in shards] == [3, 3, 1]
    assert all(path.stat().st_size % 10_240 == 0 for path in shards)
    monkeypatch.setattr(export_shards, "SHARD_BYTES", 1)
    assert run("export", source, "--to", "webdataset").exit_code == 73
    assert "7 samples; 7 shards written" in run("export", source, "--to", "webdataset", "--force").stderr
    assert [len(members(path)) // 3 for path in sorted(photos.glob("*.tar"))] == [1] * 7
    monkeypatch.undo()
    done = run("export", source, "--to", "webdataset", "--force")
    assert "out-000001.tar is left from another export" in done.stderr


# The command.


def test_a_batch_and_its_captions(photos: Path, run: Run) -> None:
    """Whose pictures are elsewhere than the rows: the run's own signature says that they may be written beside."""
    (photos / "out.jsonl").unlink()
    out = photos.parent / "rows" / "out.jsonl"
    out.parent.mkdir()
    assert run("batch", photos, "how many shapes are there?", "-q", "-o", out).exit_code == 0
    out.write_bytes(out.read_bytes() + b'{"image": "torn')
    done = run("export", out, "--to", "txt")
    assert (done.exit_code, "its last line is not whole" in done.stderr) == (0, True)
    assert (photos / "a.txt").read_text() == "2\n"


def test_what_cannot_be_asked_for(photos: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = photos / "out.jsonl"
    (photos / "text.jsonl").write_text("no rows\n")
    for words, code, reason in [
        ([photos / "gone.jsonl", "--to", "csv"], 66, "gone.jsonl: no such file or directory"),
        ([photos / "text.jsonl", "--to", "csv"], 65, "line 1: not a row of llava batch"),
        ([source], 2, "missing option '--to'"),
        ([source, "--to", "json"], 2, "'json' is not one of"),
        ([source, "--to", "txt", "-o", "x"], 2, "-o: txt goes beside the pictures"),
        ([source, "--to", "csv", "--embed"], 2, "--embed: puts XMP into pictures, not csv"),
        ([source, "--to", "csv", "-o", source], 2, "is the file of rows"),
        ([source, "--to", "csv", "-o", photos / "no" / "x.csv"], 73, "no such folder"),
        ([source, "--to", "webdataset", "-o", photos], 2, "-o: names no file"),
        ([source, "--to", "webdataset", "-o", "-"], 2, "-o: names no file"),
    ]:
        done = run("export", *words)
        assert (done.exit_code, done.stdout) == (code, "")
        assert reason in done.stderr.splitlines()[0] and len(done.stderr.splitlines()) == 2
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    monkeypatch.setattr("llava_cli.batch.export.export_job.find_spec", util.find_spec)
    for words, extra in ((["parquet"], "tables"), (["xmp", "--embed"], "xmp")):
        done = run("export", source, "--to", *words)
        assert (done.exit_code, done.stderr.splitlines()[1]) == (2, f"  pip install 'llava-cli[{extra}]'")
    assert run("export", source, "--to", "xmp").exit_code == 0


def test_pictures_in_archives(tmp_path: Path, run: Run, drawing: Path) -> None:
    """They are copied and shown, and nothing is written beside them; a root may be the archive itself."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(drawing, "in/b.png")
    digest = sha256(drawing)
    for image, words in (("a.zip/in/b.png", []), ("in/b.png", ["--root", tmp_path / "a.zip"])):
        rows = [row(image, sha256=digest), row(image, region="0,0,50%,100%", sha256=digest), row(image + "x")]
        source = write(tmp_path / "out.jsonl", *rows)
        assert "2 samples; 1 shard" in run("export", source, "--to", "webdataset", "--force", *words).stderr
        found = members(tmp_path / "out-000000.tar")
        assert found["000000001.png"] == drawing.read_bytes()
        assert Image.open(io.BytesIO(found["000000002.png"])).size == (150, 200)
        assert "3 rows, 1 without their picture" in run("report", source, *words).stderr
        before = contents(tmp_path)
        done = run("export", source, "--to", "txt", *words)
        assert (done.exit_code, contents(tmp_path)) == (0, before)
        assert "2 left out: the picture is no file of its own on this disk" in done.stderr


def test_a_table_names_no_file_outside(tmp_path: Path, run: Run, drawing: Path) -> None:
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"image": ["../drawing.png", "in.png"]}), tmp_path / "rows" / "a.parquet")
    shutil.copy(drawing, tmp_path / "rows" / "in.png")
    source = write(tmp_path / "rows" / "out.jsonl", row("a.parquet/../drawing.png"), row("a.parquet/in.png"))
    done = run("export", source, "--to", "webdataset")
    assert done.exit_code == 1
    assert next(iter(members(tmp_path / "rows" / "out-000000.tar"))) == "000000002.png"
