"""The command as tests run it; the fixtures are in `conftest.py`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import NoReturn

import pytest
from typer.testing import Result

Run = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[bytes]"]


def missing(reason: str) -> NoReturn:
    """Skips a test that this machine cannot run; in CI, where every test has to run, fails it."""
    if os.environ.get("CI", "").lower() in ("", "0", "false"):
        pytest.skip(reason)
    pytest.fail(f"{reason} (CI is set)", pytrace=False)
