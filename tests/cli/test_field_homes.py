"""Homes, other systems, and the end of a process.

| kind | example | own variants | right | test |
|---|---|---|---|---|
| a home that keeps nothing | HOME that may not be entered | one that is a file, `/dev/null`, XDG folders that are
  shut, no HOME for a user that no list has, a Hub cache that is shut | no file is no file: commands work |
  `test_a_home_that_keeps_nothing`, `test_a_home_of_another_kind_that_keeps_nothing`, `test_nobody_knows_the_home` |
| what is asked for and cannot be kept | `chat` in such a home | `models default`, `-q`, `--continue` | the work is
  done, one line says what was not kept; an error where nothing else was to be
  done | `test_a_chat_that_is_not_kept`, `test_a_default_that_cannot_be_set` |
| a config that is there and cannot be read | mode 000 | named in a shut folder | an error that names the way round |
  `test_a_config_that_may_not_be_read` |
| no temporary folder | `TMPDIR` of mode 000 | none at all, no such folder | one line, with TMPDIR |
  `test_no_temporary_folder` |
| another's umask | 077 | 000, 777 | files have the modes that we mean | `test_modes_under_any_umask` |
| a system without Unix's modules | `batch` ended at import | ask, chat, resumed batch, doctor, serve | all but `serve`
  work, and that says what it lacks | `test_another_system` |
| an abort at exit | SIGABRT (-6) after SIGTERM | threads in torch and in tokenizers at exit, with any code | the code |
  `test_no_abort_at_exit` |
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run, Shell
from helpers.tables import for_each
from helpers.users import as_any_user

from llava_cli import files, paths
from llava_cli.errors import OutputError
from llava_cli.models import registry

TESTS = Path(__file__).parents[1]
QUESTION = "what color is the circle?"


@pytest.fixture
def shut(tmp_path: Path) -> Iterator[Path]:
    """A folder that may not be entered."""
    folder = tmp_path / "shut"
    folder.mkdir(mode=0)
    yield folder
    folder.chmod(0o700)


@pytest.fixture
def at_home(tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs `llava WORDS` with these variables, and none that says where files are."""

    def invoke(*words: str | Path, stdin: bytes = b"", **variables: str) -> subprocess.CompletedProcess[bytes]:
        ours = ("LLAVA_", "XDG_", "HF_HOME", "HOME")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return shell(*words, env={**kept, **variables}, cwd=tmp_path, input=stdin, preexec_fn=as_any_user)

    return invoke


def homes(shut: Path, tmp_path: Path) -> dict[str, dict[str, str]]:
    file = tmp_path / "file"
    file.touch()
    places = {f"XDG_{kind}_HOME": str(shut) for kind in ("CONFIG", "CACHE", "DATA")}
    return {
        "shut": {"HOME": str(shut)},
        "in a shut one": {"HOME": str(shut / "user")},
        "a file": {"HOME": str(file)},
        "a device": {"HOME": os.devnull},
        "XDG": {"HOME": str(tmp_path), **places, "XDG_RUNTIME_DIR": str(shut)},
        "of the Hub": {"HOME": str(tmp_path), "HF_HOME": str(shut)},
    }


@for_each("which", ["shut", "XDG", "of the Hub"], own=(at_home, shut))
def test_a_home_that_keeps_nothing(which: str, at_home: Any, shut: Path, tmp_path: Path, drawing: Path) -> None:
    home = homes(shut, tmp_path)[which]
    done = at_home("ask", "-q", drawing, QUESTION, **home)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"red\n", b"")


@for_each("which", ["in a shut one", "a device"], own=(at_home, shut))
def test_a_home_of_another_kind_that_keeps_nothing(which: str, at_home: Any, shut: Path, tmp_path: Path) -> None:
    done = at_home("prompt", "-q", "what is this?", **homes(shut, tmp_path)[which])
    assert (done.returncode, done.stderr) == (0, b"")


def test_light_commands_in_such_a_home(at_home: Any, shut: Path) -> None:
    for words in (("models",), ("chats",), ("models", "prune")):
        done = at_home(*words, HOME=str(shut))
        assert done.returncode == 0, done.stderr
        assert done.stderr in (b"", b"there are no quantized copies\n")


def test_a_chat_that_is_not_kept(at_home: Any, shut: Path, drawing: Path) -> None:
    asked = f"{QUESTION}\n".encode()
    done = at_home("chat", drawing, "--model", "builtin", HOME=str(shut), stdin=asked)
    assert (done.returncode, done.stdout) == (0, b"red\n")
    reason = f"{shut}/.local/share: permission denied; LLAVA_DATA=FOLDER names a place"
    assert done.stderr.decode() == f"this chat is not kept: {reason}\n"
    done = at_home("chat", drawing, "-q", HOME=str(shut), stdin=asked)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"red\n", b"")
    done = at_home("chat", "--continue", HOME=str(shut), stdin=b"")
    assert (done.returncode, done.stdout) == (74, b"")


def test_a_default_that_cannot_be_set(at_home: Any, shut: Path) -> None:
    done = at_home("models", "default", "builtin", HOME=str(shut))
    assert done.returncode == 74
    hint = "LLAVA_CONFIG=FILE names another file"
    assert done.stderr.decode() == f"llava: {shut}/.config/llava/config.toml: permission denied\n  {hint}\n"


def test_a_config_that_may_not_be_read(at_home: Any, shut: Path, tmp_path: Path) -> None:
    (tmp_path / ".config/llava").mkdir(parents=True)
    config = tmp_path / ".config/llava/config.toml"
    config.touch(mode=0)
    for path, variables in ((config, {}), (shut / "c.toml", {"LLAVA_CONFIG": str(shut / "c.toml")})):
        done = at_home("models", HOME=str(tmp_path), **variables)
        assert done.returncode == 2
        hint = "LLAVA_CONFIG=FILE names another file"
        assert done.stderr.decode() == f"llava: {path}: permission denied\n  {hint}\n"


def test_nobody_knows_the_home(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """A container's user without an entry in the system's list, and without HOME."""
    import pwd

    def unknown(number: object) -> None:
        raise KeyError(number)

    for name in ("HOME", "LLAVA_CONFIG", "LLAVA_DATA", "LLAVA_CACHE", "HF_HOME"):
        monkeypatch.delenv(name)
    for name in [name for name in os.environ if name.startswith("XDG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for path in (paths.config_file(), paths.data_folder(), paths.kernel_cache(), paths.hub_cache()):
        assert path.is_relative_to(paths.NOWHERE)
    assert run("models").exit_code == 0
    assert run("chats").exit_code == 0
    assert run("models", "default", "builtin").exit_code == 74
    for name in ("~/model", "~nosuchuser/model"):
        assert run("prompt", "-m", name, "what is this?").exit_code == 69


@pytest.mark.parametrize("which", ["shut", "missing", "none"])
def test_no_temporary_folder(which: str, at_home: Any, shut: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TMPDIR", str({"shut": shut, "missing": tmp_path / "none", "none": ""}[which]))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    with pytest.raises(OutputError) as caught, paths.scratch_folder():
        pass
    assert caught.value.hint == "TMPDIR=FOLDER llava … names one"


@pytest.mark.parametrize("mask", [0o000, 0o077, 0o777], ids=oct)
def test_modes_under_any_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        folder = tmp_path / "a" / "b" / "own"
        files.make_folder(folder, files.PRIVATE)
        files.atomic_write(folder / "secret", [b"key"], files.SECRET)
        files.write_new(folder / "new", b"key", files.SECRET)
        files.atomic_write(folder / "shared", [b"rows"])
        with paths.scratch_folder() as scratch:
            assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert modes == {"own": 0o700, "secret": 0o600, "new": 0o600, "shared": 0o666 & ~mask}
    assert (tmp_path / "a").stat().st_mode & 0o700 == (0o700 & ~mask) | 0o300


# Systems that are not Unix.


def elsewhere(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TESTS / "helpers" / "other_system.py", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def test_another_system(tmp_path: Path, drawing: Path) -> None:
    (tmp_path / "photos").mkdir()
    drawing.rename(tmp_path / "photos/one.png")
    words = ("batch", "photos", QUESTION, "-o", "out.jsonl", "-q")
    for _ in range(2):  # the second one goes on, with nothing left to do
        done = elsewhere(*words, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [json.loads(line)["answer"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["red"]
    done = elsewhere("chat", "photos/one.png", "-q", cwd=tmp_path, input=f"{QUESTION}\nhow many shapes are there?\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "red\n2\n", "")
    done = elsewhere("ask", "photos/one.png", QUESTION, "-q", "--stats", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "red\n")


def test_what_cannot_work_there_says_so(tmp_path: Path) -> None:
    for words in (("serve",), ("serve", "--detach")):
        done = elsewhere(*words, cwd=tmp_path)
        assert done.returncode == 69
        assert done.stderr.startswith("llava: llava serve: needs Unix sockets, which this system has not\n  --server")
    assert elsewhere("serve", "--status", cwd=tmp_path).stdout == "no server is running\n"


# The end of a process.

BUSY = """
import signal, sys, threading
from llava_cli import cli, start

def multiply():
    import torch
    x = torch.ones(64, 64)
    begun.release()
    while True:
        torch.cat([x @ x, x]).sum()

def tokenize():
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(sys.argv[-1])
    begun.release()
    while True:
        tokenizer.encode_batch(["what is this? " * 20] * 4)

@cli.app.command()
def end(tokens: str):
    import torch, typer
    for work in (multiply, multiply, tokenize):
        threading.Thread(target=work, daemon=True).start()
        begun.acquire()
    print("done", end="")
    if CODE == 143:
        signal.raise_signal(signal.SIGTERM)
    raise typer.Exit(CODE)

begun = threading.Semaphore(0)
sys.argv[1:] = ["end", *sys.argv[1:]]
start.main()
"""


@pytest.mark.parametrize("code", [1, 143])
def test_no_abort_at_exit(code: int) -> None:
    """Though threads are in the midst of C++ and of Rust, which end the process where Python ends its threads."""
    script = BUSY.replace("CODE", str(code))
    tokens = registry.builtin_folder() / "tokenizer.json"
    done = subprocess.run([sys.executable, "-c", script, tokens], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (code, "done", "")


def test_a_signal_after_the_work_is_done() -> None:
    """Nothing is left to be in order: no traceback of what Python does at its end."""
    code = (
        "import atexit, signal, sys; from llava_cli.start import main\n"
        "atexit.register(lambda: signal.raise_signal(signal.SIGTERM))\n"
        "sys.argv = ['llava', '--version']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")
