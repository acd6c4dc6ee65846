"""Inside a sandboxed process: imports what its job needs, gives up its rights, then answers requests until none comes.

The first message says which layers of `confine` took hold.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module

from llava_cli.sandbox.confine import confine
from llava_cli.sandbox.messages import receive, send


def main() -> None:
    """Does `JOB MEMORY CPU_SECONDS WORDS...` of the command line: a job is a module with `prepare` and `answer`."""
    job, memory, cpu_seconds, *words = sys.argv[1:]
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdin = sys.stdout = None  # nobody else writes to our pipe
    module = import_module(job)
    module.prepare(*words)
    send(replies, " ".join(confine(int(memory), int(cpu_seconds))).encode())
    with suppress(EOFError, BrokenPipeError):  # whoever asked is gone
        while True:
            send(replies, *module.answer(bytes(receive(requests, sys.maxsize))))
