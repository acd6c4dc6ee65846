"""The table of limits: each is enforced somewhere, and tested."""

from __future__ import annotations

from pathlib import Path

from helpers.tables import for_each

import llava_cli
from llava_cli import limits

NAMES = [name for name in vars(limits) if name.isupper()]
CODE = "\n".join(path.read_text("utf-8") for path in Path(llava_cli.__file__).parent.rglob("*.py"))
TESTS = "\n".join(path.read_text("utf-8") for path in Path(__file__).parents[1].rglob("test_*.py"))


@for_each("name", NAMES)
def test_each_is_enforced_and_tested(name: str) -> None:
    assert f"limits.{name}" in CODE
    assert f"limits.{name}" in TESTS or f'limits, "{name}"' in TESTS
