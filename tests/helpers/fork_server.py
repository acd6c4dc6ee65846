"""Processes of ours, forked from one that has imported what they need: importing is most of what a short one does.

`subprocess.Popen` is replaced while tests run. A command line of `llava` or of its sandboxed workers is run by a fork
of a *fork server*, a process with the modules imported and nothing done; the fork then runs the same `main()` that the
command line would. It is a child of the process that asked for it (`CLONE_PARENT`, `clone(2)`), so it is waited for and
signaled as any other. What an import depends on, such as an environment variable of a library, gets a process of its
own, and so does everything in modules that test how processes start: those have the mark `cold`. `LLAVA_TEST_COLD=1`
starts all processes so.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

_CLONE = {"x86_64": 56, "aarch64": 220}
"""The number of the system call, by machine."""
_CLONE_PARENT = 0x8000
_MESSAGE_BYTES = 1 << 17
_DESCRIPTORS = 16
"""The most that a process is begun with."""
_IMPORT_VARIABLES = (
    "PYTHON",
    "LC_",
    "LANG",
    "OMP_",
    "LLAVA_DEBUG",
    "LLAVA_FAST",
    "HF_ENDPOINT",
    "TRANSFORMERS_",
    "LD_",
)
"""How the names of variables begin that an import or Python's own start reads."""
_COMMAND, _WORKER = "llava_cli.start", "llava_cli.sandbox.worker"
_MODULES = {
    _COMMAND: (
        *(f"llava_cli.cli.{name}" for name in ("ask", "batch", "chat", "chats", "models", "prompt", "report", "serve")),
        *("llava_cli.loader", "llava_cli.engine.local", "llava_cli.engine.cpu.patch", "llvmlite.binding"),
        *(f"transformers.models.{name}" for name in ("llava.modeling_llava", "clip.modeling_clip")),
        *("transformers.models.llama.modeling_llama", "transformers.models.llava.processing_llava"),
        *("llava_cli.server.app", "uvicorn", "prompt_toolkit"),
    ),
    _WORKER: ("llava_cli.images.sandbox", "llava_cli.images.film_frames", "llava_cli.prompts.sandbox"),
}
"""By the module whose `main()` a process runs: what a fork finds imported. Others are imported when they are needed."""


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen`, but command lines of ours run in a fork of a fork server where that makes no difference."""

    cold = "LLAVA_TEST_COLD" in os.environ or sys.platform != "linux" or platform.machine() not in _CLONE
    """Whether to start every process as `subprocess` does."""

    def _execute_child(  # type: ignore[override]  # private in subprocess; the same in Python 3.10 to 3.14
        self,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: bool,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        startupinfo: Any,
        creationflags: int,
        shell: bool,
        p2cread: int,
        p2cwrite: int,
        c2pread: int,
        c2pwrite: int,
        errread: int,
        errwrite: int,
        restore_signals: bool,
        gid: Any,
        gids: Any,
        uid: Any,
        umask: int,
        start_new_session: bool,
        *others: Any,
    ) -> None:
        streams = [own if own != -1 else number for number, own in enumerate((p2cread, c2pwrite, errwrite))]
        plain = not (executable or shell or gid or gids or uid) and umask == -1
        environment = os.environ if env is None else env
        pid = plain and fork(args, environment, cwd, [*streams, *pass_fds], start_new_session, preexec_fn)
        if not pid:
            arguments = (args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell)
            pipes = (p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
            rest = (restore_signals, gid, gids, uid, umask, start_new_session, *others)
            return super()._execute_child(*arguments, *pipes, *rest)  # type: ignore[misc]
        self.pid = pid
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
        return None


def fork(args: Any, env: Any, cwd: Any, streams: list[int], new_session: bool, first: Any = None) -> int:
    """The process that a fork server has begun, 0 if there has to be a new one.

    `streams` are its stdin, stdout and stderr, then descriptors that it gets under the same numbers. `first` is a
    function of our helpers, which the process calls first.
    """
    if Popen.cold or (first and not first.__module__.startswith("helpers.")):
        return 0
    words = [os.fsdecode(word) for word in ([args] if isinstance(args, (str, bytes, os.PathLike)) else args)]
    variables = {os.fsdecode(name): os.fsdecode(value) for name, value in env.items()}
    found = _main_of(words)
    if found is None:
        return 0
    module, folders, arguments = found
    if module == _COMMAND and _for_imports(variables) != _at_start:  # workers are isolated, and read none
        return 0
    request = {
        "arguments": arguments,
        "folders": folders,
        "environment": variables,
        "cwd": os.fsdecode(cwd or os.getcwd()),
        "new_session": new_session,
        "places": [0, 1, 2, *streams[3:]],
        "first": [first.__module__, first.__name__] if first else None,
    }
    message = json.dumps(request).encode()
    return _server(module).fork(message, streams) if len(message) <= _MESSAGE_BYTES else 0


def _main_of(words: list[str]) -> tuple[str, list[str], list[str]] | None:
    """The module whose `main()` a command line runs, folders of modules, and the arguments; None for other commands."""
    from llava_cli import processes

    if words[:3] == [sys.executable, "-m", "llava_cli"]:
        return _COMMAND, [], words[3:]
    for command in (processes.worker_command(_WORKER), processes.command()):
        *start, _, module = command
        if words[: len(start)] == start and words[len(start) + 1 : len(command)] == [module]:
            return module, words[len(start)].split(os.pathsep), words[len(command) :]
    return None


def _for_imports(variables: Mapping[str, str]) -> set[tuple[str, str]]:
    return {(name, value) for name, value in variables.items() if name.startswith(_IMPORT_VARIABLES)}


class _Server:
    """A fork server, from outside. It ends with this process, whose end of the socket it waits for."""

    def __init__(self, module: str) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        options = ("-I", "-S") if module == _WORKER else ("-I",)
        command = [sys.executable, *options, __file__, str(theirs.fileno()), module, *filter(None, sys.path)]
        with theirs:
            subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def fork(self, message: bytes, streams: list[int]) -> int:
        with self._lock:
            socket.send_fds(self._socket, [message], streams)
            return int(self._socket.recv(20))


@cache
def _server(module: str) -> _Server:
    return _Server(module)


_at_start: set[tuple[str, str]] = set()


def install() -> None:
    """Replaces `subprocess.Popen`. The environment is now that of the tests, as far as imports read it."""
    _at_start.update(_for_imports(os.environ))
    subprocess.Popen = Popen  # type: ignore[misc]


# Below: inside a fork server.


def _serve() -> None:
    """Forks at each message; in the fork, returns after it has become what was asked for."""
    _, number, module, *folders = sys.argv
    sys.path[:] = folders
    connection = socket.socket(fileno=int(number))
    if module == _COMMAND:
        from llava_cli import fast_start

        os.environ.update({"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
        fast_start.start()
    for name in _MODULES[module]:
        with suppress(ImportError):  # a fork needs it in vain, too, and says so
            getattr(import_module(name), "prepare", int)()
    while True:
        message, streams, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, _DESCRIPTORS)
        if not message:
            os._exit(0)  # the tests are over
        pid = _fork_for_parent()
        if pid == 0:
            _become(json.loads(message), streams)
            import_module(module).main()
            sys.exit()
        for stream in streams:
            os.close(stream)
        connection.send(str(pid).encode())


def _fork_for_parent() -> int:
    """As `os.fork`, but the new process is a child of this process's parent."""
    python, libc = ctypes.pythonapi, ctypes.PyDLL(None)
    python.PyOS_BeforeFork()
    flags = ctypes.c_ulong(_CLONE_PARENT | signal.SIGCHLD)
    pid: int = libc.syscall(ctypes.c_long(_CLONE[platform.machine()]), flags, None, None, None, None)
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    return pid


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Makes this process what a new one would be that has these arguments, streams and variables."""
    import fcntl
    import termios
    import time

    places = request["places"]
    beyond = [fcntl.fcntl(stream, fcntl.F_DUPFD, max(places) + 1) for stream in streams]  # in the place of none
    for place, stream in zip(places, beyond, strict=True):
        os.dup2(stream, place)
    for place in sorted({2, *places[3:]}, reverse=True):
        os.closerange(place + 1, min((one for one in places if one > place), default=1 << 16))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    if request["new_session"]:
        os.setsid()
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    if request["first"]:
        helper, name = request["first"]
        getattr(import_module(helper), name)()
    sys.path += [folder for folder in request["folders"] if folder not in sys.path]
    sys.argv[1:] = request["arguments"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        buffering = 1 if name == "stderr" else -1
        new = open(number, old.mode, buffering, old.encoding, old.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


if __name__ == "__main__":
    _serve()
