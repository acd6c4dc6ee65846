"""A terminal that is none."""

from __future__ import annotations

import io


class Screen(io.StringIO):
    """A terminal that keeps what it is told."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True
