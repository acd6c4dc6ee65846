"""Names -> checkpoints on disk. What can be pulled, what is here, what is the default.

A name is an alias below, a Hub repo ("owner/name") or a local folder. Nothing here loads a model.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from llava_cli import bounded_json, files, limits, regular_files
from llava_cli.errors import ModelUnusable
from llava_cli.paths import NOWHERE, expanded, user_folder
from llava_cli.settings import Settings

BUILTIN = "builtin"


@dataclass(frozen=True)
class Alias:
    """One model that has an alias."""

    repo: str
    parameters: float
    """In billions, vision tower included."""
    family: str
    """Its name in `families`."""
    languages: str
    """The language model that it was made of."""
    note: str = ""

    @property
    def bytes(self) -> int:
        """What a pull takes: these repos hold 16-bit weights."""
        return round(self.parameters * 2e9)


ALIASES: dict[str, Alias] = {
    "llava-1.5-7b": Alias("llava-hf/llava-1.5-7b-hf", 7.06, "llava-1.5", "Vicuna 1.5", "the classic"),
    "llava-1.5-13b": Alias("llava-hf/llava-1.5-13b-hf", 13.35, "llava-1.5", "Vicuna 1.5"),
    "llava-1.6-mistral-7b": Alias(
        "llava-hf/llava-v1.6-mistral-7b-hf",
        7.57,
        "llava-1.6-mistral",
        "Mistral 0.2",
        "tiles: small text, wide pictures",
    ),
    "llava-1.6-vicuna-7b": Alias("llava-hf/llava-v1.6-vicuna-7b-hf", 7.06, "llava-1.6-vicuna", "Vicuna 1.5"),
    "llava-1.6-vicuna-13b": Alias("llava-hf/llava-v1.6-vicuna-13b-hf", 13.35, "llava-1.6-vicuna", "Vicuna 1.5"),
    "llava-1.6-34b": Alias("llava-hf/llava-v1.6-34b-hf", 34.75, "llava-1.6-34b", "Nous Hermes 2 Yi"),
    "llava-next-llama3-8b": Alias("llava-hf/llama3-llava-next-8b-hf", 8.36, "llava-next-llama3", "Llama 3"),
    "llava-next-72b": Alias("llava-hf/llava-next-72b-hf", 72.67, "llava-next-qwen", "Qwen 1.5"),
    "llava-next-110b": Alias("llava-hf/llava-next-110b-hf", 111.6, "llava-next-qwen", "Qwen 1.5"),
    "llava-onevision-0.5b": Alias(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 0.89, "llava-onevision", "Qwen 2", "small, several pictures"
    ),
    "llava-onevision-7b": Alias(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf", 8.03, "llava-onevision", "Qwen 2", "several pictures"
    ),
    "llava-onevision-72b": Alias("llava-hf/llava-onevision-qwen2-72b-ov-hf", 73.2, "llava-onevision", "Qwen 2"),
    "llava-interleave-0.5b": Alias(
        "llava-hf/llava-interleave-qwen-0.5b-hf", 0.86, "llava-interleave", "Qwen 1.5", "several pictures"
    ),
    "llava-interleave-7b": Alias(
        "llava-hf/llava-interleave-qwen-7b-hf", 8.17, "llava-interleave", "Qwen 1.5", "several pictures"
    ),
    "vip-llava-7b": Alias(
        "llava-hf/vip-llava-7b-hf", 7.06, "vip-llava", "Vicuna 1.5", "arrows and circles drawn on pictures"
    ),
    "vip-llava-13b": Alias("llava-hf/vip-llava-13b-hf", 13.35, "vip-llava", "Vicuna 1.5"),
    "bakllava": Alias("llava-hf/bakLlava-v1-hf", 7.57, "bakllava", "Mistral 0.1"),
    "smolvlm-256m": Alias("HuggingFaceTB/SmolVLM-256M-Instruct", 0.26, "smolvlm", "SmolLM2", "the smallest"),
    "smolvlm-500m": Alias("HuggingFaceTB/SmolVLM-500M-Instruct", 0.51, "smolvlm", "SmolLM2", "small, quick on a CPU"),
    "smolvlm2-2.2b": Alias(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct", 2.25, "smolvlm2", "SmolLM2", "several pictures, quick on a CPU"
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine."""

    name: str
    """What the user calls it."""
    folder: Path
    adapter: Path | None = None
    """The folder of an adapter that is merged into its weights."""


def builtin_folder() -> Path:
    return Path(__file__).parents[1] / "builtin"


def find(name: str) -> Checkpoint:
    """The checkpoint that a name means.

    Raises `ModelUnusable` where it is unknown (with the closest names), not on this machine, or its place in the Hub's
    cache cannot be told.
    """
    if name == BUILTIN:
        return Checkpoint(BUILTIN, builtin_folder())
    if name not in ALIASES and os.path.isfile(file := os.path.expanduser(name)):
        from llava_cli.models import foreign_formats  # where a folder is named, nobody waits for its table

        raise ModelUnusable(name, *(foreign_formats.of_file(file) or ("is a file", "-m takes a model's folder")))
    if is_folder(name):
        folder = expanded(name)
        if not os.path.isdir(folder):
            raise ModelUnusable(name, _why_no_folder(folder))
        return Checkpoint(name, folder)
    if found := _snapshot(name):
        return Checkpoint(name, found)
    if name not in ALIASES and "/" not in name:
        close = difflib.get_close_matches(name, [BUILTIN, *ALIASES], 3, 0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "llava models lists what there is"
        raise ModelUnusable(name, "unknown model", hint)
    known = ALIASES.get(name)
    of = f" ({known.repo}, {known.bytes / 1e9:.1f} GB)" if known else ""
    raise ModelUnusable(name, f"not on this machine{of}", f"llava models pull {name}")


def _why_no_folder(folder: Path) -> str:
    try:
        os.stat(folder)
    except PermissionError as error:
        return (error.strerror or str(error)).lower()
    except (OSError, ValueError):
        pass
    return "no such folder"


def is_folder(name: str) -> bool:
    """Whether a name means a folder of the user's: one that is there, or what no repo can be called."""
    path = name.startswith((".", "/", "~")) or (os.sep != "/" and os.sep in name)
    return path or (name not in (BUILTIN, *ALIASES) and os.path.isdir(name))


def on_disk(name: str) -> Path | None:
    """The folder in the Hub's cache that holds this alias or repo whole; None where there is none."""
    try:
        return _snapshot(name)
    except ModelUnusable:
        return None


def _snapshot(name: str) -> Path | None:
    """As `on_disk`. Raises `ModelUnusable` where the cache names no commit, for that is a part of the path."""
    cache = repo_cache(name)
    try:
        commit = regular_files.read(cache / "refs" / "main", limits.COMMIT_BYTES).decode("utf-8", "replace").strip()
        if is_commit(commit):
            folder = cache / "snapshots" / commit
            return folder if _whole(folder) else None
    except (regular_files.NotRegular, regular_files.TooLarge):
        pass
    except (OSError, ValueError):
        return None
    raise ModelUnusable(name, f"{cache / 'refs' / 'main'} names no commit", f"llava models pull {name}")


def is_commit(text: str) -> bool:
    """Whether a text is git's name of a commit, in SHA-1 or in SHA-256: then it may be a part of a path."""
    return re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", text) is not None


def _whole(folder: Path) -> bool:
    """Whether all weights are there: they are fetched last, and other tools fetch a config alone."""
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.exists() and not (folder / "model.safetensors").exists():
        bounds = bounded_json.Bounds(limits.CONFIG_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)
        try:
            shards = bounded_json.loads(regular_files.read(index, bounds.bytes), bounds)["weight_map"].values()
            weights = {os.fspath(shard) for shard in shards}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return True  # damaged, not absent: the loader says so
    return all((folder / name).exists() for name in weights)


def repo_of(name: str) -> str:
    return ALIASES[name].repo if name in ALIASES else name


def repo_cache(name: str) -> Path:
    return hub_cache() / f"models--{repo_of(name).replace('/', '--')}"


def hub_cache() -> Path:
    """As huggingface_hub finds it, without the cost of importing that."""

    def expand(path: str) -> str:
        return os.path.expandvars(os.path.expanduser(path))

    env = os.environ
    home = expand(env.get("HF_HOME", os.path.join(env.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")))
    cache = expand(env.get("HF_HUB_CACHE", env.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))))
    return NOWHERE / "hub" if cache.startswith("~") else Path(cache)  # not in a folder `~` of the current one


def quantised_cache() -> Path:
    """Where quantised copies of checkpoints are kept."""
    return _cache() / "quantised"


def digest_cache() -> Path:
    """Where it is remembered which digests files have."""
    return _cache() / "digests"


def kernel_cache() -> Path:
    """Where machine code is kept that was made for this CPU."""
    return _cache() / "kernels"


def _cache() -> Path:
    if cache := os.environ.get("LLAVA_CACHE"):
        return Path(cache)
    return user_folder("cache")


def default_name(settings: Settings) -> str:
    """The model that was asked for or set, else the first that was pulled, else the built-in one."""
    if settings.model:
        return settings.model
    return next((name for name in pulled() if on_disk(name)), BUILTIN)


def pulled() -> list[str]:
    """What `llava models pull` fetched, the first one first."""
    try:
        return regular_files.read(data_folder() / "pulled", limits.SETTINGS_BYTES).decode().split()
    except (OSError, ValueError):
        return []


def data_folder() -> Path:
    """Where chats and what was pulled are noted: `LLAVA_DATA` or the user's data folder."""
    if named := os.environ.get("LLAVA_DATA"):
        return Path(named)
    return user_folder("data")


def remember(name: str) -> None:
    """Notes that a model was pulled."""
    names = [*pulled(), name]
    folder = files.followed(data_folder())
    files.make_folder(folder, 0o700)
    files.put(folder / "pulled", ["".join(f"{one}\n" for one in dict.fromkeys(names)).encode()], files.SECRET)
