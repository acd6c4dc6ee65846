"""What creates files: never through a link, never another user's, whole or not at all; and nothing else creates any."""

from __future__ import annotations

import ast
import errno
import itertools
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.command import Run
from helpers.faults import give_away
from helpers.tables import for_each
from PIL import Image

import llava_cli
from llava_cli import files

PACKAGE = Path(llava_cli.__file__).parent
Write = Callable[[Path], object]


# All that creates is in one place.

MAKERS = {
    *("write_text", "write_bytes", "touch", "mkdir", "makedirs", "mkfifo", "mknod", "symlink_to", "hardlink_to"),
    *("mkstemp", "mkdtemp", "mktemp", "TemporaryDirectory", "NamedTemporaryFile", "TemporaryFile"),
    *("SpooledTemporaryFile", "FileHistory", "FileHandler", "FileLock", "WeakFileLock", "memmap", "extractall"),
    *("save_file", "save_pretrained", "serialize_file"),
}
"""Names of functions that create files or folders, whoever they belong to."""
COPIES = {f"shutil.{name}" for name in ("copy", "copy2", "copyfile", "copytree", "move", "unpack_archive")}

ALLOWED = {
    ("paths.py", "from tempfile import TemporaryDirectory"): "imported where it is used, for it takes its time",
    ("paths.py", "TemporaryDirectory"): "a new folder, whose name nobody can guess, of mode 0700",
    ("batch/scratch.py", "sqlite3.connect"): "in that folder",
    ("batch/cluster/cluster.py", "mkdtemp"): "a new folder of mode 0700, whose name is short",
    ("batch/cluster/cluster.py", "open"): "a copy of stderr, by its number",
    ("batch/ranges/folder_run.py", "os.link"): "a second name of our own attempt, which never takes another's place",
    ("batch/scratch.py", "open"): "in that folder",
    ("batch/ranges/bucket_files.py", "files.open"): "an object of a bucket",
    ("batch/dry_run/survey.py", "sqlite3.connect"): "a file of SQLite's own that has no name",
    ("batch/sources/containers/table_job.py", "open"): "the pipes of a sandboxed process, by their numbers",
    ("hardware/memory.py", "write_text"): "into the kernel's file of this process",
    ("images/films.py", "from tempfile import TemporaryFile"): "imported where it is used",
    ("images/films.py", "TemporaryFile"): "a file without a name",
    ("images/films.py", "open"): "a file in memory, by its number",
    (
        "chat/keyboard.py",
        "FileHistory",
    ): "appends to a file that `files.make_own_file` has made, in the user's own folder",
    ("chat/store.py", "sqlite3.connect"): "the same",
    ("chat/session.py", "self._store.save"): "in the database of `chat/store.py`",
    ("convert/output.py", "mkdir"): "the folders above one that the user names; what is written is in a new one",
    ("convert/output.py", "save_file"): "into that new folder",
    ("convert/tokenizer.py", "save_pretrained"): "into the scratch folder of `paths.py`",
    ("models/download.py", "WeakFileLock"): "the lock that huggingface_hub takes, too; links are refused before",
    ("start.py", "open"): "a stream of this process, by its number",
    ("models/quantized_cache.py", "save_pretrained"): "into a new folder of mode 0700, in one that is the user's own",
    ("models/quantized_cache.py", "save_file"): "into the same new folder",
}


def creators(source: str) -> Iterator[tuple[int, str]]:
    """What may create a file or folder in a module: (line, what it is)."""
    tree = ast.parse(source)
    in_memory = set(re.findall(r"(\w+) :?= io\.BytesIO\(\)", ast.unparse(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := made_by(node, in_memory)):
            yield node.lineno, called
        elif isinstance(node, ast.Attribute) and node.attr in ("O_CREAT", "O_TMPFILE"):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "io", "shutil", "tempfile", "sqlite3"):
            for name in node.names:
                if f"{node.module}.{name.name}" in COPIES or name.name in {
                    *MAKERS,
                    "open",
                    "connect",
                    "link",
                    "symlink",
                }:
                    yield node.lineno, f"from {node.module} import {name.name}"


def made_by(call: ast.Call, in_memory: set[str]) -> str | None:
    """What a call is to, where that may create a file; `in_memory` are the names of those that are no files."""
    called = ast.unparse(call.func)
    name = called.rpartition(".")[2]
    first = ast.unparse(call.args[0]) if call.args else ""
    if name in MAKERS:
        return name
    if name == "open" and called != "os.open" and first not in ("os.devnull", "descriptor"):  # which is open already
        values = [*call.args, *(word.value for word in call.keywords)]
        texts = [str(value.value) for value in values if isinstance(value, ast.Constant)]
        return called if any(re.fullmatch("[rwaxbtU+]*[wax+][rwaxbtU+]*", text) for text in texts) else None
    if name == "save":
        return called if re.split(r"\W", first.strip("("))[0] not in in_memory else None
    return called if called in ("sqlite3.connect", "os.link", "os.symlink", *COPIES) else None


@for_each(
    "line",
    [
        'open(path, "w")',
        'open(path, mode="ab", buffering=0)',
        'path.open("x")',
        'io.open(path, "r+b")',
        'gzip.open(path, "wt")',
        "os.open(path, os.O_RDWR | os.O_CREAT)",
        "os.open(path, flags | os.O_TMPFILE)",
        "path.write_text(text)",
        "path.parent.mkdir(exist_ok=True)",
        "os.makedirs(path)",
        "tempfile.mkstemp(dir=folder)",
        "with tempfile.TemporaryDirectory() as folder: pass",
        "image.save(path)",
        "data = io.BytesIO(); image.save(path / name, 'PNG')",
        "sqlite3.connect(path)",
        "shutil.copy(one, other)",
        "from os import open",
        "from shutil import copyfile",
    ],
)
def test_what_creates_files_is_found(line: str) -> None:
    assert list(creators(line))


@for_each(
    "line",
    [
        'open(path, "rb")',
        "path.open()",
        'open(os.devnull, "w")',
        'open(descriptor, "w")',
        "os.open(path, os.O_RDONLY)",
        "Image.open(file, formats=formats)",
        "data = io.BytesIO(); image.save(data, 'PNG')",
        "image.save(data := io.BytesIO(), kind)",
        "text.replace('w', 'x')",
        "image.copy(); options.copy()",
        "shutil.disk_usage(folder)",
    ],
)
def test_what_creates_none_is_not(line: str) -> None:
    assert not list(creators(line))


def test_nothing_else_creates_files() -> None:
    found = [
        (file, line, call)
        for path in sorted(PACKAGE.rglob("*.py"))
        if (file := path.relative_to(PACKAGE).as_posix()) != "files.py"
        for line, call in creators(path.read_text("utf-8"))
        if (file, call) not in ALLOWED
    ]
    assert not found, "\n".join(f"llava_cli/{file}:{line}: {call}" for file, line, call in found)


# What is there already.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where somebody plants things."""
    (tmp_path / "planted").mkdir()
    return tmp_path / "planted"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that links lead to, and that nothing may touch."""
    (tmp_path / "secret").write_text("mine")
    return tmp_path / "secret"


def opened(path: Path) -> None:
    os.close(files.open_for_writing(path, os.O_RDWR | os.O_APPEND, files.SHARED))


def emptied(path: Path) -> None:
    os.close(files.open_for_writing(path, os.O_WRONLY | os.O_TRUNC, files.SECRET))


def put(path: Path) -> None:
    files.atomic_write(path, [b"new"])


def put_new(path: Path) -> None:
    files.write_new(path, b"new")


def updated(path: Path) -> None:
    files.update(path, [b"n", b"ew"], replace=True)


WRITES: list[Write] = [
    opened,
    emptied,
    put,
    put_new,
    updated,
    files.make_folder,
    files.make_new_folder,
    files.make_own_file,
]


@for_each("write, target", itertools.product(WRITES, ["../secret", "../nowhere", "..", "planted", "/dev/null"]))
def test_a_link_is_never_followed(write: Write, target: str, tmp_path: Path) -> None:
    (folder := tmp_path / "planted").mkdir()
    (secret := tmp_path / "secret").write_text("mine")
    (folder / "planted").symlink_to(target)
    with pytest.raises(OSError) as refused:
        write(folder / "planted")
    if not isinstance(refused.value, FileExistsError):  # of what has to be new
        assert isinstance(refused.value, files.IsLink)
        assert refused.value.strerror == f"is a link to {target}"
        assert refused.value.target == (target if target[0] == "/" else f"{folder}/{target}")
    assert os.readlink(folder / "planted") == target
    assert secret.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["planted", "secret"]
    assert os.listdir(folder) == ["planted"]


@for_each("write, what", itertools.product(WRITES, ["fifo", "folder", "file"]))
def test_what_is_there_and_is_no_regular_file(write: Write, what: str, tmp_path: Path) -> None:
    """A FIFO that nobody reads does not stop anybody."""
    path = tmp_path / "planted"
    {"fifo": os.mkfifo, "folder": os.mkdir, "file": lambda path: path.write_bytes(b"old")}[what](path)
    makes_folder = write in (files.make_folder, files.make_new_folder)
    is_new = write in (put_new, files.make_new_folder)
    if what == ("folder" if makes_folder else "file") and not is_new:
        write(path)
    else:
        with pytest.raises(
            OSError, match="File exists" if is_new else "not a (regular file|folder)|[Ii]s a directory|No such device"
        ):
            write(path)
        assert os.listdir(tmp_path) == ["planted"]
        if what == "file":
            assert path.read_bytes() == b"old"


@pytest.mark.parametrize("write", [opened, emptied, files.make_folder], ids=lambda write: write.__name__)
def test_what_another_user_may_have_planted(write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where everybody may write; what belongs to the folder's owner is no plant."""
    path = folder / "planted"
    path.mkdir() if write is files.make_folder else path.write_text("old")
    give_away(path, monkeypatch)
    folder.chmod(0o1777)
    with pytest.raises(OSError, match="belongs to another user"):
        write(path)
    assert path.is_dir() or path.read_text() == "old"
    give_away(folder, monkeypatch)
    write(path)


def test_a_second_name_of_a_file_where_everybody_may_write(folder: Path, secret: Path) -> None:
    os.link(secret, folder / "planted")
    folder.chmod(0o1777)
    for write in (opened, emptied, files.make_own_file):
        with pytest.raises(OSError, match="is a file of another name, too"):
            write(folder / "planted")
    put(folder / "planted")  # takes its place, and leaves the other
    assert secret.read_text() == "mine"


# Modes.


@pytest.fixture(params=[0, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_modes_of_what_is_new(umask: int, folder: Path) -> None:
    files.atomic_write(folder / "secret", [b""], files.SECRET)
    files.atomic_write(folder / "shared", [b""])
    files.write_new(folder / "new", b"")
    files.make_own_file(folder / "own")
    files.make_folder(folder / "a" / "folder")
    files.make_own_folder(folder / "b" / "ours")
    shared, open_to_all = 0o666 & ~umask, 0o777 & ~umask
    assert {path.name: mode(path) for path in folder.rglob("*")} == {
        **{"secret": 0o600, "shared": shared, "new": shared, "own": 0o600},
        **{"a": open_to_all, "folder": open_to_all, "b": open_to_all, "ours": 0o700},
    }


@for_each("before", [0o600, 0o640, 0o666, 0o400])
def test_a_file_that_is_there_keeps_its_mode(before: int, umask: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(before)
    for default in (files.SECRET, files.SHARED):
        files.atomic_write(path, [b"new"], default)
        assert (path.read_text(), mode(path)) == ("new", before)


def test_at_no_moment_may_others_read_what_is_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opens a file before its mode is changed may read it ever after."""
    path, seen = tmp_path / "file", []
    path.write_text("old")
    path.chmod(0o600)
    write = os.write

    def watched(descriptor: int, data: bytes) -> int:
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return write(descriptor, data)

    def watched_open(of: Path, flags: int, how: int = 0o777) -> int:
        seen.append(how)
        return real(of, flags, how)

    real = os.open
    monkeypatch.setattr(os, "write", watched)
    monkeypatch.setattr(os, "open", watched_open)
    files.atomic_write(path, [b"new"])
    assert seen[:2] == [0o600, 0o600]


def test_another_users_file_says_nothing_of_the_mode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lest somebody leaves one that all may read for what will be secret."""
    (folder / "file").touch()
    (folder / "file").chmod(0o666)
    give_away(folder / "file", monkeypatch)
    files.atomic_write(folder / "file", [b"new"], files.SECRET)
    assert mode(folder / "file") == 0o600


# Whole or not at all.


def breaking() -> Iterator[bytes]:
    yield b"x" * 2_000_000
    raise OSError(errno.EIO, "broken")


def test_what_breaks_leaves_what_was(folder: Path) -> None:
    path = folder / "file"
    for left in ([], ["file"]):
        with pytest.raises(OSError, match="broken"):
            files.atomic_write(path, breaking())
        assert os.listdir(folder) == left
        path.write_text("old")
    assert path.read_text() == "old"


@for_each(
    "before, change",
    [
        (None, files.Change.NEW),
        (b"one two", files.Change.NONE),
        (b"", files.Change.REPLACED),
        (b"one", files.Change.REPLACED),
        (b"one two three", files.Change.REPLACED),
        (b"one too", files.Change.REPLACED),
    ],
)
def test_an_update_leaves_alone_what_is_right_already(
    before: bytes | None, change: files.Change, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    if change is files.Change.REPLACED:
        with pytest.raises(FileExistsError):
            files.update(path, [b"one ", b"two"])
        assert path.read_bytes() == before
    inode = path.stat().st_ino if before is not None else None
    assert files.update(path, [b"one ", b"two"], replace=True) is change
    assert path.read_bytes() == b"one two"
    assert (path.stat().st_ino == inode) == (change is files.Change.NONE)
    assert os.listdir(tmp_path) == ["file"]


@for_each("name", ["n" * 255, "é" * 127, "[a-z]*?", "-", ".hidden", "\udcff"])
def test_any_name(name: str, tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        files.atomic_write(tmp_path / name, [content])
    assert (tmp_path / name).read_bytes() == b"two"
    assert os.listdir(tmp_path) == [name]


def test_what_a_killed_process_left_is_cleared(folder: Path) -> None:
    code = (
        "import os, sys, pathlib; from llava_cli import files\n"
        "def chunks():\n    yield b'x' * 2_000_000\n    os._exit(9)\n"
        "files.atomic_write(pathlib.Path(sys.argv[1]), chunks())"
    )
    for name in ("a[b]", "a[b]c", "n" * 255):
        assert subprocess.run([sys.executable, "-c", code, str(folder / name)]).returncode == 9
    (folder / ".a[b].mine.new").touch()
    assert len(os.listdir(folder)) == 4
    files.remove_leftovers(folder, "a[b]")
    assert len(os.listdir(folder)) == 3
    files.remove_leftovers(folder)
    assert os.listdir(folder) == [".a[b].mine.new"]


def test_a_link_is_put_whole(folder: Path) -> None:
    for there in ("first", "second"):
        files.atomic_symlink(folder / "link", there)
        assert os.readlink(folder / "link") == there
    (folder / "folder").mkdir()
    with pytest.raises(OSError):
        files.atomic_symlink(folder / "folder", "third")
    assert sorted(os.listdir(folder)) == ["folder", "link"]


# What is the user's own.


def test_a_folder_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "disk").mkdir(mode=0o755)
    (folder / "link").symlink_to("disk")
    assert files.make_own_folder(folder / "link") == folder / "disk"
    for loose in (0o775, 0o757, 0o777, 0o1777):
        (folder / "disk").chmod(loose)
        with pytest.raises(OSError, match=r"others may write in it; chmod go-w .*disk ends that"):
            files.make_own_folder(folder / "link")
    (folder / "disk").chmod(0o700)
    give_away(folder / "disk", monkeypatch)
    with pytest.raises(OSError, match="belongs to another user"):
        files.make_own_folder(folder / "disk")
    with pytest.raises(files.IsLink):
        files.make_own_folder(folder / "link")


def test_a_file_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "file"
    path.write_text("kept")
    path.chmod(0o644)
    files.make_own_file(path)
    assert (mode(path), path.read_text()) == (0o600, "kept")
    give_away(path, monkeypatch)
    with pytest.raises(OSError, match="belongs to another user"):
        files.make_own_file(path)


def test_links_of_ones_own_are_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "dotfiles").mkdir()
    end = folder / "dotfiles" / "c"
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to(end)
    assert files.follow_links(folder / "a") == end  # which is not there yet
    end.touch()
    assert files.follow_links(folder / "a") == end
    (folder / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        files.follow_links(folder / "loop")
    give_away(folder / "b", monkeypatch)
    with pytest.raises(files.IsLink, match=f"is a link to {end}"):
        files.follow_links(folder / "a")


def test_another_users_file_at_the_end_of_a_link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a").touch()
    (folder / "link").symlink_to("a")
    give_away(folder / "a", monkeypatch)
    with pytest.raises(files.IsLink, match="is a link to a"):
        files.follow_links(folder / "link")
    assert files.follow_links(folder / "a") == folder / "a"


@for_each("word", ["a b", "it's", "-", "two\nlines", "\x1b[2J", "\u202eevil", "caf\udce9 '\\", "é", ""])
def test_a_word_can_be_typed_again(word: str) -> None:
    typed = files.quoted(word)
    assert typed.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {typed}"], capture_output=True, check=True)
    assert done.stdout == os.fsencode(word)


# A picture that is written where the user wants it. Rows, reports, chats and settings have tests of their own.


@pytest.mark.parametrize("target", ["secret.png", "nowhere.png", "it's.png"])
def test_a_view_that_is_a_link_is_refused(target: str, folder: Path, drawing: Path, run: Run) -> None:
    (folder / "secret.png").write_text("mine")
    (folder / "view.png").symlink_to(target)
    before = sorted(os.listdir(folder))
    result = run("prompt", drawing, "what is this?", "--save-view", folder / "view.png")
    assert (result.exit_code, result.stdout) == (73, "")
    assert result.stderr.splitlines() == [
        f"llava: {folder / 'view.png'}: is a link to {target}",
        f"  --save-view {files.quoted(folder / target)} writes there",
    ]
    assert sorted(os.listdir(folder)) == before
    assert (folder / "secret.png").read_text() == "mine"


@pytest.mark.parametrize("what", ["fifo", "folder"])
def test_a_view_that_is_no_file_is_refused(what: str, folder: Path, drawing: Path, run: Run) -> None:
    {"fifo": os.mkfifo, "folder": os.mkdir}[what](folder / "view.png")
    result = run("prompt", drawing, "what is this?", "--save-view", folder / "view.png")
    assert (result.exit_code, result.stdout) == (74, "")
    assert result.stderr == f"llava: {folder / 'view.png'}: not a regular file\n"


def test_a_view_takes_the_place_of_the_last_one(folder: Path, drawing: Path, run: Run, umask: int) -> None:
    for ending in ("png", "jpg", "webp", "JPEG"):
        for _ in range(2):
            path = folder / f"view.{ending}"
            assert run("prompt", drawing, "what is this?", "--save-view", path).exit_code == 0
            with Image.open(path) as view:
                view.load()
            assert mode(path) == 0o666 & ~umask
    assert len(os.listdir(folder)) == 4
