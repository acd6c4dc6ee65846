"""Names -> checkpoints on disk. What can be pulled, what is here, what is the default.

A name is an alias below, a Hub repo ("owner/name") or a local folder. Nothing here loads a model.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llava_cli.errors import LlavaError, ModelUnusable, OutputError
from llava_cli.settings import Settings

BUILTIN = "builtin"


@dataclass(frozen=True)
class Family:
    """One model that has an alias."""

    repo: str
    parameters: float
    """In billions, vision tower included."""
    note: str = ""

    @property
    def bytes(self) -> int:
        """What a pull takes: these repos hold 16-bit weights."""
        return round(self.parameters * 2e9)


ALIASES: dict[str, Family] = {
    "llava-1.5-7b": Family("llava-hf/llava-1.5-7b-hf", 7.06, "the classic"),
    "llava-1.5-13b": Family("llava-hf/llava-1.5-13b-hf", 13.35),
    "llava-1.6-mistral-7b": Family("llava-hf/llava-v1.6-mistral-7b-hf", 7.57, "tiles: small text, wide pictures"),
    "llava-1.6-vicuna-7b": Family("llava-hf/llava-v1.6-vicuna-7b-hf", 7.06),
    "llava-1.6-vicuna-13b": Family("llava-hf/llava-v1.6-vicuna-13b-hf", 13.35),
    "llava-1.6-34b": Family("llava-hf/llava-v1.6-34b-hf", 34.75),
    "llava-onevision-0.5b": Family("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 0.89, "small, several pictures"),
    "llava-onevision-7b": Family("llava-hf/llava-onevision-qwen2-7b-ov-hf", 8.03, "several pictures"),
    "llava-interleave-0.5b": Family("llava-hf/llava-interleave-qwen-0.5b-hf", 0.86, "several pictures"),
    "vip-llava-7b": Family("llava-hf/vip-llava-7b-hf", 7.06, "arrows and circles drawn on pictures"),
    "bakllava": Family("llava-hf/bakLlava-v1-hf", 7.57),
}


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine."""

    name: str
    """What the user calls it."""
    folder: Path


def builtin_folder() -> Path:
    return Path(__file__).parent / "builtin"


def find(name: str) -> Checkpoint:
    """The checkpoint that a name means.

    Raises `ModelUnusable` where it is unknown (with the closest names) or not on this machine.
    """
    if name == BUILTIN:
        return Checkpoint(BUILTIN, builtin_folder())
    if Path(name).is_dir() and name not in ALIASES:
        return Checkpoint(name, Path(name))
    if name.startswith((".", "/", "~")) or (os.sep != "/" and os.sep in name):
        raise ModelUnusable(name, "no such folder")
    if folder := on_disk(name):
        return Checkpoint(name, folder)
    if name not in ALIASES and "/" not in name:
        close = difflib.get_close_matches(name, [BUILTIN, *ALIASES], 3, 0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "llava models lists what there is"
        raise ModelUnusable(name, "unknown model", hint)
    size = f"  # {ALIASES[name].bytes / 1e9:.1f} GB" if name in ALIASES else ""
    raise ModelUnusable(name, "not on this machine", f"llava models pull {name}{size}")


def on_disk(name: str) -> Path | None:
    """The folder in the Hub's cache that holds this alias or repo whole; None where there is none."""
    repo = ALIASES[name].repo if name in ALIASES else name
    cache = _hub_cache() / f"models--{repo.replace('/', '--')}"
    try:
        folder = cache / "snapshots" / (cache / "refs" / "main").read_text().strip()
    except OSError:
        return None
    # A pull that was cut off leaves a snapshot without its last files.
    return folder if folder.is_dir() and not (cache / _PARTIAL).exists() else None


_PARTIAL = "llava-pull-unfinished"


def _hub_cache() -> Path:
    """As huggingface_hub finds it, without the cost of importing that."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def default_name(settings: Settings) -> str:
    """The model that was asked for or set, else the first that was pulled, else the built-in one."""
    if settings.model:
        return settings.model
    return next((name for name in pulled() if on_disk(name)), BUILTIN)


def pulled() -> list[str]:
    """What `llava models pull` fetched, the first one first."""
    try:
        return _pulled_file().read_text("utf-8").split()
    except OSError:
        return []


def _pulled_file() -> Path:
    if data := os.environ.get("LLAVA_DATA"):
        return Path(data) / "pulled"
    from platformdirs import user_data_path

    return user_data_path("llava") / "pulled"


# Weights in safetensors and what it takes to use them; never pickles, never code.
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]


def pull(name: str, progress: Callable[[int, int], None]) -> Path:
    """Downloads an alias or repo, going on where an earlier pull was cut off.

    `progress` is called with (bytes here, bytes in all). Raises `ModelUnusable` where the Hub does
    not have or give it, `OutputError` where it cannot be written.
    """
    if name not in ALIASES and "/" not in name:
        find(name)  # says what was probably meant
    repo = ALIASES[name].repo if name in ALIASES else name
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    done = 0

    class Meter:
        """What huggingface_hub takes for a tqdm bar: it only counts."""

        def __init__(self, *args: object, initial: float = 0, **kwargs: object) -> None:
            self.update(initial)

        def __enter__(self) -> Meter:
            return self

        def __exit__(self, *error: object) -> None: ...

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: None

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            done += int(n or 0)
            progress(done, total)

    try:
        cache = _hub_cache() / f"models--{repo.replace('/', '--')}"
        total = 0
        files = snapshot_download(repo, allow_patterns=WANTED, cache_dir=_hub_cache(), dry_run=True)
        if not any(f.filename.endswith(".safetensors") for f in files):
            raise ModelUnusable(name, "has no safetensors weights; pickles are never loaded")
        total = sum(f.file_size or 0 for f in files)
        done = sum(f.file_size or 0 for f in files if f.is_cached)
        cache.mkdir(parents=True, exist_ok=True)
        (cache / _PARTIAL).touch()
        progress(done, total)
        for file in files:
            if not file.is_cached:
                hf_hub_download(
                    repo, file.filename, revision=file.commit_hash, cache_dir=_hub_cache(), tqdm_class=Meter
                )
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / "main").write_text(files[0].commit_hash)
        (cache / _PARTIAL).unlink()
        _remember(name)
        return cache / "snapshots" / files[0].commit_hash
    except GatedRepoError:
        raise ModelUnusable(
            name, "needs its owner's leave", f"ask at the Hub's page of {repo}, then: hf auth login"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelUnusable(name, "the Hub has no such model", "llava models lists what there is") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise ModelUnusable(name, f"the Hub cannot be reached ({_brief(error)})", f"llava models pull {name}") from None
    except OSError as error:
        raise OutputError(
            str(error.filename or cache), error.strerror or str(error), f"llava models pull {name}"
        ) from None
    except LlavaError:
        raise
    except Exception as error:  # httpx errors of a connection that broke half way
        raise ModelUnusable(name, f"download broke off ({_brief(error)})", f"llava models pull {name}") from None


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _remember(name: str) -> None:
    file = _pulled_file()
    names = [*pulled(), name]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(dict.fromkeys(names)) + "\n", "utf-8")
