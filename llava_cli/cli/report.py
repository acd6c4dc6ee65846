"""`llava report`: makes an HTML page of a batch's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_cli.cli import app
from llava_cli.cli.options import QuietOpt

RowsArg = Annotated[Path, typer.Argument(metavar="ROWS", help="A .jsonl that llava batch wrote, or is writing.")]
PageOpt = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the page here. [ROWS with .html]")
]
RootOpt = Annotated[
    str | None,
    typer.Option("--root", metavar="FOLDER", help="Show the pictures that are below this folder, and no others."),
]
FromOpt = Annotated[int, typer.Option("--from", metavar="N", min=1, help="Begin with row N.")]


@app.command()
def report(
    rows: RowsArg, output: PageOpt = None, root: RootOpt = None, first: FromOpt = 1, quiet: QuietOpt = False
) -> None:
    """Make one HTML page of a batch's rows: thumbnails, questions and answers, with search and filters.

    llava report out.jsonl

    llava report out.jsonl --root /data/photos

    llava report out.jsonl --from 5001 -o more.html

    The page needs no network and no other file. It holds 100,000 rows, the first 5,000 of them with thumbnails;
    --from makes a page of the rows that come after. Pictures that are gone or have changed are marked. Rows may be
    a stranger's, so only those pictures are opened that are below the rows' own folder, or where you ran the batch;
    --root names another folder.
    """
    from llava_cli.batch.report.report import report as write_report

    write_report(rows, output, first, quiet, root)
