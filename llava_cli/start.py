"""The command `llava`, from its first moment to where its words are parsed, and its last moment.

What takes its time and does not depend on the words begins here, while Typer and the command are imported.
"""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from llava_cli import fast_start, signals

_OPENING = ("ask", "chat")
"""Commands that open pictures first of all."""


@contextmanager
def _no_teardown() -> Iterator[None]:
    """Has the process end with the exit code of what is in here, but without Python's own end where torch is loaded.

    Python joins threads, runs what `atexit` has, and only then takes the interpreter down, and our daemon threads with
    it: each is ended where it next wants the interpreter's lock, which may be in the midst of torch's C++ or of Rust,
    and those abort the process (SIGABRT, -6). Threads of OpenMP and LLVM may meet destroyed globals there. So this is
    the first to be registered, thus the last to be run, of `atexit`'s functions: by then all is done that has to be.
    """
    code = 1  # of an exception that nobody catches

    def leave() -> None:
        if "torch" in sys.modules:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                with suppress(OSError, ValueError):  # closed, or nobody reads it: said already, where it matters
                    stream.flush()
            os._exit(code)

    atexit.register(leave)
    try:
        yield
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        signals.end_at_once()


@_no_teardown()
def main() -> None:
    """The command `llava`."""
    _fill_closed_streams()
    if not os.environ.get("LLAVA_DEBUG"):
        # Other libraries' words are not ours to print. Set before any of them is imported.
        warnings.simplefilter("ignore")
        os.environ.update(
            {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "critical"}
        )
    signals.start()
    fast_start.start()
    if sys.argv[1:2] and sys.argv[1] in _OPENING and len(sys.argv) > 2:
        _begin_sandbox()
    from llava_cli.cli import app, register

    register(*sys.argv[1:2])
    app(prog_name="llava")


def _fill_closed_streams() -> None:
    """Has no file that is opened later take the place of a stream that was closed (`>&-`), and its data.

    Whoever writes to stdout then gets an error, for the answer is lost; stdin stays None, as its readers know it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one. What may not be written to fails, as a closed stream does.
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
    # print() would take stdout in the stead of a stderr that is None. Open for as long as we run.
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _begin_sandbox() -> None:
    from llava_cli.images.reader import begin
    from llava_cli.sandbox.process import WorkerDied

    with suppress(WorkerDied):  # whoever opens a picture says so
        begin()
