"""Archives and tables as SOURCEs of `llava batch`: the rows of a folder, whatever is in them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers.command import Run
from helpers.faults import Told
from helpers.tables import for_each
from PIL import Image
from pyarrow import feather, ipc, parquet

from llava_cli import limits
from llava_cli.batch import run as module
from llava_cli.batch.sources.containers import container_in, open_container
from llava_cli.batch.sources.containers.table import Table
from llava_cli.errors import BadData, BadImage, InputMissing, LlavaError
from llava_cli.sandbox.process import Worker

QUESTION = "what is this?"
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to stand in; the model is one that says anything."""
    monkeypatch.setattr(module, "open_engine", lambda *_: Told())
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def png(number: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (20, 10), (number, 100, 200)).save(data, "PNG")
    return data.getvalue()


PICTURES = {f"{'ab'[number % 2]}/{number}.png": png(number) for number in range(6)}


def write_zip(path: str | Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def tar_of(files: dict[str, bytes], format_: int = tarfile.PAX_FORMAT) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=format_) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def table_of(**columns: Any) -> pyarrow.Table:
    return pyarrow.table(columns)


def write_stream(table: pyarrow.Table, path: str) -> None:
    with ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS: dict[str, Callable[[str, dict[str, bytes]], Any]] = {
    "stored.zip": lambda path, files: write_zip(path, files, zipfile.ZIP_STORED),
    "x.zip": write_zip,
    "bzip2.zip": lambda path, files: write_zip(path, files, zipfile.ZIP_BZIP2),
    "pax.tar": lambda path, files: Path(path).write_bytes(tar_of(files)),
    "gnu.tar": lambda path, files: Path(path).write_bytes(tar_of(files, tarfile.GNU_FORMAT)),
    "ustar.tar": lambda path, files: Path(path).write_bytes(tar_of(files, tarfile.USTAR_FORMAT)),
    "x.tar.gz": lambda path, files: Path(path).write_bytes(gzip.compress(tar_of(files))),
    "two streams.tgz": lambda path, files: Path(path).write_bytes(
        gzip.compress(tar_of(files)[:700]) + gzip.compress(tar_of(files)[700:])
    ),
    "x.tar.bz2": lambda path, files: Path(path).write_bytes(bz2.compress(tar_of(files))),
    "no ending": lambda path, files: Path(path).write_bytes(lzma.compress(tar_of(files)) + bytes(8)),
}


def rows_of(text: str | bytes) -> list[Row]:
    return [json.loads(line) for line in text.splitlines()]


def facts(rows: list[Row]) -> list[tuple[str, str, str]]:
    assert all(row["status"] == "ok" for row in rows), rows
    return [(row["image"], row["sha256"], row["answer"]) for row in rows]


@for_each("name", WRITERS, own=(here,))
def test_rows_are_those_of_the_folder_before_and_after_a_stop(name: str, run: Run) -> None:
    """Cut off at every row, and in the midst of one, the same command makes the same file."""
    for path, data in PICTURES.items():
        Path("folder", path).parent.mkdir(parents=True, exist_ok=True)
        Path("folder", path).write_bytes(data)
    WRITERS[name](name, PICTURES)
    result = run("batch", name, QUESTION, "-o", "out.jsonl")
    assert result.exit_code == 0, result.stderr
    whole = Path("out.jsonl").read_bytes()
    assert sorted(facts(rows_of(whole))) == facts(rows_of(run("batch", "folder", QUESTION).stdout))
    assert [row["image"] for row in rows_of(whole)] == list(PICTURES)
    ends = [place for place, byte in enumerate(whole) if byte == 10]
    for end in (0, ends[0] + 1, ends[2] + 30, ends[4] + 1):
        os.truncate("out.jsonl", end)
        assert run("batch", name, QUESTION, "-o", "out.jsonl").exit_code == 0
        assert Path("out.jsonl").read_bytes() == whole


def test_zstandard() -> None:
    Path("x.tar").write_bytes(tar_of(PICTURES))
    with pyarrow.CompressedOutputStream("x.tar.zst", "zstd") as stream:
        stream.write(Path("x.tar").read_bytes())
    archive = open_container("x.tar.zst")
    assert archive and [archive.read(entry.name) for entry in archive.entries()] == list(PICTURES.values())
    assert archive.read(next(iter(PICTURES))) == PICTURES[next(iter(PICTURES))], "read anew from its beginning"
    archive.close()


def test_an_archive_that_has_changed(run: Run) -> None:
    """Its rows stay; what is gone is an error, what has come is taken in with --extend, what has moved is the same."""
    names = list(PICTURES)
    for write in (WRITERS["x.zip"], WRITERS["x.tar.gz"]):
        command = ("batch", "archive", QUESTION, "-o", "out.jsonl")
        write("archive", {name: PICTURES[name] for name in names[:4]})
        assert run(*command).exit_code == 0
        before = Path("out.jsonl").read_bytes()
        os.truncate("out.jsonl", before.index(b"\n") + 1)
        write("archive", {name: PICTURES[name] for name in reversed(names[2:])})
        result = run(*command)
        assert result.exit_code == 1
        assert "2 rows were added to the source since and are left out" in result.stderr
        assert "2 rows are about what is no longer in it" in result.stderr
        rows = rows_of(Path("out.jsonl").read_bytes())
        assert [(row["image"], row["status"]) for row in rows] == list(
            zip(names, ["ok", "error", "ok", "ok"], strict=False)
        )
        assert rows[1]["error"] == {"type": "InputMissing", "message": "is not in archive"}
        assert run(*command, "--extend").exit_code == 1
        assert [row["image"] for row in rows_of(Path("out.jsonl").read_bytes())] == [*names[:4], names[5], names[4]]
        write("archive", PICTURES)
        assert run(*command, "--retry-errors").exit_code == 0
        assert [row["status"] for row in rows_of(Path("out.jsonl").read_bytes())] == ["ok"] * 6
        for path in [*Path("out.jsonl.run").iterdir(), Path("out.jsonl")]:
            path.unlink()


ODD = {
    "__MACOSX/a/._0.png": b"x",
    ".hidden.png": png(),
    "notes.md": b"text",
    "no ending": png(1),
    "../up.png": png(2),
    "/etc/abs.png": png(3),
    "./http://127.0.0.1/x.png": png(4),
    "http://127.0.0.1/y.png": png(5),
    "é" * 60 + ".png": png(6),
    "a\nb.png": png(7),
    "dir/": b"",
}
TAKEN = ["no ending", "../up.png", "/etc/abs.png", "./http://127.0.0.1/x.png", "./http://127.0.0.1/y.png"]
TAKEN += ["é" * 60 + ".png", "a\nb.png"]


@for_each("name", ["x.zip", "pax.tar", "gnu.tar", "x.tar.gz"], own=(here,))
def test_odd_names_are_only_names(name: str, run: Run, here: Path) -> None:
    WRITERS[name](name, ODD)
    before = sorted(path.name for path in here.parent.rglob("*"))
    result = run("batch", name, QUESTION, "--allow-urls")
    assert [image for image, *_ in facts(rows_of(result.stdout))] == TAKEN
    said = (
        "1 file is no picture (1 .md), 1 hidden name, 1 folder of the system's (__MACOSX); --include takes other names"
    )
    assert f"llava: {name}: {said}\n" in result.stderr
    assert sorted(path.name for path in here.parent.rglob("*")) == before
    rows = rows_of(run("batch", name, QUESTION, "--include", "*up*", "--include", "*.md").stdout)
    assert [row["image"] for row in rows] == ["notes.md", "../up.png"]


def test_names_in_other_encodings() -> None:
    """DOS's code page, UTF-8 that macOS does not announce, the field for Unicode, and a name that is there twice."""
    write_zip("x.zip", {"aa.png": png(1), "bb.png": png(2), "cc.png": png(3), "dd.png": png(4)})
    data = Path("x.zip").read_bytes()
    data = data.replace(b"aa.png", b"\x82a.png").replace(b"bb.png", "é.png".encode()).replace(b"cc.png", b"dd.png")
    place = data.rindex("é.png".encode()) - 46
    data = data[: place + 5] + b"\3" + data[place + 6 :]
    place = data.index(b"PK\1\2")
    data = data[: place + 5] + b"\0" + data[place + 6 :]
    Path("x.zip").write_bytes(data)
    archive = open_container("x.zip")
    assert archive
    assert [entry.name for entry in archive.entries()] == ["éa.png", "é.png", "dd.png"]
    assert archive.read("dd.png") == png(4)
    assert archive.note() == "members of the same name, of which the last one counts: 1"
    archive.close()


def test_zip64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    write_zip("x.zip", PICTURES)
    assert b"PK\6\6" in Path("x.zip").read_bytes()
    archive = open_container("x.zip")
    assert archive and [archive.read(entry.name) for entry in archive.entries()] == list(PICTURES.values())
    archive.close()


def patched(data: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    place = data.index(mark) + offset
    return data[:place] + value + data[place + len(value) :]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PICTURE_BYTES", 2_000)


BAD_MEMBERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "encrypted": (lambda data: patched(data, b"PK\1\2", 8, b"\1"), "encrypted in x.zip"),
    "LZMA": (lambda data: patched(data, b"PK\1\2", 10, b"\x0e"), "compressed by LZMA, which is not read"),
    "declared": (lambda data: patched(data, b"PK\1\2", 24, b"\0\0\0\x7f"), "larger than 0 MB"),
    "real": (lambda data: patched(data, b"PK\1\2", 24, b"\x40\0\0\0"), "damaged in x.zip"),
    "checksum": (lambda data: patched(data, b"PK\1\2", 16, b"\0\0\0\0"), "damaged in x.zip"),
    "its bytes": (lambda data: patched(data, b"PK\3\4", 40, b"\xff" * 8), "damaged in x.zip"),
    "no header": (lambda data: patched(data, b"PK\1\2", 42, b"\7"), "damaged in x.zip"),
}


@for_each("name", BAD_MEMBERS, own=(here, small))
def test_a_bad_member_is_a_row(name: str, run: Run) -> None:
    damage, said = BAD_MEMBERS[name]
    write_zip("x.zip", {"bad.png": png() + bytes(1_000), "good.png": png()})
    Path("x.zip").write_bytes(damage(Path("x.zip").read_bytes()))
    bad, good = rows_of(run("batch", "x.zip", QUESTION).stdout)
    assert (bad["error"]["message"], good["status"]) == (said, "ok")


def test_a_member_that_is_too_large(small: None) -> None:
    for name in ("pax.tar", "x.tar.gz"):
        WRITERS[name](name, {"bomb.png": bytes(2_001)})
        archive = open_container(name)
        assert archive and [entry.name for entry in archive.entries()] == ["bomb.png"]
        with pytest.raises(BadImage, match="larger than"):
            archive.read("bomb.png")
        archive.close()


def archive_errors(path: str) -> str:
    """What is wrong with an archive, or what its note says."""
    try:
        archive = open_container(path)
        if archive is None:
            return "none"
        deque = list(archive.entries())
        for entry in deque:
            archive.read(entry.name)
    except LlavaError as error:
        return str(error)
    return archive.note()


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ARCHIVE_MEMBERS", 5)
    WRITERS["x.zip"]("x.zip", PICTURES)
    assert archive_errors("x.zip") == "x.zip: more than 5 pictures"
    monkeypatch.setattr(limits, "ARCHIVE_MEMBERS", 6)
    monkeypatch.setattr(limits, "MEMBER_HEADER_BYTES", 600)
    monkeypatch.setattr(limits, "MEMBER_NAME_BYTES", 400)
    for length, said in ((300, ""), (700, "damaged, or cut off: what is behind byte 512 is left out")):
        Path("x.tar").write_bytes(tar_of({"n" * length + ".png": png()}, tarfile.GNU_FORMAT))
        assert archive_errors("x.tar") == said
    Path("x.tar").write_bytes(tar_of({"n" * 500 + ".png": png()}, tarfile.GNU_FORMAT))
    archive = open_container("x.tar")
    assert archive and [len(entry.name) for entry in archive.entries()] == [400]
    monkeypatch.setattr(limits, "ARCHIVE_RATIO", 10)
    monkeypatch.setattr(limits, "ARCHIVE_SLACK_BYTES", 100_000)
    Path("x.tgz").write_bytes(gzip.compress(tar_of({"a.png": bytes(1_000_000)})))
    assert archive_errors("x.tgz") == "x.tgz: unpacks to more than 10 times its size"
    monkeypatch.setattr(limits, "ARCHIVE_WINDOW_BYTES", 100_000)
    Path("x.txz").write_bytes(lzma.compress(tar_of({"a.png": png()})))
    assert archive_errors("x.txz") == "none", "its window is larger than that: no tar can be seen in it"


@for_each("seed", range(60), own=(here,))
def test_archives_that_are_damaged_anywhere(seed: int) -> None:
    """An error or a note; never another exception, and never more than the archive has."""
    from random import Random

    random = Random(seed)
    name = random.choice([name for name in WRITERS if "stored" not in name])
    WRITERS[name](name, PICTURES)
    data = bytearray(Path(name).read_bytes())
    for _ in range(random.choice((1, 1, 3, 30))):
        data[random.randrange(len(data))] = random.choice((0, 255, random.randrange(256)))
    Path(name).write_bytes(data[: random.choice((len(data), random.randrange(len(data))))])
    archive_errors(name)


def test_members_of_a_tar_that_are_no_files(run: Run) -> None:
    with tarfile.open("x.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE):
            member = tarfile.TarInfo("link.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("a.png")
        member.size = len(png())
        archive.addfile(member, io.BytesIO(png()))
    result = run("batch", "x.tar", QUESTION)
    assert [image for image, *_ in facts(rows_of(result.stdout))] == ["a.png"]
    assert "links, devices and files with holes that are passed over: 5" in result.stderr


def test_a_tar_that_was_cut_off(run: Run) -> None:
    for name, pack in (("x.tar", bytes), ("x.tar.gz", lambda data: gzip.compress(data)[:-20])):
        Path(name).write_bytes(pack(tar_of({"a.png": png(1), "b.png": png(2) + bytes(5_000)})[:4_000]))
        result = run("batch", name, QUESTION)
        rows = rows_of(result.stdout)
        assert [(row["image"], row["status"]) for row in rows] == [("a.png", "ok"), ("b.png", "error")], result.stderr
        assert "damaged, or cut off: what is behind byte" in result.stderr


def manifest(run: Run, *words: str) -> list[Row]:
    """The tasks of a run."""
    result = run("batch", *words, "-o", "out.jsonl")
    assert result.exit_code == 0, result.stderr
    tasks = rows_of(Path("out.jsonl.run/manifest").read_bytes())
    for path in [*Path("out.jsonl.run").iterdir(), Path("out.jsonl")]:
        path.unlink()
    return tasks


def test_a_webdataset(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONTEXT_BYTES", 500)
    files = {
        "s/0.json": json.dumps({"question": "own?", "id": 7, "answer": 3, "deep": {"er": [1]}, "image": "x"}).encode(),
        "s/0.jpg": png(0),
        "s/0.cls": b"12\n",
        "s/1.png": png(1),
        "s/1.caption.txt": "ein Stück".encode(),
        "s/1.json": b"{broken",
        "s/2.png": png(2),
        "s/2.json": json.dumps({"long": "x" * 600}).encode(),
        "alone.json": b"{}",
    }
    for name in ("pax.tar", "x.tar.gz"):
        WRITERS[name](name, files)
        first, second, third = manifest(run, name, QUESTION)
        row = {"deep": {"er": [1]}, "image": "x", "cls": 12}
        assert first == {"image": "s/0.jpg", "question": "own?", "id": 7, "answer": "3", "row": row}
        assert second == {"image": "s/1.png", "question": QUESTION, "row": {"caption.txt": "ein Stück"}}
        assert third == {"image": "s/2.png", "question": QUESTION}
        (chosen,) = manifest(run, name, QUESTION, "--include", "*.jpg")
        assert chosen == first  # with what stands beside it, which no pattern names
    named = rows_of(run("batch", "pax.tar", QUESTION, "--include", "s/1.*").stdout)
    assert [row["image"] for row in named] == ["s/1.png", "s/1.caption.txt", "s/1.json"]
    result = run("batch", "pax.tar", QUESTION)
    assert (
        "1 file is no picture (1 .json)" in result.stderr
        and "files beside pictures that cannot be read: 2" in result.stderr
    )


# Tables.

TABLES: dict[str, Callable[[pyarrow.Table, str], Any]] = {
    "x.parquet": lambda table, path: parquet.write_table(table, path, row_group_size=2),
    "x.feather": lambda table, path: feather.write_feather(table, path, chunksize=2),
    "x.arrow": write_stream,
}


@for_each("name", TABLES, own=(here,))
def test_a_table(name: str, run: Run) -> None:
    """Bytes, the struct of the datasets library, and paths; other columns say more of the picture."""
    Path("p").mkdir()
    for number in range(5):
        Path("p", f"{number}.png").write_bytes(png(number))
    paths = [f"p/{number}.png" for number in range(5)]
    pictures = [png(number) for number in range(5)]
    structs = [{"bytes": None if n == 3 else png(n), "path": paths[n]} for n in range(5)]
    when = pyarrow.array([1_700_000_000_000_000_001] * 5, pyarrow.timestamp("ns", "Europe/Paris"))
    others = {"n": list(range(5)), "when": when, "f": [1.5, float("nan"), None, 2.0, 3.0], "tags": [["a", "b"]] * 5}
    for column, named in ((pictures, "01234"), (structs, "01234"), (paths, paths)):
        TABLES[name](table_of(image=column, **others), name)
        tasks = manifest(run, name, QUESTION)
        assert [task["image"] for task in tasks] == list(named)
        assert tasks[0]["row"] == {"n": 0, "when": "2023-11-14T22:13:20", "f": 1.5, "tags": ["a", "b"]}
        assert tasks[1]["row"] == {"n": 1, "when": "2023-11-14T22:13:20", "tags": ["a", "b"]}
        command = ("batch", name, QUESTION, "-o", "out.jsonl")
        assert run(*command).exit_code == 0
        whole = Path("out.jsonl").read_bytes()
        hashes = [sha for _, sha, _ in facts(rows_of(run("batch", "p", QUESTION).stdout))]
        assert [row["sha256"] for row in rows_of(whole)] == hashes
        os.truncate("out.jsonl", whole.index(b"\n") * 3)
        assert run(*command).exit_code == 0 and Path("out.jsonl").read_bytes() == whole
        for path in [*Path("out.jsonl.run").iterdir(), Path("out.jsonl")]:
            path.unlink()


def test_a_table_of_questions(run: Run) -> None:
    parquet.write_table(
        table_of(pic=[png(1), png(2)], question=["what?", None], id=["x", "y"], answer=["it", "no"]), "q.parquet"
    )
    tasks = manifest(run, "q.parquet", QUESTION)
    assert [(task["question"], task["id"], task["answer"]) for task in tasks] == [
        ("what?", "x", "it"),
        (QUESTION, "y", "no"),
    ]
    result = run("batch", "q.parquet")
    assert result.exit_code == 65 and "llava: q.parquet, 1: there is no question about it" in result.stderr
    parquet.write_table(table_of(pic=[png()] * 60, question=["what?"] * 59 + [None]), "q.parquet")
    assert not run("batch", "q.parquet").stdout  # found before anything is asked
    parquet.write_table(table_of(pic=[png(), None]), "q.parquet")
    assert "\n1: has no picture in q.parquet\n" in "\n" + run("batch", "q.parquet", QUESTION).stderr


@for_each(
    ("columns", "said"),
    [
        ({"a": [b"1"], "b": [b"2"]}, "it is not clear which column has the pictures: 'a', 'b'"),
        ({"img": [b"1"], "picture": [b"2"]}, "it is not clear which column has the pictures: 'img', 'picture'"),
        ({"text": ["x"], "n": [1]}, "none of its columns has pictures: 'text', 'n'"),
        ({"img\x1b[2J": [[1]]}, "none of its columns has pictures: 'img\\\\x1b[2J'"),
    ],
    own=(here,),
)
def test_columns_that_are_not_clear(columns: dict[str, Any], said: str, run: Run) -> None:
    parquet.write_table(table_of(**columns), "x.parquet")
    result = run("batch", "x.parquet", QUESTION)
    assert result.exit_code == 65 and f"llava: x.parquet: {said}\n  call it image" in result.stderr


@for_each(
    "columns",
    [{"a": [b"1"], "image": [b"2"]}, {"a": [b"1"], "jpg": [b"2"]}, {"image": ["p"], "path": ["q"]}],
    own=(here,),
)
def test_a_column_that_is_called_so(columns: dict[str, Any]) -> None:
    parquet.write_table(table_of(**columns), "x.parquet")
    table = open_container("x.parquet")
    assert isinstance(table, Table)
    assert table._column_of_pictures() in ("image", "jpg")
    table.close()


def test_a_table_names_no_pictures_outside_its_folder(run: Run) -> None:
    Path("secret.png").write_bytes(png())
    Path("sub").mkdir()
    Path("sub/link.png").symlink_to("../secret.png")
    Path("sub/in.png").write_bytes(png())
    names = ["../secret.png", str(Path("secret.png").absolute()), "link.png", "in.png", "", "a\0b"]
    parquet.write_table(table_of(image=names), "sub/x.parquet")
    result = run("batch", "sub/x.parquet", QUESTION)
    assert [row["status"] for row in rows_of(result.stdout)] == ["error", "error", "error", "ok"]
    assert "rows without a picture: 2" in result.stderr
    rows = rows_of(run("batch", "sub/x.parquet", QUESTION, "--root", ".").stdout)
    assert [row["error"] and row["error"]["message"] for row in rows[1:3]] == [None, None] or rows[1]["status"] == "ok"
    elsewhere = container_in("far.parquet", lambda: open("sub/x.parquet", "rb"))  # noqa: SIM115
    assert elsewhere
    with pytest.raises(InputMissing, match="which has only its path"):
        elsewhere.read("in.png")
    elsewhere.close()


def test_a_tables_process_has_no_rights_and_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: list[int] = []

    class Noted(Worker):
        def __init__(self, job: str, most: int, *arguments: str, **options: Any) -> None:
            memory.append(most)
            super().__init__(job, most, *arguments, **options)

    monkeypatch.setattr("llava_cli.batch.sources.containers.table.Worker", Noted)
    parquet.write_table(table_of(image=[png(), bytes(5_000)], text=["short", "x" * 5_000]), "x.parquet")
    table = open_container("x.parquet")
    assert isinstance(table, Table)
    assert set(table._worker.layers()) >= {"limits"} and memory == [limits.TABLE_MEMORY]
    assert limits.TABLE_READ_BYTES < limits.TABLE_MEMORY
    monkeypatch.setattr(limits, "PICTURE_BYTES", 4_000)
    assert table.read("0") == png()
    with pytest.raises(LlavaError):
        table.read("1")
    for name in ("2", "-1", "9" * 18, "x", "٣"):
        with pytest.raises(InputMissing, match="is no row of"):
            table.read(name)
    table.close()
    monkeypatch.setattr(limits, "TABLE_COLUMNS", 1)
    with pytest.raises(BadData, match="it has more than 1 columns"):
        open_container("x.parquet")
    monkeypatch.setattr(limits, "TABLE_SECONDS", 0.0)
    with pytest.raises(BadData, match="crashes its reader"):
        open_container("x.parquet")


@for_each("seed", range(30), own=(here,))
def test_tables_that_are_damaged_anywhere(seed: int) -> None:
    """Each is an error, or pictures; the process that reads it may crash, ours does not."""
    from random import Random

    random = Random(seed)
    name = random.choice(list(TABLES))
    TABLES[name](table_of(image=list(PICTURES.values()), text=["x"] * 6), name)
    data = bytearray(Path(name).read_bytes())
    for _ in range(random.choice((1, 3, 30))):
        data[random.randrange(4, len(data))] = random.randrange(256)
    Path(name).write_bytes(data[: random.choice((len(data), random.randrange(4, len(data))))])
    archive_errors(name)


def test_without_pyarrow_its_extra_is_named(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr("llava_cli.batch.sources.containers.table.find_spec", lambda name: None)
    Path("x.parquet").write_bytes(b"PAR1" + bytes(100))
    result = run("batch", "x.parquet", QUESTION)
    assert result.exit_code == 65 and "pip install 'llava-cli[tables]'" in result.stderr


# Several SOURCEs.


def test_sources_of_all_kinds_at_once(run: Run) -> None:
    WRITERS["x.zip"]("a.zip", PICTURES)
    for name in ("s-08.tar", "s-09.tar", "s-10.tar"):
        WRITERS["pax.tar"](name, {"1.png": png(1)})
    for folder in ("photos", "data", "lists"):
        Path(folder).mkdir()
        Path(folder, "p.png").write_bytes(png(9))
    Path("data/more.jsonl").write_text('{"image": "p.png", "question": "own?"}\n{"image": "p.png", "other": 3}\n')
    Path("lists/list.csv").write_text('image,region,"a;b;c"\np.png,"0,0,50%,100%",x\n')
    parquet.write_table(table_of(image=[png(1)]), "t.parquet")
    words = [
        "a.zip",
        "s-{08..10}.tar",
        "photos/",
        "data/more.jsonl",
        "lists/list.csv",
        "t.parquet",
        "-",
        "photos/p.png",
    ]
    result = run("batch", *words, QUESTION, input="data/p.png\n")
    assert [image for image, *_ in facts(rows_of(result.stdout))] == [
        *(f"a.zip/{name}" for name in PICTURES),
        *("s-08.tar/1.png", "s-09.tar/1.png", "s-10.tar/1.png"),
        *("photos/p.png", "data/p.png", "data/p.png", "lists/p.png", "t.parquet/0", "data/p.png", "photos/p.png"),
    ], result.stderr
    assert "llava: data/more.jsonl: ignored keys: 'other' (1 row)" in result.stderr
    command = ("batch", *words[:-2], QUESTION, "-o", "out.jsonl")
    assert run(*command).exit_code == 0
    whole = Path("out.jsonl").read_bytes()
    os.truncate("out.jsonl", whole.index(b"\n") * 4)
    assert run(*command).exit_code == 0 and Path("out.jsonl").read_bytes() == whole


def test_other_sources_open_nothing_for_a_questions_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else may be opened, what a stranger's questions name must be below their folder."""
    Path("secret.png").write_bytes(png())
    Path("data").mkdir()
    Path("data/link.png").symlink_to("../secret.png")
    names = ["../secret.png", str(Path("secret.png").absolute()), "link.png"]
    Path("data/q.jsonl").write_text("".join(json.dumps({"image": name}) + "\n" for name in names))
    Path("list.txt").write_text("secret.png\n")
    rows = rows_of(run("batch", "list.txt", "data/q.jsonl", QUESTION).stdout)
    assert [row["status"] for row in rows] == ["ok", "error", "error", "error"]
    WRITERS["x.zip"]("a.zip", PICTURES)
    for other, name in (("secret.png", "../secret.png"), ("a.zip", "../a.zip/a/0.png"), (".", "../secret.png")):
        Path("data/one.jsonl").write_text(json.dumps({"image": name}))
        rows = rows_of(run("batch", other, "data/one.jsonl", QUESTION).stdout)
        assert [row["status"] for row in rows] == ["ok"] * (len(rows) - 1) + ["error"]
    monkeypatch.setattr(limits, "COUNTED_NAMES", 2)
    result = run("batch", "list.txt", "data/q.jsonl", QUESTION, "-o", "out.jsonl")
    assert result.exit_code == 65 and "names more than 2 pictures outside" in result.stderr


def test_braces() -> None:
    from llava_cli.batch.sources.source_arguments import expand_braces

    assert expand_braces("{a,b}-{08..10}") == ["a-08", "a-09", "a-10", "b-08", "b-09", "b-10"]
    assert expand_braces("{3..1}{}{x}") == ["3{}{x}", "2{}{x}", "1{}{x}"]
    assert limits.EXPANDED_WORDS == 100_000


@for_each(
    ("line", "said"),
    [
        ('{"image": "a.png", "page": 0}', "'page' is not what it should be\n  \"page\": 2"),
        ('{"image": "a.png", "time": "noon"}', "'time' is not what it should be"),
        ('{"image": "a.png", "region": "left"}', "'left' is no region"),
        ('{"image": "a.png", "region": [1, 2]}', "is no region"),
    ],
    own=(here,),
)
def test_places_of_a_questions_file_that_are_none(line: str, said: str, run: Run) -> None:
    Path("q.jsonl").write_text(line)
    result = run("batch", "q.jsonl", QUESTION)
    assert result.exit_code == 65 and "llava: q.jsonl, line 1: " in result.stderr and said in result.stderr


def test_places_and_other_columns_of_a_table_of_text(run: Run) -> None:
    Path("a.png").write_bytes(png())
    Path("q.tsv").write_text(
        "image\tregion\tpage\ttime\tid\tshop, name\trow\na.png\t0, 0,50%,100%\t1\t2.50\tx\tÀ la\tr\n"
    )
    (task,) = manifest_even_if_rows_fail(run, "q.tsv", QUESTION)
    assert {key: task[key] for key in ("region", "page", "time", "id")} == {
        "region": "0,0,50%,100%",
        "page": 1,
        "time": 2.5,
        "id": "x",
    }
    assert task["row"] == {"shop, name": "À la", "row": "r"}


def manifest_even_if_rows_fail(run: Run, *words: str) -> list[Row]:
    run("batch", *words, "-o", "out.jsonl")
    return rows_of(Path("out.jsonl.run/manifest").read_bytes())


@for_each("name", ["x.tar.gz", "x.tar.bz2", "no ending"], own=(here,))
def test_a_stream_is_read_no_more_often_than_it_must_be(name: str) -> None:
    """Who looks for pages is ahead of who opens the pictures; both read forward."""
    WRITERS[name](name, PICTURES)
    opened = []

    def open_file() -> Any:
        opened.append(open(name, "rb"))  # noqa: SIM115
        return opened[-1]

    archive = container_in(name, open_file)
    assert archive and archive.readers == 1
    names = [entry.name for entry in archive.entries()]
    before = len(opened)
    for behind, ahead in zip(names, names[2:], strict=False):
        assert (archive.read(ahead), archive.read(behind)) == (PICTURES[ahead], PICTURES[behind])
    assert len(opened) == before + 2
    archive.close()
    assert all(file.closed for file in opened)
