"""A stream that says it is a terminal."""

from __future__ import annotations

import io


class Screen(io.StringIO):
    """Keeps what is written to it."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True
