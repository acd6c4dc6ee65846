"""The user's own socket, where other users may have been before: commands go on without it, and nothing is obeyed."""

from __future__ import annotations

import itertools
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run, Shell
from helpers.homes import home
from helpers.servers import Serve, connected, in_thread
from helpers.tables import for_each

from llava_cli import limits, load, processes
from llava_cli.engine.remote.local_socket import (
    Peer,
    UnixHTTPConnection,
    is_trusted_socket,
    listen,
    open_companion,
    server_info,
    silent_server,
)
from llava_cli.errors import OutputTaken
from llava_cli.paths import socket_path
from llava_cli.server.process_handle import ProcessHandle

QUESTION = "what color is the circle?"
STRANGER = 4321
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give something away, or be somebody else")

SAID: dict[str, Any] = {
    "model": "builtin",
    "precision": "fp32",
    "device": "cpu",
    "precisions": ["fp32"],
    "devices": ["auto"],
    "family": None,
    "context": 2048,
    "memory": 1,
    "pid": 1,
    "url": "http://127.0.0.1:8000/v1",
}


def answered(value: Any, head: bytes = b"HTTP/1.1 200 OK\r\n") -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return head + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body


@contextmanager
def pretending(path: Path, answer: bytes | Callable[[socket.socket], None]) -> Iterator[None]:
    """A server of this user's at a socket that gives everybody the same answer."""
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection = listener.accept()[0]
                    with closing(connection), suppress(OSError):
                        connection.recv(65_536)
                        if callable(answer):
                            answer(connection)
                        else:
                            connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)


# What may lie where the socket is looked for.


def folder(path: Path) -> None:
    path.mkdir()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def looping(path: Path) -> None:
    path.symlink_to(path)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def closed(path: Path) -> None:
    path.mkdir(mode=0)


def text(path: Path) -> None:
    path.write_text("mine")


def left_behind(path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as one:
        one.bind(str(path))


def datagrams(path: Path) -> None:
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).bind(str(path))


THINGS = [folder, fifo, looping, dangling, closed, text]


@for_each(
    "thing, name", itertools.product([*THINGS, left_behind, datagrams], ["server.sock", "run", "server.sock.lock"])
)
def test_whatever_lies_there_is_no_server(
    name: str, thing: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("run/server.sock" if name == "run" else "server.sock")
    thing(tmp_path / name)
    assert server_info(path) is None
    assert silent_server(path) is None
    monkeypatch.setenv("LLAVA_SOCKET", str(path))
    assert socket_path() == path


@for_each("command, thing", itertools.product(["ask", "chat", "batch"], [fifo, looping]), own=(home,))
def test_commands_go_on_without_one(
    thing: Callable[[Path], None], command: str, run: Run, home: Path, drawing: Path
) -> None:
    thing(home / "server.sock")
    thing(home / "server.sock.lock")
    words = ("-p", "fp32") if command == "chat" else (QUESTION, "-p", "fp32")
    done = run(command, *([drawing.parent, "-q"] if command == "batch" else [drawing]), *words, input=QUESTION)
    assert done.exit_code == 0, done.stderr
    assert "red" in done.stdout
    assert "sock" not in done.stderr


@for_each(
    "thing, name",
    itertools.product([folder, fifo, looping, dangling], ["server.sock.lock", "server.sock.log"]),
    own=(home,),
)
def test_what_is_beside_a_socket_is_written_to_files_of_ours_alone(
    name: str, thing: Callable[[Path], None], shell: Shell, home: Path
) -> None:
    thing(home / name)
    done = shell("serve", "--port", "0", *(["--detach"] if name.endswith("log") else []))
    assert done.returncode == 73
    line, hint = done.stderr.decode().strip().splitlines()
    assert line.startswith(f"llava: {home / name}: ")
    assert "LLAVA_SOCKET=PATH names another one" in hint
    assert not (home / "nothing").exists()


@for_each("link, kind", itertools.product([os.symlink, os.link], ["lock", "log"]), own=(home,))
def test_a_file_that_a_name_leads_to_stays_as_it_is(kind: str, link: Callable[[Path, Path], None], home: Path) -> None:
    (home / "precious").write_text("mine")
    link(home / "precious", home / f"server.sock.{kind}")
    with pytest.raises(OutputTaken, match=r"is a link to|has a second name"):
        open_companion(home / "server.sock", kind)
    assert (home / "precious").read_text() == "mine"
    assert silent_server(home / "server.sock") is None


def test_files_of_ours_are_secret_and_used_again(home: Path) -> None:
    path = home / "run" / "server.sock"
    for _ in range(2):
        with listen(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert stat.S_IMODE(path.with_name("server.sock.lock").stat().st_mode) == 0o600
            assert silent_server(path) == str(os.getpid())
    assert silent_server(path) is None


# Other users.


@for_each(("mode", "is_trusted"), [(0o700, 1), (0o755, 1), (0o1777, 1), (0o777, 0), (0o770, 0)], own=(home,))
def test_a_folder_where_others_can_put_a_socket(mode: int, is_trusted: int, home: Path) -> None:
    (home / "run").mkdir()
    (home / "run").chmod(mode)
    path = home / "run" / "server.sock"
    with pretending(path, answered(SAID)):
        assert is_trusted_socket(path) == bool(is_trusted)
        assert (server_info(path) is not None) == bool(is_trusted)
    path.unlink()
    if not is_trusted:
        with pytest.raises(OutputTaken, match="other users can write to its folder") as raised, listen(path):
            pass
        assert "LLAVA_SOCKET" in raised.value.hint


def test_the_process_at_the_other_end_is_another_users(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = home / "server.sock"
    with pretending(path, answered(SAID)):
        with closing(UnixHTTPConnection(path, 60)) as connection:
            connection.connect()
            assert connection.peer == Peer(os.geteuid(), os.getpid())
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
        with pytest.raises(PermissionError), closing(UnixHTTPConnection(path, 60)) as connection:
            connection.connect()
        assert server_info(path) is None


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that everybody may reach and write, as `/tmp` is."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


def as_stranger(code: str, path: Path) -> subprocess.Popen[bytes]:
    """A process of another user's that runs `code` with a socket `one`."""
    script = f"import os, socket\nos.setgroups([])\nos.setresuid(*[{STRANGER}] * 3)\npath = {str(path)!r}\n"
    script += f"one = socket.socket(socket.AF_UNIX)\n{code}"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)


@root
def test_a_server_of_another_users_behind_a_socket_that_looks_like_ours(common: Path) -> None:
    """As where its file was moved, or linked, from one folder into another."""
    path = common / "server.sock"
    code = "one.bind(path)\none.listen()\nprint(flush=True)\nwhile True: one.accept()[0].sendall({!r})"
    with as_stranger(code.format(answered(SAID)), path) as process:
        assert process.stdout
        process.stdout.readline()
        assert not is_trusted_socket(path)
        os.chown(path, os.geteuid(), -1)
        assert is_trusted_socket(path)
        assert server_info(path) is None
        with pytest.raises(PermissionError):
            UnixHTTPConnection(path, 60).connect()
        process.kill()


@root
def test_another_user_at_our_own_socket_is_not_answered(common: Path) -> None:
    with in_thread(load("builtin", precision="fp32", device="cpu"), common) as server:
        server.socket.chmod(0o666)
        request = b"GET /health HTTP/1.0\r\n\r\n"
        code = f"""
try:
    one.connect(path)
    one.sendall({request!r})
    print(one.recv(100))
except ConnectionError as error:
    print(b"")
"""
        assert as_stranger(code, server.socket).communicate(timeout=60)[0] == b"b''\n"
        with closing(connected(server, request, own=True)) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")


@root
@for_each("mode, where", itertools.product([0o755, 0o777], ["LLAVA_SOCKET", "TMPDIR", "XDG_RUNTIME_DIR"]))
@pytest.mark.filterwarnings("ignore:XDG_RUNTIME_DIR")
def test_a_folder_that_another_user_made(
    where: str, mode: int, run: Run, tmp_path: Path, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ask` goes on without a server, and `serve` says what is wrong where there is no other folder for it."""
    taken = tmp_path / (f"runtime-{os.geteuid()}" if where == "TMPDIR" else "taken")
    taken.mkdir()
    taken.chmod(mode)
    os.chown(taken, STRANGER, -1)
    monkeypatch.setattr(tempfile, "tempdir", None)  # as it was found before
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if where == "LLAVA_SOCKET":
        monkeypatch.setenv(where, str(taken / "server.sock"))
    else:
        monkeypatch.delenv("LLAVA_SOCKET")
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(taken))
    asked = run("ask", "-q", drawing, QUESTION, "-p", "fp32")
    assert (asked.exit_code, asked.stdout, asked.stderr) == (0, "red\n", "")
    if where != "XDG_RUNTIME_DIR":
        served = run("serve", "--port", "0")
        assert served.exit_code == 73
        assert ": its folder belongs to another user\n" in served.stderr
        assert "LLAVA_SOCKET=PATH names another one" in served.stderr


def test_no_folder_for_it_at_all(run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another user has made the one that the system names."""
    import platformdirs

    def refused(name: str) -> Path:
        raise PermissionError("runtime directory is owned by uid 4321")

    monkeypatch.setattr(platformdirs, "user_runtime_path", refused)
    monkeypatch.delenv("LLAVA_SOCKET")
    monkeypatch.setenv("TMPDIR", "/proc/nothing")
    assert run("ask", "-q", drawing, QUESTION, "-p", "fp32").stdout == "red\n"
    assert run("serve", "--status").exit_code == 1
    served = run("serve", "--port", "0")
    assert served.exit_code == 73
    assert served.stderr.startswith("llava: /proc/nothing/")
    assert "LLAVA_SOCKET=PATH names another one" in served.stderr


# What a server says of itself.


def test_what_a_server_says_is_taken(home: Path) -> None:
    with pretending(home / "server.sock", answered(SAID)):
        assert server_info(home / "server.sock") == SAID


@for_each(
    "answer",
    [
        b"",
        b"\0" * 1000,
        answered([]),
        answered(None),
        answered({}),
        answered(b"{"),
        answered(b"[" * 10_000),
        answered(b'{"a": ' + b"[" * 10 + b"]" * 10 + b"}"),
        answered({**SAID, "pid": "1"}),
        answered({**SAID, "pid": True}),
        answered({**SAID, "model": None}),
        answered({**SAID, "memory": 1.5}),
        answered({**SAID, "precisions": "fp32"}),
        answered({name: value for name, value in SAID.items() if name != "context"}),
        answered({**SAID, "more": ["a"] * 2000}),
        answered({**SAID, "more": "a" * limits.STATUS_BYTES}),
        answered(SAID, b"HTTP/1.1 500 No\r\n"),
        answered(SAID)[:-1],
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100_000,
        b"HTTP/1.1 200 OK\r\na: " + b"b" * 1_000_000,
    ],
    own=(home,),
)
def test_what_no_server_of_ours_says_is_no_server(answer: bytes, home: Path) -> None:
    with pretending(home / "server.sock", answer):
        assert server_info(home / "server.sock") is None


@pytest.mark.parametrize("piece", [b"a", b"a: b\r\n", b""])
def test_a_server_that_drips_is_none(piece: bytes, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STATUS_SECONDS", 0.3)
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while not over.wait(0.01):
            connection.sendall(piece)

    with pretending(home / "server.sock", drip):
        assert server_info(home / "server.sock") is None
        over.set()


def test_its_words_do_not_reach_the_terminal(home: Path, run: Run) -> None:
    said = {**SAID, "model": "a\x1b]0;b\x07\nc", "url": "d\u202e" + "e" * (limits.PATH_CHARACTERS + 10)}
    with pretending(home / "server.sock", answered(said)):
        found = server_info(home / "server.sock")
        shown = run("serve", "--status")
    assert found
    assert found["model"] == r"a\x1b]0;b\x07"
    assert len(found["url"]) == limits.PATH_CHARACTERS
    assert not {"\x1b", "\x07", "\u202e"} & set(shown.stdout)


# Stopping it.


@for_each("pid", [0, 1, -1, "another's", 2**31 - 1, 2**80], own=(home,))
def test_only_the_process_behind_the_socket_is_stopped(pid: int | str, home: Path, run: Run) -> None:
    with subprocess.Popen(["sleep", "600"]) as victim:
        said = {**SAID, "pid": victim.pid if isinstance(pid, str) else pid}
        with pretending(home / "server.sock", answered(said)):
            done = run("serve", "--stop")
        assert done.exit_code == 73
        assert done.stderr.startswith(f"llava: {home / 'server.sock'}: its server says that it is process ")
        assert victim.poll() is None
        victim.kill()


def test_a_process_is_held_by_a_handle() -> None:
    with subprocess.Popen(["sleep", "600"]) as child, closing(ProcessHandle(child.pid)) as process:
        assert process.is_alive()
        child.kill()
        child.wait()
        assert not process.is_alive()
        assert not process.signal(15)
    with pytest.raises(ProcessLookupError):
        ProcessHandle(2**22 + 1)  # more than there can be


def test_without_handles_it_is_stopped_by_its_number(serve: Serve, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", forbidden, raising=False)
    server = serve()
    stopped = run("serve", "--stop")
    assert stopped.stdout.startswith("stopped: builtin"), stopped.stderr
    assert server.process.wait(60) == 0


def test_a_detached_server_runs_nothing_of_the_current_folder(tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "llava_cli").mkdir(parents=True)
    for name in ("llava_cli/__init__.py", "llava_cli/__main__.py", "queue.py", "fastapi.py"):
        (here / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    def llava(*words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(processes.command(*words), cwd=here, capture_output=True, timeout=120)

    begun = llava("serve", "--detach", "--port", "0", "-p", "fp32")
    assert begun.returncode == 0, begun.stderr
    assert llava("serve", "--stop").stdout.startswith(b"stopped: builtin")
    assert not (tmp_path / "ran").exists()
