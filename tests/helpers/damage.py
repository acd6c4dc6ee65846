"""Ways to damage a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path], object]


def put(file: Path, content: bytes | str) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def change(name: str, **values: Any) -> Damage:
    """Sets keys of a JSON file; a value of None removes the key."""

    def damage(folder: Path) -> None:
        content = {**json.loads((folder / name).read_text()), **values}
        put(folder / name, json.dumps({key: value for key, value in content.items() if value is not None}))

    return damage
