"""`llava calibrate`: learns from labelled rows how far to trust the probabilities of choices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_cli.cli import app
from llava_cli.cli.options import QuietOpt

RowsArg = Annotated[
    Path, typer.Argument(metavar="LABELLED", help="A .jsonl that llava batch wrote: with choices, and right answers.")
]
CalibrationOpt = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="Write the calibration here. [LABELLED with .cal.json]"),
]
PlotOpt = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw coverage against error there, too.")
]


@app.command()
def calibrate(rows: RowsArg, output: CalibrationOpt = None, plot: PlotOpt = None, quiet: QuietOpt = False) -> None:
    """Learn from labelled rows how far to trust the probabilities of choices, for --calibration of llava batch.

    llava batch labelled.csv "the weather?" --choices sunny,cloudy,rain -o labelled.jsonl

    llava calibrate labelled.jsonl -o weather.cal.json --plot weather.svg

    llava batch photos/ "the weather?" --choices sunny,cloudy,rain --calibration weather.cal.json --max-error 2%

    Labelled is a row whose questions file has its right answer in the column `answer`. The table says for each
    threshold how many rows have a best choice as probable as that, once calibrated, how many of these are wrong, and
    how many at most in the long run. A thousand rows or more are worth labelling for an error of 1 %.
    """
    from llava_cli.batch.calibration.calibrate import calibrate as write_calibration

    write_calibration(rows, output, plot, quiet)
