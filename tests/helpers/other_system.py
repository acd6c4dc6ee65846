"""Runs `llava WORDS...` as on a system without Unix's modules: `python other_system.py WORDS...`.

Libraries that choose their imports by the system's name are imported first; then the modules, functions and
constants that Windows lacks are removed.
"""

from __future__ import annotations

import asyncio  # noqa: F401
import multiprocessing.util  # noqa: F401
import os
import select
import signal
import socket
import subprocess  # noqa: F401
import sys
import tempfile  # noqa: F401

import filelock  # noqa: F401
import platformdirs.unix  # noqa: F401
import prompt_toolkit.input.vt100  # noqa: F401
import psutil  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401

MODULES = ("fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty")
ATTRIBUTES = {
    os: """O_CLOEXEC O_DIRECTORY O_NOCTTY O_NOFOLLOW O_NONBLOCK O_SYNC chown chroot fchmod fchown fork forkpty
        getegid geteuid getgid getgroups getpgid getuid initgroups killpg lchown mkfifo nice openpty posix_fadvise
        posix_spawn pread pwrite register_at_fork sched_getaffinity sendfile setgid setsid setuid statvfs sysconf
        uname wait3 wait4""",
    select: "epoll poll",
    signal: """SIGALRM SIGCHLD SIGCONT SIGHUP SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIGWINCH alarm
        pthread_kill pthread_sigmask setitimer siginterrupt sigwait""",
    socket: "AF_UNIX SO_PEERCRED socketpair",
}


def main() -> None:
    """Removes what is Unix's own, then runs the command."""
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # which `import` reports as "not installed"
    for owner, names in ATTRIBUTES.items():
        for name in names.split():
            if hasattr(owner, name):
                delattr(owner, name)
    from llava_cli.start import main

    main()


if __name__ == "__main__":
    del sys.path[0]
    main()
