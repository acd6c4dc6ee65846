"""Coverage against error as a small picture (SVG), legible on light and on dark pages."""

from __future__ import annotations

from llava_cli.batch.calibration.calibration import DELTA, Calibration

_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 536, 56, 282
_GRID = 5
"""Lines of the grid in each direction."""
_NICE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Errors that the vertical axis may end at."""
_STYLE = """
svg { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color-scheme: light dark; }
.page { fill: #fff; } text { fill: #1c1d1f; } .soft { fill: #5c6168; } .grid { stroke: #dfe1e5; }
.error { stroke: #1a5fb4; } .dot { fill: #1a5fb4; } .bound { stroke: #b3261e; } .line { fill: none; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
  .page { fill: #1c1d20; } text { fill: #e6e7e9; } .soft { fill: #a3a8b0; } .grid { stroke: #34373c; }
  .error { stroke: #8ab4f8; } .dot { fill: #8ab4f8; } .bound { stroke: #f2a9a3; }
}
"""


def plot(calibration: Calibration) -> str:
    """The error among the answered rows, and its bound, at each threshold: an SVG without anything from outside."""
    levels = [level for level in calibration.levels if level.answered]
    shares = [level.answered / calibration.rows for level in levels]
    errors = [level.wrong / level.answered for level in levels]
    bounds = [calibration.at_most(level) for level in levels]
    highest = next(nice for nice in _NICE if nice >= min(1.0, max(errors[0], 2 * min(bounds), bounds[0])))

    def x(share: float) -> float:
        return _LEFT + share * (_RIGHT - _LEFT)

    def y(error: float) -> float:
        return _BOTTOM - min(error / highest, 1) * (_BOTTOM - _TOP)

    def line(values: list[float], kind: str) -> str:
        points = " ".join(f"{x(share):.1f},{y(value):.1f}" for share, value in zip(shares, values, strict=True))
        return f'<polyline class="line {kind}" points="{points}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        "<title>Coverage against error</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}" rx="8"/>',
    ]
    for step in range(_GRID + 1):
        share, error = step / _GRID, highest * step / _GRID
        parts.append(f'<path class="grid" d="M{_LEFT} {y(error):.1f}H{_RIGHT}"/>')
        parts.append(_text(_LEFT - 8, y(error) + 4, f"{100 * error:.3g} %", "end"))
        parts.append(_text(x(share), _BOTTOM + 20, f"{share:.0%}".replace("%", " %")))
    parts += [
        line(bounds, "bound"),
        line(errors, "error"),
        *(
            f'<circle class="dot" cx="{x(share):.1f}" cy="{y(error):.1f}" r="3.5">'
            f"<title>at {level.threshold:g}: {level.wrong} of {level.answered} wrong</title></circle>"
            for level, share, error in zip(levels, shares, errors, strict=True)
        ),
        _text((_LEFT + _RIGHT) / 2, _HEIGHT - 14, f"answered, of {calibration.rows:,} rows", kind="soft"),
        f'<path class="line error" d="M{_LEFT} 28h24"/>',
        _text(_LEFT + 32, 32, "wrong among them", "start"),
        f'<path class="line bound" d="M{_LEFT + 200} 28h24"/>',
        _text(_LEFT + 232, 32, f"at most, with {1 - DELTA:.0%} certainty".replace("%", " %"), "start"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{words}</text>'
