"""Draws `docs/imports.svg`, the package's import graph: `python docs/draw_imports.py`.

A box is a wing or a module of the package, and is below everything that imports it. An arrow that others imply is left
out: if `cli` imports `loader` and `loader` imports `engine`, there is none from `cli` to `engine`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import llava_cli

PACKAGE = Path(llava_cli.__file__).parent
PICTURE = Path(__file__).parent / "imports.svg"
WINGS = ("engine.local", "engine.generate", "engine.remote", "engine.cpu.jit", "engine.cpu")
"""Parts of packages that have a box of their own."""
NOTES = {
    "start": "the first moments",
    "render": "all that is printed",
    "diagnostics": "what doctor finds",
    "convert": "the original format",
    "cli": "one file per command",
    "batch": "many pictures",
    "chat": "conversations",
    "server": "the OpenAI API",
    "loader": "options to an engine",
    "engine": "what an engine does",
    "engine.local": "with transformers",
    "engine.generate": "prompts to text",
    "engine.remote": "other servers",
    "engine.cpu": "faster layers",
    "engine.cpu.jit": "compiled kernels",
    "prompts": "templates, tokens",
    "models": "checkpoints",
    "images": "bytes to pictures",
    "sandbox": "no files, no network",
    "hardware": "devices, memory",
    "ground": "settings, files, limits",
}
WIDTH, HEIGHT, GAP, RISE = 132, 44, 18, 34
STYLE = """
  text { font: 13px system-ui, sans-serif; text-anchor: middle; fill: #1f2933 }
  text.note { font-size: 10.5px; fill: #52606d }
  rect { fill: #e8f1fa; stroke: #4a7fb5; rx: 6 }
  path { fill: none; stroke: #7b8794; stroke-width: 1.2; marker-end: url(#tip) }
"""


def graph() -> dict[str, set[str]]:
    """Each box and the boxes that it imports."""
    found: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        here = _box(file.relative_to(PACKAGE).with_suffix("").parts)
        names = {_box(tuple(name.split("."))) for name in _imports(ast.parse(file.read_text("utf-8")))}
        found.setdefault(here, set()).update(names - {here})
    return _merged(found)


def _imports(tree: ast.AST) -> Iterator[str]:
    """The modules of this package that a file imports when it runs, without `llava_cli.`; not those of types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "llava_cli":
            module = (node.module or "").partition(".")[2]
            for name in node.names:
                inner = f"{module}.{name.name}".lstrip(".")
                path = PACKAGE / inner.replace(".", "/")
                if path.is_dir() or path.with_suffix(".py").exists():
                    yield inner
                elif module:
                    yield module
        yield from _imports(node)


def _box(parts: tuple[str, ...]) -> str:
    name = ".".join(parts).removesuffix(".__init__")
    wing = next((wing for wing in WINGS if name == wing or name.startswith(f"{wing}.")), None)
    return wing or name.split(".")[0]


def _merged(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the package's own face, and with the modules that every wing stands on as one box."""

    @cache
    def is_ground(name: str) -> bool:
        return (PACKAGE / f"{name}.py").exists() and all(map(is_ground, found[name] - {"__init__"}))

    found = {name: names - {"__init__"} for name, names in found.items() if name not in ("__init__", "__main__")}
    merged: dict[str, set[str]] = {}
    for name, names in found.items():
        box = "ground" if is_ground(name) else name
        merged.setdefault(box, set()).update("ground" if is_ground(other) else other for other in names)
        merged[box].discard(box)
    return merged


def layers(imports: dict[str, set[str]]) -> dict[str, int]:
    """The row of each box: the first below everything that imports it. Raises `ValueError` for a circle."""
    row: dict[str, int] = {}
    left = set(imports)
    while left:
        ready = {name for name in left if not any(name in imports[other] for other in left)}
        if not ready:
            raise ValueError(f"a circle of imports: {', '.join(sorted(left))}")
        row |= {name: 1 + max((row[other] for other in row if name in imports[other]), default=-1) for name in ready}
        left -= ready
    return row


def reduced(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that do not follow from others."""

    @cache
    def below(name: str) -> frozenset[str]:
        return frozenset(imports[name]).union(*map(below, imports[name]))

    return sorted(
        (name, one)
        for name, names in imports.items()
        for one in names
        if not any(one in below(other) for other in names)
    )


def routes(row: dict[str, int], arrows: list[tuple[str, str]]) -> list[list[str]]:
    """The points that each arrow goes through: its boxes, and a point of its own in each row between them."""
    return [
        [name, *(f"{name} -> {other}, {y}" for y in range(row[name] + 1, row[other])), other] for name, other in arrows
    ]


def places(row: dict[str, int], ways: list[list[str]]) -> dict[str, float]:
    """The middle of each box and point: below those that lead to it, as far as its row has room."""
    rows: list[list[str]] = [[] for _ in range(1 + max(row.values()))]
    for name, y in sorted(row.items()):
        rows[y].append(name)
    for way in ways:
        for y, point in enumerate(way[1:-1], row[way[0]] + 1):
            rows[y].append(point)
    wide = max(sum(_width(point) for point in points) for points in rows)
    place: dict[str, float] = {}
    for points in rows:
        above = {
            point: [place[way[i]] for way in ways for i, after in enumerate(way[1:]) if after == point]
            for point in points
        }
        points.sort(key=lambda point: (sum(above[point]) / len(above[point]) if above[point] else wide / 2, point))
        spare = (wide - sum(map(_width, points))) / (len(points) + 1)
        x = spare
        for point in points:
            place[point] = x + _width(point) / 2
            x += _width(point) + spare
    return place


def _width(point: str) -> int:
    return GAP if " -> " in point else WIDTH + GAP


def draw() -> str:
    """The picture, as SVG."""
    imports = graph()
    row = layers(imports)
    ways = routes(row, reduced(imports))
    place = places(row, ways)
    wide, tall = max(place.values()) + WIDTH / 2 + GAP, (1 + max(row.values())) * (HEIGHT + RISE) + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {tall}" role="img">',
        "<title>Which part of llava imports which: arrows point down, from a part to what it imports</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<polygon points="0,0 8,4 0,8" fill="#7b8794"/></marker></defs>',
        f'<rect width="{wide:.0f}" height="{tall}" style="fill: #ffffff; stroke: none"/>',
    ]
    for way in ways:
        y = GAP + row[way[0]] * (HEIGHT + RISE)
        path = f"M{place[way[0]]:.0f} {y + HEIGHT}"
        for before, point in pairwise(way):
            top, y = y + HEIGHT, y + HEIGHT + RISE
            middle = (top + y) / 2
            path += f" C{place[before]:.0f} {middle:.0f} {place[point]:.0f} {middle:.0f} {place[point]:.0f} {y}"
            path += f" V{y + HEIGHT}" if point != way[-1] else ""
        lines.append(f'<path d="{path}"/>')
    for name in sorted(row):
        x, y, note = place[name], GAP + row[name] * (HEIGHT + RISE), NOTES.get(name, "")
        lines.append(f'<rect x="{x - WIDTH / 2:.0f}" y="{y}" width="{WIDTH}" height="{HEIGHT}"/>')
        lines.append(f'<text x="{x:.0f}" y="{y + (19 if note else 27)}">{name.replace(".", "/")}</text>')
        if note:
            lines.append(f'<text class="note" x="{x:.0f}" y="{y + 34}">{note}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), "utf-8")
    print(f"written: {PICTURE}", file=sys.stderr)
