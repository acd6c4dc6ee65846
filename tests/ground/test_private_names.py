"""Tests reach into the wing that they stand beside, and into no other: what others need of a wing is public."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import llava_cli

PACKAGE = Path(llava_cli.__file__).parent
TESTS = Path(__file__).parents[1]
WINGS = {
    "batch": ["batch"],
    "chat": ["chat", "render.py"],
    "cli": ["cli", "diagnostics.py", "fast_start.py", "render.py", "settings.py"],
    "convert": ["convert"],
    "cpu": ["engine/cpu"],
    "engine": ["engine"],
    "gpu": ["engine"],
    "ground": ["*.py"],
    "hardware": ["hardware"],
    "helpers/kernels.py": ["engine/cpu"],
    "images": ["images"],
    "models": ["models"],
    "prompts": ["prompts"],
    "remote": ["engine/remote"],
    "sandbox": ["sandbox", "processes.py"],
    "server": ["server"],
}
"""What the tests of a folder, or a helper, are about."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(path: Path) -> set[str]:
    """The private names that a module makes, as its own or as attributes of its objects."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return set(filter(is_private, found))


def used(path: Path) -> Iterator[tuple[int, str]]:
    """The private names that a test takes from elsewhere: by a dot, by an import, or in a patch's text."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "os")
        ):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            texts = [word.value for word in node.args[:2] if isinstance(word, ast.Constant)]
            yield from ((node.lineno, str(text).rpartition(".")[2]) for text in texts)


def test_no_test_reaches_into_another_wing() -> None:
    modules = {path: defined(path) for path in PACKAGE.rglob("*.py")}
    tests = {path: defined(path) for path in sorted(TESTS.rglob("*.py"))}
    helpers = {name for path, names in tests.items() if path.parent.name == "helpers" for name in names}
    wrong = []
    for path, names in tests.items():
        place = path.relative_to(TESTS).as_posix()
        wings = WINGS.get(place) or WINGS.get(path.parent.name, [])
        own = {file for wing in wings for file in PACKAGE.glob(wing)}
        far, near = set(), names | helpers
        for module, private in modules.items():
            (near if own & {module, *module.parents} else far).update(private)
        wrong += [f"{place}:{line}: {name}" for line, name in used(path) if name in far - near]
    assert not wrong, "\n".join(wrong)


def test_no_test_module_imports_another() -> None:
    wrong = [
        f"{path.relative_to(TESTS)}: {ast.unparse(node)}"
        for path in sorted(TESTS.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "test_" in ast.unparse(node)
    ]
    assert not wrong, "\n".join(wrong)
