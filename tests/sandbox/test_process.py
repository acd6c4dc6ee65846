"""What decodes strangers' bytes can answer, and nothing else: code that is hostile runs inside, and tries."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.homes import home
from helpers.tables import for_each
from PIL import Image

from llava_cli import limits
from llava_cli.images import sandbox as pictures
from llava_cli.sandbox.confine import LAYERS
from llava_cli.sandbox.process import Worker, WorkerDied, WorkerLate

SUPPORTED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="Landlock and seccomp are Linux's, on these two processors")
X86 = platform.machine() == "x86_64"
QUESTION = "what is this?"

Try = Callable[[str], list[Any]]


@pytest.fixture
def attacker() -> Iterator[Worker]:
    """One that may start threads, as few jobs may."""
    worker = Worker("helpers.attacker", 1 << 30, has_threads=True)
    yield worker
    worker.end()


@pytest.fixture
def attempt(attacker: Worker) -> Try:
    """Runs an expression inside."""
    return lambda code: list(json.loads(attacker.ask((code.encode(),), 100_000, 20)))


def test_all_layers_take_hold(attacker: Worker) -> None:
    assert attacker.layers() == list(LAYERS)


ATTACKS = [
    # files
    "open('/etc/passwd')",
    "open('/proc/self/environ')",
    "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "open('/dev/tty', 'w')",
    "open('/tmp/planted', 'w')",
    "os.open('.', os.O_RDONLY)",
    "os.stat('/etc/passwd')",
    "os.listdir('/')",
    "os.readlink('/proc/self/exe')",
    "os.unlink('/tmp/x')",
    "os.mkdir('/tmp/planted')",
    "os.symlink('/', '/tmp/planted')",
    "os.chmod('/tmp', 0o777)",
    "os.mkfifo('/tmp/planted')",
    "os.memfd_create('x')",
    "os.truncate('/tmp/x', 0)",
    "os.chdir('/tmp')",
    # sockets
    "socket.socket()",
    "socket.socket(socket.AF_UNIX)",
    "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
    "socket.socketpair()",
    "call(41, 2, 1, 0)" if X86 else "call(198, 2, 1, 0)",
    "in_a_thread(lambda: socket.socket())",
    # processes
    "os.fork()",
    "os.execv('/bin/sh', ['sh'])",
    "os.posix_spawn('/bin/sh', ['sh'], {})",
    "subprocess.run(['true'])",
    "in_a_thread(lambda: os.fork())",
    "os.kill(os.getppid(), 0)",
    "os.kill(-1, signal.SIGTERM)",
    "os.pidfd_open(os.getppid())",
    "call(101, 16, os.getppid(), 0, 0)" if X86 else "call(117, 16, os.getppid(), 0, 0)",  # ptrace
    "call(310, os.getppid(), 0, 0, 0, 0, 0)" if X86 else "call(270, os.getppid(), 0, 0, 0, 0, 0)",
    # memory that is code
    "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
    "call(10, ctypes.c_void_p(0), 0, 7)" if X86 else "call(226, ctypes.c_void_p(0), 0, 7)",  # mprotect
    # more descriptors, more rights
    "os.pipe()",
    "os.dup(1)",
    "os.setuid(0)",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))",
    "call(425, 1, 0)",  # io_uring_setup
    "call(321, 0, 0, 0)" if X86 else "call(280, 0, 0, 0)",  # bpf
    "call(444, 0, 0, 1)",  # landlock_create_ruleset
    "call(272, 0x10000000)" if X86 else "call(97, 0x10000000)",  # unshare
    "call(157, 22, 0, 0, 0, 0)" if X86 else "call(167, 22, 0, 0, 0, 0)",  # prctl
    "call(16, 0, 0x5412, 0)" if X86 else "call(29, 0, 0x5412, 0)",  # ioctl TIOCSTI
]


@for_each("code", ATTACKS, own=(attacker, attempt))
def test_nothing_outside_can_be_reached(code: str, attempt: Try) -> None:
    kind, *what = attempt(code)
    assert kind == "raises", what
    assert what[0] in ("PermissionError", "ValueError") or what[1] in (errno.EPERM, errno.ENOSYS), what


@pytest.mark.skipif(not X86, reason="other ways to make system calls are x86's")
def test_numbers_of_other_calling_conventions_are_no_way_out(attempt: Try) -> None:
    assert attempt("call(0x40000000 + 41, 2, 1, 0)") == ["raises", "PermissionError", errno.EPERM]  # x32's socket()


def test_it_knows_nothing_of_us(attempt: Try, monkeypatch: pytest.MonkeyPatch, attacker: Worker) -> None:
    attacker.end()
    monkeypatch.setenv("LLAVA_API_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    environment = eval(attempt("dict(os.environ)")[1])
    assert set(environment) <= {"LC_CTYPE"}  # which Python sets where there is no locale
    assert attempt("os.getcwd()") == ["raises", "PermissionError", errno.EPERM]
    assert attempt("sys.flags.isolated, sys.flags.no_site") == ["is", "(1, 1)"]
    assert attempt("[folder for folder in sys.path if folder in ('', '.')]") == ["is", "[]"]
    for descriptor in range(3, 20):
        assert attempt(f"os.read({descriptor}, 1)") == ["raises", "OSError", errno.EBADF]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Worker]:
    """One that may read a file."""
    (tmp_path / "file").write_bytes(b"0123456789")
    with (tmp_path / "other").open("wb+") as other, (tmp_path / "file").open("rb") as file:
        os.set_inheritable(other.fileno(), True)
        worker = Worker("helpers.attacker", 1 << 30, file=file, has_threads=True)
        yield worker
        worker.end()


@pytest.fixture
def read_attempt(reader: Worker) -> Try:
    return lambda code: list(json.loads(reader.ask((code.encode(),), 100_000, 20)))


def test_one_file_can_be_read(read_attempt: Try, reader: Worker) -> None:
    assert reader.layers() == list(LAYERS)
    assert read_attempt("os.read(3, 4)") == ["is", "b'0123'"]
    assert read_attempt("os.lseek(3, 8, os.SEEK_SET), os.read(3, 4), os.lseek(3, 0, 2)") == ["is", "(8, b'89', 10)"]
    assert read_attempt("io.FileIO(3, closefd=False).read(1)") == ["is", "b''"]
    reader.end()
    assert read_attempt("os.lseek(3, 0, os.SEEK_SET), os.read(3, 2)") == [
        "is",
        "(0, b'01')",
    ]  # a new process has it, too


FILE_ATTACKS = [
    "os.write(3, b'x')",
    "os.pwrite(3, b'x', 0)",
    "os.ftruncate(3, 0)",
    "os.fchmod(3, 0o777)",
    "os.posix_fallocate(3, 0, 100)",
    "os.open('/proc/self/fd/3', os.O_RDWR)",
    "os.open('/dev/fd/3', os.O_RDONLY)",
    "os.dup(3)",
    "os.dup2(3, 4)",
    "mmap.mmap(3, 10, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)",
    "mmap.mmap(3, 10, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)",
    "os.fchdir(3)",
    "os.listdir(3)",
    "os.sendfile(1, 3, 0, 10)",
    "os.read(4, 1)",
    "os.write(4, b'x')",
    *ATTACKS,
]


@for_each("code", FILE_ATTACKS)
def test_the_file_opens_no_way_out(code: str, read_attempt: Try) -> None:
    kind, *what = read_attempt(code)
    assert kind == "raises", what
    assert what[0] in ("PermissionError", "ValueError") or what[1] in (errno.EPERM, errno.ENOSYS, errno.EBADF), what


def test_its_limits_are_hard(attempt: Try, attacker: Worker) -> None:
    for name in ("FSIZE", "CORE"):
        assert attempt(f"resource.getrlimit(resource.RLIMIT_{name})") == ["raises", "PermissionError", errno.EPERM]
        found = resource_limit(attacker, name)
        assert found == (0, 0), name
    assert resource_limit(attacker, "AS") == (1 << 30, 1 << 30)
    assert resource_limit(attacker, "CPU") == (limits.SANDBOX_CPU_SECONDS, limits.SANDBOX_CPU_SECONDS)
    assert attempt("len(bytearray(2 << 30))") == ["raises", "MemoryError", None]


def resource_limit(worker: Worker, name: str) -> tuple[int, int]:
    assert worker._process
    return resource.prlimit(worker._process.pid, getattr(resource, f"RLIMIT_{name}"))


def test_threads_are_allowed_for_decoders_have_them(attempt: Try, attacker: Worker) -> None:
    assert attempt("in_a_thread(lambda: 6 * 7)") == ["is", "42"]
    assert resource_limit(attacker, "NPROC") == resource.getrlimit(resource.RLIMIT_NPROC)  # which root may exceed


def test_other_jobs_start_no_thread() -> None:
    worker = Worker("helpers.attacker", 1 << 30)
    clone = "call(56, 0x50f00, 0, 0, 0, 0)" if X86 else "call(220, 0x50f00, 0, 0, 0, 0)"  # as pthread_create calls it
    found = [json.loads(worker.ask((code.encode(),), 1000, 20)) for code in ("in_a_thread(lambda: 6 * 7)", clone)]
    assert worker.layers() == list(LAYERS)
    worker.end()
    assert found == [["raises", "RuntimeError", None], ["raises", "PermissionError", errno.EPERM]]


def test_what_it_says_on_stderr_is_not_heard(attempt: Try, capfd: pytest.CaptureFixture[str]) -> None:
    assert attempt("os.write(2, b'\\x1b]0;owned\\x07')")[0] == "is"
    assert capfd.readouterr() == ("", "")


@for_each(
    "data",
    [
        b"",
        b"\1",
        b"\xff" * 8,
        (10**6).to_bytes(8, "little") + b"x" * 100,  # more than is taken
        (9).to_bytes(8, "little") + b"short",
        b"cos\nsystem\n(S'touch /tmp/owned'\ntR.",  # a pickle
    ],
    own=(attacker,),
)
def test_a_reply_of_another_form_is_none(data: bytes, attacker: Worker) -> None:
    with pytest.raises(WorkerDied):
        attacker.ask((f"write({data!r})".encode(),), 100_000, 20)
    assert attacker.ask((b"6 * 7",), 100, 20) == b'["is", "42"]'  # of a new process


def test_one_that_does_not_answer_is_ended(attacker: Worker) -> None:
    with pytest.raises(WorkerLate):
        attacker.ask((b"time.sleep(3600)",), 100, 0.2)
    assert attacker.ask((b"6 * 7",), 100, 20) == b'["is", "42"]'


def test_one_that_does_not_read_is_ended(attacker: Worker) -> None:
    """A request that is larger than the pipe is not waited for either."""
    attacker.layers()
    assert attacker._process
    os.kill(attacker._process.pid, 19)  # SIGSTOP
    with pytest.raises(WorkerLate):
        attacker.ask((b" " * (8 << 20),), 100, 0.2)


def test_one_that_has_computed_much_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("helpers.attacker", 1 << 30)
    worker.ask((b"sum(x for x in range(1_000_000))",), 100, 60)
    assert worker._process
    first = worker._process.pid
    worker.ask((b"0",), 100, 60)
    assert worker._process.pid == first
    monkeypatch.setattr(limits, "SANDBOX_CPU_SECONDS", 0.001)
    worker.ask((b"0",), 100, 60)
    worker.start()
    assert worker._process.pid != first
    worker.end()


def test_one_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SANDBOX_START_SECONDS", 20.0)
    with pytest.raises(WorkerDied):
        Worker("no_such_job", 1 << 30).ask((b"",), 100, 20)


def test_a_reply_that_nobody_waited_for_is_not_the_next_ones(attacker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a picture is decoded, and then another picture."""

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    attacker.layers()
    with monkeypatch.context() as patch:
        patch.setattr("llava_cli.sandbox.process.receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attacker.ask((b"'stale'",), 100, 20)
    assert attacker.ask((b"'fresh'",), 100, 20) == b'["is", "\'fresh\'"]'


def test_the_doctor_says_what_there_is(run: Run) -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["picture sandbox"] == "no files, no network, no processes (landlock, limits, seccomp)"


# Processes that we start run nothing of the folder in which they are.

LLAVA = str(Path(sys.executable).with_name("llava"))
NAMES = ["queue", "typing", "ctypes", "socket", "resource", "json", "struct", "threading", "hashlib", "sitecustomize"]
NAMES += [
    "usercustomize",
    "PIL",
    "llava_cli",
    "pillow_heif",
    "defusedxml",
    "olefile",
    "typer",
    "rich",
    "torch",
    "numpy",
]
NAMES += [
    "jinja2",
    "tokenizers",
    "encodings",
    "site",
    "selectors",
    "concurrent",
    "logging",
    "uvicorn",
    "fastapi",
    "_heif",
]


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unpacked data set with modules of every name that we might import; each leaves a sign that it was run."""
    folder = tmp_path / "set"
    (folder / "photos").mkdir(parents=True)
    sign = f"import os; open({str(tmp_path / 'owned')!r}, 'a').write(__name__)\n"
    for name in NAMES:
        (folder / f"{name}.py").write_text(sign)
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(sign)
        (folder / name / "__main__.py").write_text(sign)
    (folder / "evil.pth").write_text(sign)
    for number in range(3):
        Image.new("RGB", (60, 60), "white").save(folder / "photos" / f"{number}.png")
    monkeypatch.chdir(folder)
    return folder


@for_each(
    "words",
    [
        ("batch", "photos", QUESTION, "--max-tokens", "2", "-q", "-o", "out.jsonl"),
        ("ask", "photos/0.png", QUESTION, "--max-tokens", "2", "-q"),
        ("serve", "--detach", "--port", "0", "-q"),
        ("doctor",),
    ],
    own=(shadowed, home),
)
def test_modules_of_the_current_folder_are_not_run(words: tuple[str, ...], shadowed: Path, home: Path) -> None:
    done = subprocess.run([LLAVA, *words], capture_output=True, timeout=300)
    try:
        assert (done.returncode, done.stderr) == (0, b"")
        if words[0] == "batch":
            rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
            assert [row["status"] for row in rows] == ["ok"] * 3
            done = subprocess.run([LLAVA, "report", "out.jsonl", "-q"], capture_output=True, timeout=300)
            assert (done.returncode, done.stderr) == (0, b"")
            assert Path("out.html").read_text().count('"thumb"') == 3
    finally:
        if words[0] == "serve":
            subprocess.run([LLAVA, "serve", "--stop"], capture_output=True, timeout=60)
    assert not (shadowed.parent / "owned").exists(), (shadowed.parent / "owned").read_text()


def test_every_process_is_started_in_one_way() -> None:
    """No file but `processes.py` knows how; the sandbox, `serve --detach` and a kernel's self-test ask it.

    Programs of the desktop are started by their names.
    """
    package = Path(pictures.__file__).parents[1]
    starts = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any(word in path.read_text("utf-8") for word in ("sys.executable", "os.exec", "os.spawn", "os.system"))
    }
    assert starts == {"processes.py"}
    uses = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "subprocess" in path.read_text("utf-8") or "multiprocessing" in path.read_text("utf-8")
    }
    expected = {"sandbox/process.py", "sandbox/supervisor.py", "server/background.py", "images/desktop_program.py"}
    compiler = "engine/cpu/jit/compiler.py"  # of a wing that can be deleted
    assert uses == expected | ({compiler} if (package / compiler).exists() else set())
