"""Whoever wrote rows or questions does not choose among all the files of this machine."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.faults import Told
from helpers.homes import home
from helpers.tables import for_each
from PIL import Image

from llava_cli.batch import run as module
from llava_cli.batch.rows import to_line
from llava_cli.paths import data_folder

QUESTION = "what is this?"
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a data set in it, `set/`; beside it are private pictures. No model is loaded."""
    monkeypatch.setattr(module, "open_engine", lambda *_: Told())
    for name in ("here/set/a.png", "here/set/sub/b.png", "here/private/me.png", "here/set-private/me.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), "teal").save(tmp_path / name)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def asked(images: list[str], name: str = "set/q.jsonl") -> str:
    Path(name).write_text("".join(json.dumps({"image": image, "question": QUESTION}) + "\n" for image in images))
    return name


def rows_of(text: str | bytes) -> list[Row]:
    return [json.loads(line) for line in text.splitlines()]


def link_out(here: Path) -> None:
    (here / "set" / "file.png").symlink_to("../private/me.png")
    (here / "set" / "folder").symlink_to(here / "private")
    (here / "set" / "up").symlink_to("..")
    (here / "set" / "chain.png").symlink_to("sub/next.png")
    (here / "set" / "sub" / "next.png").symlink_to("../folder/me.png")
    (here / "set" / "inner.png").symlink_to("sub/b.png")


OUT = [
    "../private/me.png",
    "sub/../../private/me.png",
    "HERE/private/me.png",
    "//HERE/private/me.png",
    "../set-private/me.png",
    "HERE/set/../private/me.png",
    "file.png",
    "folder/me.png",
    "up/private/me.png",
    "up/set/up/private/me.png",
    "chain.png",
    "/etc/passwd",
    "/proc/self/cwd/private/me.png",
    "../nowhere.png",
]
IN = ["a.png", "./a.png", "sub/../a.png", "sub/b.png", "HERE/set/a.png", "../set/a.png", "inner.png", "up/set/a.png"]


def named(image: str, here: Path) -> str:
    return image.replace("HERE", str(here))


def test_questions_about_pictures_outside(here: Path, run: Run) -> None:
    """Error rows, whether there are such pictures or not; the others are answered."""
    link_out(here)
    outside = [named(image, here) for image in OUT]
    result = run("batch", asked([*outside, "a.png"]))
    assert result.exit_code == 1
    *refused, answered = rows_of(result.stdout)
    assert answered["status"] == "ok"
    for image, row in zip(outside, refused, strict=True):
        assert (row["image"], row["answer"], row["sha256"]) == (image, None, None)
        assert row["error"] == {"type": "InputMissing", "message": "is outside set"}
    first, summary = result.stderr.splitlines()
    assert first.endswith(": is outside set; --root FOLDER names another root")
    assert f"{len(OUT)} failed (InputMissing {len(OUT)})" in summary
    assert run("batch", "set/q.jsonl", "-q").stderr == ""


def test_questions_about_pictures_inside(here: Path, run: Run) -> None:
    link_out(here)
    inside = [named(image, here) for image in IN]
    rows = rows_of(run("batch", asked(inside)).stdout)
    assert [(row["image"], row["status"]) for row in rows] == [(image, "ok") for image in inside]


def test_the_user_names_another_root(here: Path, run: Run) -> None:
    link_out(here)
    outside = [named(image, here) for image in ("HERE/private/me.png", "private/me.png", "set/file.png", "set/a.png")]
    status = {
        root: [row["status"] for row in rows_of(run("batch", asked(outside), "--root", root).stdout)]
        for root in (".", "/", "private", "set/up")
    }
    assert status["."] == status["set/up"] == ["ok"] * 4
    assert status["/"] == ["ok", "error", "error", "error"]  # relative paths begin there
    assert status["private"] == ["ok", "error", "error", "error"]


def test_the_folder_itself_is_no_picture_and_no_way_out(run: Run) -> None:
    rows = rows_of(run("batch", asked([".", "..", "/"])).stdout)
    assert [row["error"]["message"] for row in rows] == ["is a directory", "is outside set", "is outside set"]


def test_a_link_to_itself_is_named(here: Path, run: Run) -> None:
    (here / "set" / "loop.png").symlink_to("loop.png")
    (row,) = rows_of(run("batch", asked(["loop.png"])).stdout)
    assert row["error"] == {"type": "InputMissing", "message": "too many levels of symbolic links"}


def planted(path: Path, *tasks: Row) -> None:
    """A run that was cut off before its first row, and whose manifest a stranger has written."""
    (path.with_name(path.name + ".run") / "manifest").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    path.write_bytes(b"")


@pytest.mark.parametrize("source", ["set", "set/q.jsonl"])
def test_a_manifest_leads_no_further_than_its_source(source: str, here: Path, run: Run) -> None:
    link_out(here)
    asked(["a.png"])
    command = ("batch", source, QUESTION, "-o", "out.jsonl")
    assert run(*command).exit_code == 0
    outside = ["../private/me.png", str(here / "private" / "me.png"), "sub/../../private/me.png"]
    planted(here / "out.jsonl", *({"image": image, "question": QUESTION} for image in [*outside, "a.png"]))
    assert run(*command).exit_code == 1
    rows = rows_of((here / "out.jsonl").read_bytes())
    assert [row["error"] and row["error"]["message"] for row in rows] == ["is outside set"] * 3 + [None]


@for_each(
    "task",
    [
        {"image": 1, "question": QUESTION},
        {"image": None, "question": QUESTION},
        {"image": "", "question": QUESTION},
        {"image": "a\0.png", "question": QUESTION},
        {"image": ["a.png"], "question": QUESTION},
        {"image": "a.png", "question": None},
        {"image": "a.png", "question": QUESTION, "id": {}},
        {"image": "a.png", "question": QUESTION, "system": 3},
        {"image": "a.png", "question": QUESTION, "max_tokens": -1},
        {"image": "a.png", "question": QUESTION, "max_tokens": 1e300},
        {"image": "a.png", "question": QUESTION, "answer": [["a"]]},
        {"image": "a.png", "question": QUESTION, "other": 1},
        {"image": "a.png"},
        [],
    ],
    own=(here,),
)
def test_a_manifest_that_is_none(task: Any, here: Path, run: Run) -> None:
    command = ("batch", "set", QUESTION, "-o", "out.jsonl")
    assert run(*command).exit_code == 0
    planted(here / "out.jsonl", task)
    result = run(*command)
    assert (result.exit_code, result.stdout) == (65, "")
    assert result.stderr == "llava: manifest: damaged\n  give another file to -o\n"


# Reports.


def row(image: str, **more: Any) -> Row:
    return {"image": image, "question": QUESTION, "answer": "a cat", "status": "ok", "error": None, **more}


def shown(page: Path) -> list[str]:
    """Of each row of a page, why it has no thumbnail, or nothing."""
    text = page.read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line.startswith('{"n":')]
    assert all(("thumb" in row) != ("why" in row) for row in rows)
    return [row.get("why", "") for row in rows]


def unpacked(folder: Path, images: list[str], settings: Row | None = None) -> Path:
    """Rows that a stranger has sent, with settings of a run beside them."""
    folder.mkdir(exist_ok=True)
    (folder / "out.jsonl").write_bytes(b"".join(map(to_line, map(row, images))))
    if settings is not None:
        (folder / "out.jsonl.run").mkdir(exist_ok=True)
        (folder / "out.jsonl.run" / "settings.json").write_text(json.dumps(settings))
    return folder / "out.jsonl"


@for_each("root", [None, "HERE/set", "HERE/private", "HERE", "/", "..", "private"], own=(here,))
def test_a_strangers_rows_show_no_picture_of_this_machine(root: str | None, here: Path, run: Run) -> None:
    link_out(here)
    settings = None if root is None else {"root": named(root, here), "signed": "0" * 64, "allow_truncated": True}
    source = unpacked(here / "set", [*(named(image, here) for image in OUT), "me.png", "a.png"], settings)
    for folder in (here, here / "set"):
        os.chdir(folder)
        assert run("report", source).exit_code == 0
        *outside, inside = shown(here / "set" / "out.html")
        assert all(why.startswith(("not opened: outside ", "missing: ")) for why in outside), outside
        assert inside == ""


def test_settings_of_another_run_are_not_those_of_these_rows(here: Path, run: Run) -> None:
    """A signature of this user's own, taken from rows that were shared, is of no use in another place."""
    assert run("batch", "private", QUESTION, "-o", "mine.jsonl").exit_code == 0
    settings = json.loads((here / "mine.jsonl.run" / "settings.json").read_text())
    assert len(settings["signed"]) == 64
    source = unpacked(here / "set", ["me.png"], settings)
    assert run("report", source).exit_code == 0
    assert shown(here / "set" / "out.html") == [f"not opened: outside {here / 'set'}"]
    (here / "mine.jsonl.run" / "settings.json").write_text(json.dumps({**settings, "root": str(here)}))
    (here / "mine.jsonl").write_bytes(to_line(row("private/me.png")) + to_line(row("../private/me.png")))
    assert run("report", "mine.jsonl", "-o", "mine.html").exit_code == 0
    assert shown(here / "mine.html")[1] == "not opened: outside ."


@for_each("signed", [None, 1, "", "é" * 64, ["x"], {}], own=(here,))
def test_signatures_that_are_none(signed: Any, here: Path, run: Run) -> None:
    source = unpacked(here / "set", ["me.png"], {"root": str(here / "private"), "signed": signed})
    assert run("report", source).exit_code == 0
    assert shown(here / "set" / "out.html") == [f"not opened: outside {here / 'set'}"]


@for_each("key", ["gone", "short", "long", "open to others", "link", "folder"], own=(home, here))
def test_a_key_that_is_none_signs_nothing(key: str, here: Path, run: Run) -> None:
    path = data_folder() / "rows.key"
    assert run("batch", "private", QUESTION, "-o", "set/out.jsonl").exit_code == 0
    assert path.stat().st_mode & 0o777 == 0o600
    if key in ("short", "long"):
        path.write_bytes(b"k" * (31 if key == "short" else 33))
    elif key == "open to others":
        path.chmod(0o666)
    else:
        path.rename(path.with_name("real"))
    if key == "link":
        path.symlink_to("real")
    elif key == "folder":
        path.mkdir()
    assert run("report", "set/out.jsonl").exit_code == 0
    assert shown(here / "set" / "out.html") == ["not opened: outside set"]


@for_each(
    "folder, output",
    itertools.product(["private", "HERE/private", "set"], ["out.jsonl", "results/out.jsonl"]),
    own=(here,),
)
def test_the_pictures_of_ones_own_run(folder: str, output: str, here: Path, run: Run) -> None:
    """Wherever they were, and wherever the report is made."""
    Path("results").mkdir()
    assert run("batch", named(folder, here), QUESTION, "-o", output).exit_code == 0
    for place in (here, here / "private"):
        os.chdir(place)
        done = run("report", here / output)
        assert (done.exit_code, "--root" in done.stderr) == (0, False)
        assert set(shown(here / Path(output).with_suffix(".html"))) == {""}


def test_the_pictures_of_a_list(here: Path, run: Run) -> None:
    """Those below the folder that it was read in; others need a word."""
    listed = f"private/me.png\n{here / 'set' / 'a.png'}\n{here.parent / 'far' / 'c d' / 'x.png'}"
    shutil.copytree("private", here.parent / "far" / "c d")
    (here.parent / "far" / "c d" / "me.png").rename(here.parent / "far" / "c d" / "x.png")
    Path("results").mkdir()
    assert run("batch", "-", QUESTION, "-o", "results/out.jsonl", input=listed).exit_code == 0
    done = run("report", "results/out.jsonl")
    assert shown(here / "results" / "out.html") == ["", "", "not opened: outside results"]
    first, line = done.stderr.splitlines()
    assert first.endswith("out.html: 3 rows, 1 without their picture")
    assert line == f"  Pictures outside results: --root {shlex.quote(str(here.parent / 'far' / 'c d'))} shows them."
    assert "--root" not in run("report", "-q", "results/out.jsonl").stderr


def test_rows_that_were_moved_name_the_root_to_give(here: Path, run: Run) -> None:
    assert run("batch", "set", QUESTION, "-o", "out.jsonl").exit_code == 0
    Path("elsewhere").mkdir()
    for name in ("out.jsonl", "out.jsonl.run"):
        Path(name).rename(Path("elsewhere", name))
    done = run("report", "elsewhere/out.jsonl")
    assert shown(here / "elsewhere" / "out.html") == ["not opened: outside elsewhere"] * 2
    words = shlex.split(done.stderr.splitlines()[1])
    assert words[words.index("--root") + 1] == str(here / "set")
    done = run("report", "elsewhere/out.jsonl", "--root", here / "set")
    assert (shown(here / "elsewhere" / "out.html"), "--root" in done.stderr) == (["", ""], False)


def test_the_user_names_the_root_of_a_report(here: Path, run: Run) -> None:
    link_out(here)
    source = unpacked(here / "set", [named("HERE/private/me.png", here), "file.png", "a.png", "me.png"])
    found = {}
    for root in ("/", "private", "set", ".."):
        assert run("report", source, "--root", root).exit_code == 0
        found[root] = [why.partition(" ")[0] for why in shown(here / "set" / "out.html")]
    assert found["/"] == found[".."] == ["", "", "", "missing:"]
    assert found["private"] == ["", "", "missing:", ""]
    assert found["set"] == ["not", "not", "", "missing:"]


def test_what_was_asked_about_is_what_is_shown(here: Path, run: Run) -> None:
    digest = hashlib.sha256((here / "set" / "a.png").read_bytes()).hexdigest()
    source = unpacked(here / "set", [])
    source.write_bytes(to_line(row("a.png", sha256=digest)) + to_line(row("a.png", sha256="0" * 64)))
    assert run("report", source).exit_code == 0
    assert shown(here / "set" / "out.html") == ["", "changed since it was asked about"]


@for_each("what", ["fifo", "link", "folder", "huge", "deep", "list", "number", "not UTF-8"], own=(here,))
def test_settings_beside_rows_that_are_none(what: str, here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as good as not there, and nobody waits for them."""
    from llava_cli import limits

    source = unpacked(here / "set", ["a.png", "../private/me.png"], {})
    path = here / "set" / "out.jsonl.run" / "settings.json"
    path.unlink()
    text = {"deep": "[" * 100_000, "list": "[1]", "number": '{"root": 1}', "not UTF-8": '{"root": "\udcff"}'}
    if what == "fifo":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    else:
        monkeypatch.setattr(limits, "SETTINGS_BYTES", 300)
        path.write_bytes(os.fsencode(text.get(what, '{"root": "/", "x": "' + "x" * 400 + '"}')))
    assert run("report", source).exit_code == 0
    assert shown(here / "set" / "out.html") == ["", f"not opened: outside {here / 'set'}"]
