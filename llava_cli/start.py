"""The entry point of the command `llava`: what happens before its arguments are parsed, and after its work is done.

The picture sandbox starts here, while Typer and the command are imported.
"""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from llava_cli import signals

_PICTURE_COMMANDS = ("ask", "chat")
"""Commands that open pictures first."""
NVIDIA_DRIVER = "/dev/nvidiactl"
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The variables that torch reads them from; since 2.10 the first one is for every kind of GPU."""


@contextmanager
def _skip_interpreter_shutdown() -> Iterator[None]:
    """Keeps the exit code of its block, but ends the process without Python's own shutdown if torch is loaded.

    Python joins threads, runs the functions of `atexit`, and only then shuts the interpreter down. Our daemon threads
    end where they next need the interpreter's lock, possibly inside torch's C++ or Rust code, which abort the process
    (SIGABRT, -6); threads of OpenMP and LLVM may meet destroyed globals. This function of `atexit` is the first one
    registered and so the last one to run: everything else has been done by then.
    """
    code = 1  # of an uncaught exception

    def leave() -> None:
        if "torch" in sys.modules:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                with suppress(OSError, ValueError):  # closed, or without a reader: reported before, where it matters
                    stream.flush()
            os._exit(code)

    atexit.register(leave)
    try:
        yield
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        signals.end_at_once()


@_skip_interpreter_shutdown()
def main() -> None:
    """The command `llava`."""
    _fill_closed_streams()
    if not os.environ.get("LLAVA_DEBUG"):
        # Libraries print nothing through us. Must be set before they are imported.
        warnings.simplefilter("ignore")
        os.environ.update(
            {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "critical"}
        )
    let_segments_grow()
    signals.start()
    if sys.argv[1:2] and sys.argv[1] in _PICTURE_COMMANDS and len(sys.argv) > 2:
        _begin_sandbox()
    from llava_cli import fast_start
    from llava_cli.cli import app, register

    fast_start.start()
    register(*sys.argv[1:2])
    app(prog_name="llava")


def let_segments_grow() -> None:
    """On an NVIDIA GPU lets torch enlarge the blocks of memory that it has, unless the user has other settings for it.

    A KV cache that grows would leave its old memory behind in blocks too small for the new one. torch reads the
    variable while it is imported; before 2.10 it takes no notice of it.
    """
    if os.path.exists(NVIDIA_DRIVER) and not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def _fill_closed_streams() -> None:
    """Opens the standard streams that were closed (`>&-`), so that no other file gets their numbers and their data.

    Writing to such a stdout is an error, since the answer is lost; stdin stays None, which its readers expect.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Gets the lowest free number, which is this one. Read-only, so that writing fails as on a closed stream.
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
    # print() writes to stdout if stderr is None. These stay open while the process runs.
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _begin_sandbox() -> None:
    from llava_cli.images.reader import start_sandbox
    from llava_cli.sandbox.process import WorkerDied

    with suppress(WorkerDied):  # reported when a picture is opened
        start_sandbox()
