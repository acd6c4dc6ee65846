"""`llava calibrate`: fits a calibration to the rows of a batch that had choices and right answers."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_cli import files, limits, render
from llava_cli.batch import run_settings
from llava_cli.batch.calibration.calibration import (
    DELTA,
    MADE_WITH,
    SMALLEST,
    TEMPERATURES,
    THRESHOLDS,
    Calibration,
    Level,
    percent,
    rows_needed,
)
from llava_cli.batch.calibration.calibration_plot import plot
from llava_cli.batch.report.report import check_output
from llava_cli.batch.report.report_rows import RowsFile
from llava_cli.batch.rows import is_number, is_right
from llava_cli.errors import BadData, LlavaError, OutputError, UsageError, os_reason
from llava_cli.untrusted_text import one_line, printable

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
BINS = 15
"""Of the expected calibration error, as in Guo et al., arXiv 1706.04599."""
_LABEL = """{"image": "a.jpg", "question": "the weather?", "answer": "sunny"} in a questions file says what is right"""
_SUM_ERROR = 0.01
"""By how much the probabilities of a row may miss 1; rounding moves them by much less."""


@dataclass
class Labelled:
    """The rows that can be learned from: `probabilities` as the row has them, the model's own choice first, and the
    number of the right choice in `labels`, -1 where that is none of the `choices`."""

    choices: tuple[str, ...] = ()
    models: set[str] = field(default_factory=set)
    probabilities: list[dict[str, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Why other rows cannot be learned from -> how many."""


def calibrate(source: Path, output: Path | None = None, plot_to: Path | None = None, quiet: bool = False) -> None:
    """Writes the calibration of labelled rows, and prints the error that each threshold leaves.

    It goes beside the rows unless there is an `output`. Raises `InputMissing`, `BadData`, `UsageError`, `OutputTaken`
    or `OutputError`.
    """
    output = output or RowsFile(source).beside(".cal.json")
    check_output(output, source)
    if plot_to:
        check_output(plot_to, source, "--plot")
        if os.path.realpath(plot_to) == os.path.realpath(output):
            raise UsageError("--plot", f"{printable(str(plot_to))} is the calibration", "give another file to --plot")
    labelled = read_labelled(source)
    settings = _settings_beside(source)
    calibration = fit(labelled, _made_with(source, labelled, settings), _in_order(labelled.choices, settings))
    _write(output, calibration.to_json(), "-o")
    if plot_to:
        _write(plot_to, plot(calibration).encode(), "--plot")
    _show(calibration)
    for line in () if quiet else _notes(calibration, labelled, output):
        render.note(line)


def read_labelled(source: Path) -> Labelled:
    """Raises `BadData`: with the line's number for probabilities that are none, and where there is nothing to learn."""
    rows, found = RowsFile(source), Labelled()
    rows.check()
    name = printable(str(source))
    for number, row in rows:
        try:
            _add(found, row)
        except ValueError as error:
            raise BadData(f"{name}, line {number}", str(error)) from None
    if rows.is_torn:
        found.left_out["not whole"] += 1
    if not found.labels:
        why = ", ".join(f"{count:,} {reason}" for reason, count in found.left_out.most_common())
        raise BadData(name, f"no row has probabilities and a right answer ({why or 'it is empty'})", _LABEL)
    return found


def _add(found: Labelled, row: dict[str, Any]) -> None:
    """Takes a row in, or counts why not. Raises `ValueError`."""
    if "threshold" in row:
        raise ValueError("its probabilities are calibrated already")
    if reason := _why_left_out(row):
        found.left_out[reason] += 1
        return
    probabilities, expected = _probabilities(row["probabilities"]), _right_answers(row["expected"])
    found.choices = found.choices or tuple(probabilities)
    if probabilities.keys() != set(found.choices):
        raise ValueError("has other choices than the rows before")
    if len(found.labels) == limits.CALIBRATION_ROWS:
        raise ValueError(f"more than {limits.CALIBRATION_ROWS:,} rows")
    found.models.add(str(row.get("model")))
    found.probabilities.append(probabilities)
    # The likeliest of the right ones, where there are several: with one label a row, the likelihood is convex.
    right = [choice for choice in found.choices if is_right(choice, expected)]
    found.labels.append(found.choices.index(max(right, key=probabilities.__getitem__)) if right else -1)


def _why_left_out(row: dict[str, Any]) -> str:
    if row["status"] == "error":
        return "failed"
    if row.get("probabilities") is None:
        return "without choices"
    return "without a right answer" if row.get("expected") is None else ""


def _probabilities(value: Any) -> dict[str, float]:
    """Probabilities of a row from anywhere. Raises `ValueError` for what is none."""
    if isinstance(value, dict) and 1 < len(value) <= limits.CHOICES and all(is_number(p, 0, 1) for p in value.values()):
        probabilities = {str(choice): float(p) for choice, p in value.items()}
        if abs(sum(probabilities.values()) - 1) <= _SUM_ERROR:
            return probabilities
    raise ValueError("'probabilities' are none")


def _right_answers(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("'expected' is no text")
    return tuple(texts)


def fit(labelled: Labelled, made_with: dict[str, Any], choices: tuple[str, ...] = ()) -> Calibration:
    """The temperature of labelled rows, and what is wrong at each threshold once it is applied."""
    choices = choices or labelled.choices
    labels = np.array(labelled.labels)
    temperature = fit_temperature(matrix(labelled), labels)
    empty = Calibration(made_with, choices, len(labels), temperature, ())
    scores, right = scored(empty, labelled)
    reached = [scores >= threshold for threshold in THRESHOLDS]
    levels = [
        Level(threshold, int(rows.sum()), int((rows & ~right).sum()))
        for threshold, rows in zip(THRESHOLDS, reached, strict=True)
    ]
    return Calibration(made_with, choices, len(labels), temperature, tuple(levels))


def matrix(labelled: Labelled) -> Array:
    """[rows, choices]: log-probabilities, in the order of `labelled.choices`."""
    values = np.array([[row[choice] for choice in labelled.choices] for row in labelled.probabilities])
    logs: Array = np.log(np.maximum(values, SMALLEST))
    return logs


def fit_temperature(logs: Array, labels: Labels) -> float:
    """The temperature T at which the labels are likeliest: the least negative log-likelihood of softmax(logs / T).

    In b = 1/T that is convex, the mean of logsumexp(b logs) - b logs[label], so its slope, the mean of
    E[log p] - log p(label), grows with b: bisection finds where it is 0, or the end of `TEMPERATURES` that it leads to.
    Where every row is right, it falls for ever as T does, which says nothing of how sure to be: then T is 1.
    """
    logs, labels = logs[labels >= 0], labels[labels >= 0]
    if not len(labels) or (logs.argmax(1) == labels).all():
        return 1.0
    own = logs[np.arange(len(labels)), labels].mean()

    def slope(b: float) -> float:
        weights = np.exp(b * (logs - logs.max(1, keepdims=True)))
        weights /= weights.sum(1, keepdims=True)
        return float((weights * logs).sum(1).mean() - own)

    low, high = (math.log(1 / temperature) for temperature in reversed(TEMPERATURES))
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return min(max(round(math.exp(-middle), 6), TEMPERATURES[0]), TEMPERATURES[1])


def scored(calibration: Calibration, labelled: Labelled) -> tuple[Array, NDArray[np.bool_]]:
    """For each row, the calibrated probability of its best choice, and whether that choice is right."""
    scores = np.array([max(calibration.calibrated(row).values()) for row in labelled.probabilities])
    best = [labelled.choices.index(max(row, key=row.__getitem__)) for row in labelled.probabilities]
    return scores, np.array(best) == np.array(labelled.labels)


def calibration_error(scores: Array, right: NDArray[np.bool_]) -> float:
    """The expected calibration error: how far the share of right rows is from their mean score, in bins of equal width,
    weighted by their rows."""
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, scores - right, BINS)
    return float(np.abs(gaps).sum() / len(scores))


def _settings_beside(source: Path) -> dict[str, Any] | None:
    """The settings of the run that made the rows; None where they are not there, or damaged."""
    try:
        return run_settings.read(Path(f"{source}.run") / "settings.json")
    except (OSError, LlavaError):
        return None


def _made_with(source: Path, labelled: Labelled, settings: dict[str, Any] | None) -> dict[str, Any]:
    """What the settings say of the model; without them, its name in the rows. Raises `BadData` for several."""
    if settings is None:
        name, *others = sorted(labelled.models)
        if others:
            names = ", ".join(one_line(name, 40) for name in (name, *others[:4]))
            raise BadData(printable(str(source)), f"rows of several models: {names}")
        return {"model": name}
    # A server has its own precision and template, which nobody knows here.
    known = [name for name in MADE_WITH if "server" not in settings or name in ("model", "server", "system")]
    values = {name: settings.get(name) for name in known}
    return {name: value for name, value in values.items() if value is None or isinstance(value, (str, int))}


def _in_order(choices: tuple[str, ...], settings: dict[str, Any] | None) -> tuple[str, ...]:
    """The choices as they were given, where the settings have them; rows have the likeliest first."""
    given = (settings or {}).get("choices")
    return tuple(given) if isinstance(given, list) and sorted(map(str, given)) == sorted(choices) else choices


def _write(path: Path, data: bytes, option: str) -> None:
    try:
        files.atomic_write(path, [data])
    except OSError as error:
        raise OutputError(printable(str(path)), os_reason(error), f"give another file to {option}") from None


def _show(calibration: Calibration) -> None:
    """The table: what is answered at each threshold, what of that is wrong here, and at most wrong elsewhere."""
    rows = []
    for number, level in enumerate(calibration.levels):
        is_last = number + 1 == len(calibration.levels)
        if not level.answered or (not is_last and level.answered == calibration.levels[number + 1].answered):
            continue  # the next one says the same of a higher threshold
        share, error = level.answered / calibration.rows, level.wrong / level.answered
        rows.append(
            (
                f"{level.threshold:g}",
                f"{level.answered}",
                f"{share:.2%}",
                f"{level.wrong}",
                f"{error:.2%}",
                f"{calibration.at_most(level):.2%}",
            )
        )
    render.table(("threshold", "answered", "of all", "wrong", "error", "at most"), rows)


def _notes(calibration: Calibration, labelled: Labelled, output: Path) -> Iterator[str]:
    """For a person: what was learned from how much, and what to do with it."""
    plain = Calibration({}, calibration.choices, calibration.rows, 1.0, ())
    before, after = (calibration_error(*scored(one, labelled)) for one in (plain, calibration))
    yield (
        f"{_rows(calibration.rows)} · temperature {calibration.temperature:.3g} · expected calibration error on them "
        f"{before:.4f}, calibrated {after:.4f}"
    )
    for reason, count in labelled.left_out.most_common():
        yield f"left out: {_rows(count)} {reason}"
    if outside := labelled.labels.count(-1):
        yield f"{_rows(outside)} counted as wrong: the right answer is none of the choices"
    if "checkpoint" not in calibration.made_with:
        yield "of the model only its name is known: there are no settings beside the rows, or a server answered"
    yield f'"at most" holds for all thresholds at once with {1 - DELTA:.0%} certainty, for questions like these'
    possible = min(map(calibration.at_most, calibration.levels))
    wish = next((wish for wish in (0.01, 0.02, 0.05, 0.1, 0.2) if possible <= wish), None)
    if wish is None:
        yield f"for --max-error 5% {rows_needed(0.05):,} rows are needed, more if some are wrong"
        return
    choices = files.quoted(",".join(calibration.choices))
    use = f"--choices {choices} --calibration {files.quoted(output)} --max-error {percent(wish)}"
    yield f"{printable(str(output))} is written; to use it:\n  llava batch … {use}"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"
