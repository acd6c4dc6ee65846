"""Whether `llava calibrate` keeps its word: `python benchmarks/calibration.py`. Prints two tables.

The built-in model answers easy-VQA's yes/no questions (7,136) and color questions (1,280) of the test half through
`llava batch`, freely and with choices. It is hardly ever wrong there, so it is also asked about what it is not made
for: drawings of six to nine shapes, `--each` yes/no questions and as many about colors. Of each set, `--splits` random
halves are learned from as `llava calibrate` does; the other half is the batch that follows. Of that are told, for an
error of 1, 2 and 5 %:

- in how many splits the promise held: no more of the answered rows were wrong than that. This is a stricter count than
  what is promised, which is about the long run: half a set may be an unlucky one itself. Where nothing is promised,
  for too few rows or too many errors, nothing is answered either, and the split counts as kept;
- in how many splits something was promised at all, and which part of all rows was then answered;
- the expected calibration error (15 bins) as the model has it, and calibrated: means over the splits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from llava_cli.batch.calibration.calibrate import Labelled, calibration_error, fit, read_labelled, scored
from llava_cli.batch.calibration.calibration import Calibration
from llava_cli.errors import BadData

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "builtin"))
import questions
import samples
import scenes
from batches import easy_vqa

Rows = list[dict[str, Any]]
YES_NO, COLORS = "yes,no", ",".join(scenes.COLORS)
EASY_COLORS = "red,green,blue,yellow,black,gray,brown,teal"
ERRORS = (0.01, 0.02, 0.05)


def easy(choices: str) -> Rows:
    """The questions of easy-VQA's test half whose answer is one of the choices."""
    return [
        {"image": str(picture), "question": question, "answer": answer}
        for picture, turns in easy_vqa("test")
        for _, question, answer in turns
        if answer in choices.split(",")
    ]


def crowded(kinds: Sequence[str], each: int, folder: Path) -> Rows:
    """Questions of some of the generator's kinds, each about a drawing of its own, with seeds new to the model."""
    asked: Rows = []
    for number in count():
        rng = Random(f"calibration/{kinds}/{number}")
        drawn = samples.drawing(rng, 0, least=6, most=9, crowded=0, numbers=0)
        if found := questions.question(drawn.scene, rng.choice(kinds), rng):
            drawn.image.save(path := folder / f"{kinds[0].replace('/', '-')}-{number}.png")
            asked.append({"image": str(path), "question": found[0], "answer": found[1]})
        if len(asked) == each:
            break
    return asked


def run_batch(rows: Rows, output: Path, *options: str) -> Rows:
    """The rows that `llava batch` makes of questions; a run that was interrupted goes on."""
    source = output.with_suffix(".questions.jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "llava_cli", "batch", str(source), "-o", str(output), "-q", "-m", "builtin"]
    subprocess.run([*command, "--root", "/", *options], check=True)
    return [json.loads(line) for line in output.read_text().splitlines()]


def part_of(labelled: Labelled, numbers: np.ndarray) -> Labelled:
    """The rows with these numbers."""
    probabilities = [labelled.probabilities[number] for number in numbers]
    return Labelled(labelled.choices, labelled.models, probabilities, [labelled.labels[number] for number in numbers])


def threshold_of(calibration: Calibration, error: float) -> float | None:
    """None where nothing can be promised."""
    try:
        return calibration.threshold(error)
    except BadData:
        return None


def show(name: str, labelled: Labelled, splits: int, seed: int) -> None:
    """A line of the table."""
    plain = Calibration({}, labelled.choices, 0, 1.0, ())
    random = np.random.default_rng(seed)
    before, after = [], []
    kept, promised = dict.fromkeys(ERRORS, 0), dict.fromkeys(ERRORS, 0)
    answered: dict[float, list[float]] = {error: [] for error in ERRORS}
    for _ in range(splits):
        order = random.permutation(len(labelled.labels))
        half = len(order) // 2
        calibration, others = fit(part_of(labelled, order[:half]), {}), part_of(labelled, order[half:])
        scores, right = scored(calibration, others)
        before.append(calibration_error(*scored(plain, others)))
        after.append(calibration_error(scores, right))
        for error in ERRORS:
            threshold = threshold_of(calibration, error)
            reached = scores >= (2 if threshold is None else threshold)
            wrong = (~right[reached]).mean() if reached.any() else 0.0
            kept[error] += wrong <= error
            promised[error] += threshold is not None
            if threshold is not None:
                answered[error].append(reached.mean())
    cells = [f"{np.mean(before):.4f}", f"{np.mean(after):.4f}"]
    for error in ERRORS:
        share = f", {np.mean(answered[error]):.1%} answered" if answered[error] else ""
        cells.append(f"{kept[error]} kept; {promised[error]} promised{share}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=3000, help="questions of each kind about drawings")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where rows are kept, and found by the next run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        (drawings := folder / "drawings").mkdir(parents=True, exist_ok=True)
        sets = {
            "yes/no, easy-VQA": (easy(YES_NO), YES_NO),
            "colors, easy-VQA": (easy(EASY_COLORS), EASY_COLORS),
            "yes/no, six to nine shapes": (crowded(("yes/no", "relation"), args.each, drawings), YES_NO),
            "colors, six to nine shapes": (crowded(("color of",), args.each, drawings), COLORS),
        }
        print("| questions | rows | right, free | right, choosing |\n|---|---|---|---|", flush=True)
        found = {}
        for number, (name, (rows, choices)) in enumerate(sets.items()):
            free = run_batch(rows, folder / f"{number}-free.jsonl")
            chosen = run_batch(rows, output := folder / f"{number}.jsonl", "--choices", choices)
            found[name] = read_labelled(output)
            shares = (f"{np.mean([bool(row['right']) for row in some]):.2%}" for some in (free, chosen))
            print(f"| {name} | {len(chosen):,} | {' | '.join(shares)} |", flush=True)
        errors = " | ".join(f"at most {error:.0%}" for error in ERRORS)
        print(f"\n| questions | ECE | calibrated | {errors} |\n|{'---|' * (3 + len(ERRORS))}")
        for name, labelled in found.items():
            show(name, labelled, args.splits, args.seed)


if __name__ == "__main__":
    main()
