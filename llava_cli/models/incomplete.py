"""Errors for folders that are not a complete checkpoint: what they are, and where the rest may be.

Looked at only when something is missing, and by file names alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llava_cli.errors import ModelUnusable
from llava_cli.files import quoted
from llava_cli.models import other_formats
from llava_cli.models.registry import Checkpoint
from llava_cli.untrusted_text import one_line

_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template*")
_TOKENIZERS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
_TRAINING_STATE = ("trainer_state.json", "training_args.bin", "optimizer.*", "scheduler.pt", "rng_state*.pth")
"""Files that trainers write beside a model that they have not finished."""
_MOST_SHOWN = 3
"""Of several folders, how many an error names."""


def missing_config(checkpoint: Checkpoint) -> ModelUnusable:
    """The error for a folder without config.json."""
    name, folder = checkpoint.name, checkpoint.folder
    if reason_and_hint := other_formats.describe_folder(_names(folder), os.fspath(folder)):
        return ModelUnusable(name, *reason_and_hint)
    if below := _checkpoints_below(folder):
        shown = ", ".join(one_line(os.path.relpath(path, folder)) for path in below[-_MOST_SHOWN:])
        others = f" and {len(below) - _MOST_SHOWN} more" if len(below) > _MOST_SHOWN else ""
        words = f"is not a checkpoint itself, but holds {'one' if len(below) == 1 else len(below)}: {shown}{others}"
        return ModelUnusable(name, words, f"llava ask -m {quoted(below[-1])}")
    return missing_file(checkpoint, "no config.json in it: not a checkpoint", "llava models lists what there is")


def missing_file(checkpoint: Checkpoint, words: str, hint: str = "") -> ModelUnusable:
    """The error for a folder without some file of a checkpoint; mentions a download that has not ended."""
    unfinished = other_formats.first_unfinished(_names(checkpoint.folder))
    if unfinished := unfinished or _unfinished_hub_download(checkpoint.folder):
        words += f", and {one_line(unfinished)} is of a download that has not ended"
        hint = hint or "end the download first"
    return ModelUnusable(checkpoint.name, words, hint)


def missing_processor(checkpoint: Checkpoint, words: str, hint: str) -> ModelUnusable:
    """The error for a folder without processor or tokenizer: trainers write them elsewhere, or not at all."""
    folder = checkpoint.folder
    if any(next(folder.glob(pattern), None) for pattern in _TRAINING_STATE):
        words += ": a trainer's checkpoint"
        hint = (
            f"cp MODEL/*processor_config.json MODEL/tokenizer* {quoted(folder)}, MODEL being the one that was trained"
        )
    parent = folder.resolve().parent
    above = [path for pattern in (*_PROCESSORS, *_TOKENIZERS) for path in sorted(parent.glob(pattern))]
    if missing := [path for path in above if path.is_file() and not (folder / path.name).exists()]:
        words += f"; {one_line(str(parent))} has it"
        hint = f"cp {' '.join(map(quoted, missing))} {quoted(folder)}"
    return missing_file(checkpoint, words, hint)


def _checkpoints_below(folder: Path) -> list[Path]:
    """Folders with a model's or an adapter's config, up to two levels down, or in the Hub's cache.

    In natural order: `checkpoint-1000` comes after `checkpoint-500`.
    """
    places = ("*", "*/*", "models--*/snapshots/*")
    patterns = [f"{place}/{file}" for place in places for file in ("config.json", "adapter_config.json")]

    def folders() -> Iterator[Path]:
        for pattern in patterns:
            with suppress(OSError):  # one that may not be entered
                yield from (path.parent for path in folder.glob(pattern))

    def natural(path: Path) -> list[tuple[int, str]]:
        return [(int(digits or 0), text) for text, digits in re.findall(r"(\D+)(\d{0,18})", str(path))]

    return sorted(set(folders()), key=natural)


def _unfinished_hub_download(folder: Path) -> str | None:
    """A file that `hf download --local-dir` leaves when it is interrupted."""
    return other_formats.first_unfinished(_names(folder / ".cache" / "huggingface" / "download"))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
