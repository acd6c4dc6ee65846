"""What labelled rows have shown of a model that chooses: how far to trust its probabilities, and from where on.

`--max-error 2%` promises this: of the answers that are not left open, at most 2 % are wrong in the long run. It holds
with 95 % certainty (the labelled rows may be an unlucky draw), if labelled rows and later ones are independent draws
from the same distribution: the same kind of pictures, asked the same.

That error is R(t) = P(wrong | the calibrated probability of the best choice is at least t). Conformal risk control
(Angelopoulos et al., arXiv 2208.02814) bounds a loss that only grows as t falls, such as P(answered and wrong) among
all rows, and bounds its mean over all draws of labelled rows. R(t) need not be monotone, and users have a single draw.
So the threshold is found by Learn then Test (Angelopoulos et al., arXiv 2110.01052), which bounds R(t) itself, with
high probability; the bound on P(answered and wrong) follows, for that is at most R(t):

1. `THRESHOLDS`, t_1 to t_m, are fixed before a row is seen. Of the n_j labelled rows that reach t_j, k_j are wrong.
   Given n_j, k_j is binomial: n_j trials of probability R(t_j).
2. The upper bound of Clopper and Pearson (Biometrika 26, 1934) is exact: u_j is the p at which k_j or fewer wrong rows
   of n_j have the probability delta / m.
3. By Bonferroni's inequality, R(t_j) <= u_j for all j at once with probability 1 - delta. So any t_j whose u_j is at
   most the wished error may be taken, also after looking at all of them; the lowest one answers most.

The temperature is fitted to the same rows, so the thresholds are fixed only on calibrated probabilities: on the model's
own they depend on the data, and with more than two choices it may also move one row past another. No theorem covers
that. It is one number from hundreds of rows, and `benchmarks/calibration.py` measures how often the promise holds.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_cli import limits, regular_files
from llava_cli.batch.rows import is_number
from llava_cli.batch.run_settings import changes
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import BadData, InputMissing, os_reason
from llava_cli.untrusted_text import one_line, printable

DELTA = 0.05
"""The probability that the promise does not hold."""
THRESHOLDS = (
    *(0.0, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925),
    *(0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999),
)
"""Fixed, and the same for all data, or the bound would not hold. At 0 all is answered."""
SMALLEST = 5e-7
"""The probability that a row's 0.000000 may stand for: rows have six digits."""
TEMPERATURES = (0.05, 20.0)
MADE_WITH = ("model", "server", "checkpoint", "precision", "template", "system", "fit", "visual_tokens")
"""The settings of a run that probabilities depend on, and a calibration with them; `server` is None for one here."""
SMALLEST_ERROR = 1e-5
"""What may be asked for: about the least that `limits.CALIBRATION_ROWS` rows can promise."""
_DIGITS = 6


@dataclass(frozen=True)
class Level:
    """A threshold, and how many of the labelled rows reach it and how many of those are wrong."""

    threshold: float
    answered: int
    wrong: int


@dataclass(frozen=True)
class Calibration:
    """A temperature for probabilities, and the error at each threshold."""

    made_with: dict[str, Any]
    """Of the labelled rows' settings those in `MADE_WITH`, as far as they are known."""
    choices: tuple[str, ...]
    rows: int
    temperature: float
    levels: tuple[Level, ...]
    name: str = ""
    """The file's, for errors."""

    def calibrated(self, probabilities: dict[str, float]) -> dict[str, float]:
        """Each choice's p^(1/T), normalized, with the digits of a row; their order stays."""
        return sharpened(probabilities, self.temperature)

    def at_most(self, level: Level) -> float:
        """The upper bound of the error at a threshold, which holds together with those at all others."""
        return upper_bound(level.wrong, level.answered, DELTA / len(self.levels))

    def threshold(self, max_error: float) -> float:
        """The lowest threshold at which the error is at most this. Raises `BadData` where none is known."""
        bounds = [self.at_most(level) for level in self.levels]
        found = [level.threshold for level, bound in zip(self.levels, bounds, strict=True) if bound <= max_error]
        if found:
            return min(found)
        wish, needed = f"--max-error {percent(max_error)}", rows_needed(max_error, len(self.levels))
        if self.rows < needed:
            reason = f"{self.rows:,} labelled rows are too few for {wish}"
            raise BadData(self.name, reason, f"{needed:,} are needed at least, more if some are wrong")
        best = math.ceil(1000 * min(bounds)) / 1000
        hint = f"--max-error {percent(best)}" if best < 1 else "another model, or other choices"
        raise BadData(self.name, f"no threshold is known to keep {wish}", f"{hint}; or more labelled rows")

    def check(self, settings: dict[str, Any]) -> None:
        """Raises `BadData` unless a run with these settings has the model and the choices of the labelled rows."""
        hint = "llava calibrate makes one of this run's own rows"
        if set(settings.get("choices", ())) != set(self.choices):
            raise BadData(self.name, f"made with the choices {_listed(self.choices)}", hint)
        if difference := changes(self.made_with, {name: settings.get(name) for name in self.made_with}):
            raise BadData(self.name, f"made with another model or other settings: {difference}", hint)

    def to_json(self) -> bytes:
        values = {name: value for name, value in asdict(self).items() if name != "name"}
        return json.dumps(values, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """A file that `to_json` has made. Raises `InputMissing`, or `BadData` if it is anything else."""
        name, hint = printable(str(path)), "llava calibrate labelled.jsonl -o FILE makes one"
        bounds = Bounds(limits.SETTINGS_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS)
        try:
            values = loads(regular_files.read(path, bounds.bytes), bounds)
            levels = tuple(Level(**level) for level in values.pop("levels"))
            found = cls(**{**values, "choices": tuple(values["choices"]), "levels": levels, "name": name})
            if found._is_sound():
                return found
        except OSError as error:
            raise InputMissing(name, os_reason(error), hint) from None
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise BadData(name, "not a calibration", hint)

    def _is_sound(self) -> bool:
        """Whether a file's values have the types and ranges that they need."""
        return (
            isinstance(self.made_with, dict)
            and self.made_with.keys() <= set(MADE_WITH)
            and len(self.choices) > 1
            and all(isinstance(choice, str) for choice in self.choices)
            and type(self.rows) is int
            and is_number(self.temperature, *TEMPERATURES)
            and 0 < len(self.levels) <= limits.CALIBRATION_LEVELS
            and all(is_number(level.threshold, 0, 1) for level in self.levels)
            and all(type(level.answered) is type(level.wrong) is int for level in self.levels)
            and all(0 <= level.wrong <= level.answered <= self.rows for level in self.levels)
            and self.rows <= limits.CALIBRATION_ROWS
        )


def sharpened(probabilities: dict[str, float], temperature: float) -> dict[str, float]:
    """p^(1/T), normalized: temperature scaling (Guo et al., arXiv 1706.04599) of a row's rounded probabilities."""
    logs = {choice: math.log(max(round(p, _DIGITS), SMALLEST)) / temperature for choice, p in probabilities.items()}
    most = max(logs.values())
    total = sum(math.exp(log - most) for log in logs.values())
    return {choice: round(math.exp(log - most) / total, _DIGITS) for choice, log in logs.items()}


def upper_bound(wrong: int, answered: int, delta: float) -> float:
    """Clopper and Pearson's: the p at which P(Binomial(answered, p) <= wrong) is `delta`; 1 without answers.

    Of many terms only the last 20 sqrt(answered) are summed: the mean is `wrong` or more, so all others together are
    less than exp(-800), by Hoeffding's inequality.
    """
    if wrong >= answered:
        return 1.0
    first = max(0, wrong - 20 * math.isqrt(answered) - 20)
    k = np.arange(first, wrong + 1)
    log_first = math.lgamma(answered + 1) - math.lgamma(first + 1) - math.lgamma(answered - first + 1)
    log_choose = log_first + np.concatenate(([0.0], np.cumsum(np.log((answered - k[1:] + 1) / k[1:]))))
    low, high = wrong / answered, 1.0
    for _ in range(50):
        p = (low + high) / 2
        log_terms = log_choose + k * math.log(p) + (answered - k) * math.log1p(-p)
        most = log_terms.max()
        is_likelier = most + math.log(np.exp(log_terms - most).sum()) > math.log(delta)
        low, high = (p, high) if is_likelier else (low, p)
    return high


def rows_needed(max_error: float, levels: int = len(THRESHOLDS)) -> int:
    """How many labelled rows can promise an error if none of them is wrong: (1 - error)^n <= delta / m."""
    return math.ceil(math.log(DELTA / levels) / math.log1p(-max_error))


def percent(part: float) -> str:
    return f"{100 * part:.10g}%"


def parse_error(text: str) -> float | None:
    """`2%` or `0.02` as a part of 1; None if it is neither, or not between `SMALLEST_ERROR` and 1."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if SMALLEST_ERROR <= value < 1 else None


def _listed(choices: tuple[str, ...]) -> str:
    return one_line(",".join(choices), 100)
