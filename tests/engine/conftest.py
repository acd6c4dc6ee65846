"""What several tests of engines share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers.fidelity import Reference
    from helpers.made_family import Family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """A family other than LLaVA's by its name, made once."""
    made: dict[str, Family] = {}

    def get(name: str) -> Family:
        from helpers.made_family import Family

        if name not in made:
            made[name] = Family.make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def references(checkpoint: Callable[[str], Path]) -> Callable[[str], Reference]:
    """The reference for a family's tiny checkpoint, loaded once."""
    from helpers.fidelity import reference

    loaded: dict[str, Reference] = {}

    def get(family: str) -> Reference:
        if family not in loaded:
            loaded[family] = reference(family, checkpoint(family))
        return loaded[family]

    return get
