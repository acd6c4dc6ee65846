"""The main function of a sandboxed process: imports its job, gives up its rights, then answers requests.

The first message names the layers of `confine` that are in force.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module

from llava_cli.sandbox.confine import confine
from llava_cli.sandbox.messages import receive, send


def main() -> None:
    """Runs `JOB MEMORY CPU_SECONDS FILE THREADS ARGUMENTS...`.

    A job is a module with `prepare(*arguments)` and `answer`. FILE is the number of a descriptor that it may read from
    (as `confine.FILE`), or empty. THREADS is empty unless it may start threads.
    """
    job, memory, cpu_seconds, file, threads, *arguments = sys.argv[1:]
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdin = sys.stdout = None  # no library writes to our pipe
    module = import_module(job)
    module.prepare(*arguments)
    layers = confine(int(memory), int(cpu_seconds), int(file) if file else None, bool(threads))
    send(replies, " ".join(layers).encode())
    with suppress(EOFError, BrokenPipeError):  # the parent process has ended
        while True:
            send(replies, *module.answer(bytes(receive(requests, sys.maxsize))))
