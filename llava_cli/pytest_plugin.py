"""The fixture `llava` of pytest, where this package is installed: a model that looks at a test's screenshots.

    def test_page(llava, page):
        assert llava.check(page.screenshot(), "the Save button is visible")

It is an `Engine` with the user's own settings (`LLAVA_MODEL`, …), loaded once a session when a test first asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from llava_cli.engine import Engine


@pytest.fixture(scope="session")
def llava() -> Engine:
    """A loaded model: `llava.check(image, statement)`, `llava.ask(image, question)`."""
    from llava_cli.loader import default_engine

    return default_engine()
