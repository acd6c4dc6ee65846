"""Reads the files of a checkpoint's folder: which ones matter, and their JSON within bounds."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from llava_cli import limits
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import ModelUnusable, message_line, os_reason, plain_message
from llava_cli.models.aliases import ALIASES
from llava_cli.models.registry import Checkpoint, is_folder
from llava_cli.paths import expand_user
from llava_cli.regular_files import NotRegular, TooLarge, read
from llava_cli.untrusted_text import one_line

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
Configs = dict[str, dict[str, Any]]
"""The contents of a checkpoint's JSON files, by their names."""
_TEXT_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
_NEVER_OPENED = {
    *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".py", ".md", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4"),
}
"""Pickles, weights in other formats, code, and files for people."""


def pull_command(name: str) -> str:
    """The command that downloads a damaged model again; empty for a folder of the user's."""
    return f"llava models pull {name}" if name in ALIASES or ("/" in name and not Path(name).exists()) else ""


def tokenizer_hint(checkpoint: Checkpoint) -> str:
    """What to do about a tokenizer that cannot be used: often only `tokenizer.json` is missing."""
    has_file = (checkpoint.folder / "tokenizer.json").exists()
    hint = "llava models lists others" if has_file else "put the same model's tokenizer.json into its folder"
    return pull_command(checkpoint.name) or hint


def read_json(checkpoint: Checkpoint, file: str) -> dict[str, Any]:
    """A JSON object in the checkpoint's folder. Raises `ModelUnusable` if it is missing or not an object."""
    bounds = Bounds(limits.CONFIG_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)
    try:
        data = read(checkpoint.folder / file, limits.CONFIG_BYTES)
        data.decode("utf-8")  # the parser takes UTF-16 too, which transformers does not
        content = loads(data, bounds)
    except FileNotFoundError:
        raise ModelUnusable(
            checkpoint.name, f"no {file} in it: not a checkpoint", "llava models lists what there is"
        ) from None
    except OSError as error:
        raise unreadable(checkpoint, file, error) from None
    except ValueError as error:
        words = f"{file} cannot be read ({message_line(error)})"
        raise ModelUnusable(checkpoint.name, words, pull_command(checkpoint.name)) from None
    if not isinstance(content, dict):
        raise ModelUnusable(checkpoint.name, f"{file} is damaged", pull_command(checkpoint.name))
    return content


def unreadable(checkpoint: Checkpoint, file: str, error: OSError) -> ModelUnusable:
    """The error for a file that cannot be read."""
    is_ours = isinstance(error, (NotRegular, TooLarge))
    words = os_reason(error) if is_ours else f"cannot be read ({plain_message(error)})"
    return ModelUnusable(checkpoint.name, f"{one_line(file)} {words}", pull_command(checkpoint.name))


def file_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """The files that an answer may depend on, in a stable order, and their sizes in bytes.

    Raises `ModelUnusable` if the folder cannot be read, or one of them is not a regular file.
    """
    sizes = {}
    for name in _relevant_names(checkpoint):
        try:
            status = os.stat(checkpoint.folder / name)
            if stat.S_ISREG(status.st_mode):
                sizes[name] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise NotRegular(checkpoint.folder / name)
        except FileNotFoundError:  # a broken link
            continue
        except OSError as error:
            raise unreadable(checkpoint, name, error) from None
    return sizes


def _relevant_names(checkpoint: Checkpoint) -> list[str]:
    """All names but hidden ones and files that are never opened; in subfolders only texts: templates and tokenizers."""
    folder = checkpoint.folder
    try:
        names = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
        for subfolder in [name for name in names if os.path.isdir(folder / name)]:
            inside = sorted(os.listdir(folder / subfolder))
            names += [f"{subfolder}/{name}" for name in inside if suffix_of(name) in _TEXT_SUFFIXES]
    except OSError as error:
        raise ModelUnusable(checkpoint.name, f"cannot be read ({plain_message(error)})") from None
    return [name for name in names if suffix_of(name) not in _NEVER_OPENED]


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_adapter(name: str) -> bool:
    """Whether a model's name means a folder with an adapter."""
    return is_folder(name) and os.path.isfile(expand_user(name) / ADAPTER_CONFIG)


def adapter_weights(folder: Path) -> Path | None:
    """The file with an adapter's tensors; None if there is none."""
    paths = (folder / name for name in ("adapter_model.safetensors", "adapter_model.bin"))
    return next((path for path in paths if path.exists()), None)
