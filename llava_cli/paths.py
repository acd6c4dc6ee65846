"""Where the user's files are: settings, data, caches, the server's socket, and temporary folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from llava_cli.errors import OutputError

NOWHERE = Path(os.devnull, "home")
"""Stands in for an unknown home (a user without a password entry, and no `HOME`): nothing exists in it, and nothing
can be created. A relative path would point into the current folder, which may be anybody's."""


def config_file() -> Path:
    """The settings that `llava models default` writes and the user may edit."""
    return _named("LLAVA_CONFIG") or _user_folder("config") / "config.toml"


def data_folder() -> Path:
    """Holds chats, typed history and the list of pulled models."""
    return _named("LLAVA_DATA") or _user_folder("data")


def prompts_folder() -> Path:
    """Holds the prompts that `llava prompts save` has saved, a TOML file each."""
    return data_folder() / "prompts"


def quantized_cache() -> Path:
    """Holds quantized copies of checkpoints."""
    return _cache_folder() / "quantised"


def digest_cache() -> Path:
    """Holds the SHA-256 digests of files that have not changed since."""
    return _cache_folder() / "digests"


def kernel_cache() -> Path:
    """Holds machine code that was compiled for this CPU."""
    return _cache_folder() / "kernels"


def speed_file() -> Path:
    """Holds how fast this machine multiplies, as `llava models` and `llava doctor` have measured."""
    return _cache_folder() / "speed.json"


def socket_path() -> Path:
    """The socket of the server that answers this user's own commands."""
    if path := _named("LLAVA_SOCKET"):
        return path
    from platformdirs import user_runtime_path

    try:
        return user_runtime_path("llava") / "server.sock"
    except (OSError, RuntimeError):  # another user owns the folder, where no socket is trusted, or there is no folder
        return Path(os.environ.get("TMPDIR") or "/tmp", f"runtime-{os.geteuid()}", "server.sock")


def hub_cache() -> Path:
    """The cache of huggingface_hub, found by its rules without the cost of importing it."""

    def expand(path: str) -> str:
        return os.path.expandvars(os.path.expanduser(path))

    env = os.environ
    home = expand(env.get("HF_HOME", os.path.join(env.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")))
    cache = expand(env.get("HF_HUB_CACHE", env.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))))
    return NOWHERE / "hub" if cache.startswith("~") else Path(cache)  # not a folder called `~` in the current one


def expand_user(path: str) -> Path:
    """A path that may begin with `~`, unchanged where that home is unknown."""
    return Path(os.path.expanduser(path))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder that only this user can enter, deleted at the end.

    Raises `OutputError` where no folder for temporary files is writable.
    """
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


def _named(variable: str) -> Path | None:
    """The path that an environment variable names."""
    return Path(value) if (value := os.environ.get(variable)) else None


def _cache_folder() -> Path:
    return _named("LLAVA_CACHE") or _user_folder("cache")


def _user_folder(kind: Literal["cache", "config", "data"]) -> Path:
    """The user's folder of one kind, by the conventions of their system."""
    import platformdirs

    try:
        folder = Path(getattr(platformdirs, f"user_{kind}_dir")("llava"))
    except RuntimeError:  # no home
        return NOWHERE / "llava"
    return folder if folder.is_absolute() else NOWHERE / "llava"
