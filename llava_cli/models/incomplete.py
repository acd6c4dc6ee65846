"""Folders that are no whole checkpoint: what they are, and where the rest of it may be.

Looked at only where something is missing, by the names of files; of those that are too small or odd, their beginning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from llava_cli import regular_files
from llava_cli.errors import ModelUnusable
from llava_cli.files import quoted
from llava_cli.models import foreign_formats
from llava_cli.models.registry import Checkpoint
from llava_cli.untrusted_text import one_line

_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template*")
_TOKENIZERS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
_TRAINERS = ("trainer_state.json", "training_args.bin", "optimizer.*", "scheduler.pt", "rng_state*.pth")
"""What trainers write beside a model that they are not done with."""
_BEGINNING = 64
"""Bytes of a file by which it is seen that another stands in its place."""
_SHOWN = 3
"""Folders that are named, of several."""


def no_config(checkpoint: Checkpoint) -> ModelUnusable:
    """The error for a folder without config.json."""
    name, folder = checkpoint.name, checkpoint.folder
    names = _names(folder)
    if found := foreign_formats.in_folder(names, os.fspath(folder)):
        return ModelUnusable(name, *found)
    if below := _checkpoints_below(folder):
        shown = ", ".join(one_line(os.path.relpath(path, folder)) for path in below[-_SHOWN:])
        more = f" and {len(below) - _SHOWN} more" if len(below) > _SHOWN else ""
        words = f"is no checkpoint itself, but holds {'one' if len(below) == 1 else len(below)}: {shown}{more}"
        return ModelUnusable(name, words, f"llava ask -m {quoted(below[-1])}")
    return lacks(checkpoint, "no config.json in it: not a checkpoint", "llava models lists what there is")


def lacks(checkpoint: Checkpoint, words: str, hint: str = "") -> ModelUnusable:
    """The error for a folder without some file that a checkpoint has, with what is known of how that came."""
    names = _names(checkpoint.folder)
    if unfinished := foreign_formats.unfinished(names) or _unfinished_of_the_hub(checkpoint.folder):
        words += f", and {one_line(unfinished)} is of a download that has not ended"
        hint = hint or "end the download first"
    return ModelUnusable(checkpoint.name, words, hint)


def lacks_processor(checkpoint: Checkpoint, words: str, hint: str) -> ModelUnusable:
    """The error for a folder without its processor or tokenizer: trainers write them elsewhere, or not at all."""
    folder = checkpoint.folder
    if any(next(folder.glob(pattern), None) for pattern in _TRAINERS):
        words += ": a trainer's checkpoint"
        hint = (
            f"cp MODEL/*processor_config.json MODEL/tokenizer* {quoted(folder)}, MODEL being the one that was trained"
        )
    parent = folder.resolve().parent
    found = [path for pattern in (*_PROCESSORS, *_TOKENIZERS) for path in sorted(parent.glob(pattern))]
    if missing := [path for path in found if path.is_file() and not (folder / path.name).exists()]:
        words += f"; {one_line(str(parent))} has it"
        hint = f"cp {' '.join(map(quoted, missing))} {quoted(folder)}"
    return lacks(checkpoint, words, hint)


def check_beginnings(checkpoint: Checkpoint, names: Collection[str]) -> None:
    """Raises `ModelUnusable` where git-lfs, or a browser, has left something else in a file's place."""
    for name in names:
        try:
            with regular_files.open_regular(checkpoint.folder / name) as file:
                beginning = file.read(_BEGINNING).lstrip().lower()
        except OSError:  # of which is told where the file is wanted
            continue
        for sign, (words, hint) in _IN_PLACE.items():
            if beginning.startswith(sign):
                folder = quoted(checkpoint.folder)
                raise ModelUnusable(checkpoint.name, f"{one_line(name)} is {words}", hint.format(folder=folder))


_IN_PLACE = {
    b"version https://git-lfs": ("a pointer of git-lfs, not the file itself", "git -C {folder} lfs pull"),
    b"# xet version": ("a pointer of git-xet, not the file itself", "git -C {folder} xet checkout"),
    b"<!doctype": ("a web page", "llava models pull OWNER/NAME fetches the files themselves"),
    b"<html": ("a web page", "llava models pull OWNER/NAME fetches the files themselves"),
}
"""How what stands in a file's place begins, what it is, and the next command."""


def _checkpoints_below(folder: Path) -> list[Path]:
    """Folders with a config.json, or an adapter's, up to two further down, or in the Hub's cache.

    `checkpoint-1000` comes after `-500`.
    """
    places = ("*", "*/*", "models--*/snapshots/*")
    patterns = [f"{place}/{file}" for place in places for file in ("config.json", "adapter_config.json")]

    def found() -> Iterator[Path]:
        for pattern in patterns:
            with suppress(OSError):  # one that may not be entered
                yield from (path.parent for path in folder.glob(pattern))

    def natural(path: Path) -> list[tuple[int, str]]:
        return [(int(digits or 0), text) for text, digits in re.findall(r"(\D+)(\d{0,18})", str(path))]

    return sorted(set(found()), key=natural)


def _unfinished_of_the_hub(folder: Path) -> str | None:
    """What `hf download --local-dir` leaves where it was ended."""
    return foreign_formats.unfinished(_names(folder / ".cache" / "huggingface" / "download"))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
