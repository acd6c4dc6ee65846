"""Where the user's own files are, and where a run keeps what it needs for a while; also where a home has no room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from llava_cli.errors import OutputError

NOWHERE = Path(os.devnull, "home")
"""Takes the place of a home that nobody knows (a user without an entry in the system's list, and no `HOME`): there is
no file in it, and none can be made. A relative path would be one into the current folder, which is anybody's."""


def user_folder(kind: Literal["cache", "config", "data"]) -> Path:
    """The user's folder for what `llava` keeps of a kind, as their system has it."""
    import platformdirs

    try:
        folder = Path(getattr(platformdirs, f"user_{kind}_dir")("llava"))
    except RuntimeError:  # no home
        return NOWHERE / "llava"
    return folder if folder.is_absolute() else NOWHERE / "llava"


def expanded(path: str) -> Path:
    """A path that may begin with `~`: as it is where nobody knows that home."""
    return Path(os.path.expanduser(path))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this user's alone, gone in the end. Raises `OutputError` where no temporary folder can be written."""
    from tempfile import TemporaryDirectory

    try:
        folder = TemporaryDirectory(prefix="llava-", ignore_cleanup_errors=True)
        os.chmod(folder.name, 0o700)  # whatever the umask is
    except OSError as error:
        reason = "no folder for temporary files can be written to"
        thing = os.environ.get("TMPDIR") or os.fspath(error.filename or "/tmp")
        raise OutputError(thing, reason, "TMPDIR=FOLDER llava … names one") from None
    with folder:
        yield Path(folder.name)
