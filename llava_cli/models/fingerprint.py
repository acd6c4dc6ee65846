"""A hash that identifies a checkpoint: answers of two checkpoints with the same fingerprint can be compared."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from llava_cli.models import digests
from llava_cli.models.checkpoint_files import ADAPTER_CONFIG, adapter_weights, file_sizes, unreadable
from llava_cli.models.registry import Checkpoint, is_commit
from llava_cli.paths import hub_cache


def fingerprint(checkpoint: Checkpoint) -> str:
    """A SHA-256 in hexadecimal over the names, sizes and contents of the checkpoint's files, and of its adapter.

    In the Hub's own cache the commit stands for the contents. Raises `ModelUnusable` if they cannot be read.
    """
    sizes, commit = file_sizes(checkpoint), _hub_commit(checkpoint.folder)
    contents = [commit] * len(sizes) if commit else _sha256(checkpoint, [checkpoint.folder / name for name in sizes])
    digest = hashlib.sha256()
    for (name, size), content in zip(sizes.items(), contents, strict=True):
        for field in (os.fsencode(name), str(size).encode(), content.encode()):
            digest.update(len(field).to_bytes(8, "little") + field)
    if adapter := checkpoint.adapter:
        paths = [path for path in (adapter / ADAPTER_CONFIG, adapter_weights(adapter)) if path]
        digest.update("".join(_sha256(checkpoint, paths)).encode())
    return digest.hexdigest()


def _sha256(checkpoint: Checkpoint, paths: list[Path]) -> list[str]:
    try:
        return digests.sha256(paths)
    except OSError as error:
        raise unreadable(checkpoint, os.path.basename(str(error.filename)), error) from None


def _hub_commit(folder: Path) -> str | None:
    """The repo and commit that a folder holds; None outside the Hub's own cache, where anybody may choose names."""
    folder = folder.resolve()
    snapshots, repo = folder.parent, folder.parent.parent
    is_snapshot = snapshots.name == "snapshots" and repo.name.startswith("models--") and is_commit(folder.name)
    return f"{repo.name} {folder.name}" if is_snapshot and repo.parent == hub_cache().resolve() else None
