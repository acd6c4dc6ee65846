"""The command `llava`, from its first moment to where its words are parsed.

What takes its time and does not depend on the words begins here, while Typer and the command are imported.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress

from llava_cli import lean, signals

_OPENING = ("ask", "chat")
"""Commands that open pictures first of all."""


def main() -> None:
    """The command `llava`."""
    if not os.environ.get("LLAVA_DEBUG"):
        # Other libraries' words are not ours to print. Set before any of them is imported.
        warnings.simplefilter("ignore")
        os.environ.update(
            {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "critical"}
        )
    signals.start()
    lean.start()
    if sys.argv[1:2] and sys.argv[1] in _OPENING and len(sys.argv) > 2:
        _begin_sandbox()
    from llava_cli.cli import app, register

    register(*sys.argv[1:2])
    app(prog_name="llava")


def _begin_sandbox() -> None:
    from llava_cli.images import begin
    from llava_cli.sandbox.process import WorkerDied

    with suppress(WorkerDied):  # whoever opens a picture says so
        begin()
