"""Rows of a batch, as `llava batch` writes them, without a model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llava_cli.batch.rows import to_line


def row(image: str, answer: str | None = "a cat", question: str = "what is this?", **more: Any) -> dict[str, Any]:
    """A row of its nine keys and `more`; without an answer one that failed."""
    status = "error" if answer is None else "ok"
    error = {"type": "BadImage", "message": "truncated"} if answer is None else None
    return {
        "image": image,
        "question": question,
        "answer": answer,
        "status": status,
        "error": error,
        "model": "builtin",
        "finish_reason": "stop" if answer is not None else None,
        "answer_tokens": 2,
        "sha256": None,
        **more,
    }


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_bytes(b"".join(map(to_line, rows)))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
