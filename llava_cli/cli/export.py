"""`llava export`: gives the rows of a batch to other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llava_cli.cli import app
from llava_cli.cli.options import QuietOpt

RowsArg = Annotated[Path, typer.Argument(metavar="ROWS", help="A .jsonl that llava batch wrote, or is writing.")]
ToOpt = Annotated[
    Literal["parquet", "csv", "txt", "xmp", "webdataset"],
    typer.Option("--to", help="The form: a table, texts beside the pictures, or shards with the pictures."),
]
OutputOpt = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="Write a table (- for stdout) or shards here. [beside ROWS]"),
]
QuestionOpt = Annotated[
    str | None, typer.Option("--question", metavar="TEXT", help="Only the answers to this question.")
]
EmbedOpt = Annotated[bool, typer.Option("--embed", help="With --to xmp: write into the pictures, not beside them.")]
RootOpt = Annotated[
    str | None,
    typer.Option("--root", metavar="FOLDER", help="Use the pictures that are below this folder, and no others."),
]
ForceOpt = Annotated[bool, typer.Option("--force", help="Replace files and descriptions that say something else.")]


@app.command()
def export(
    rows: RowsArg,
    to: ToOpt,
    output: OutputOpt = None,
    question: QuestionOpt = None,
    embed: EmbedOpt = False,
    root: RootOpt = None,
    force: ForceOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Give the rows of a batch to other programs: as a table, as texts beside the pictures, or as shards.

    llava export out.jsonl --to parquet

    llava export out.jsonl --to txt --question "describe the photo"

    llava export out.jsonl --to xmp --embed

    llava export out.jsonl --to webdataset -o shards/train

    What is there already and says the same stays as it is; what says something else is replaced only with --force.
    Rows without an answer are left out, except in tables. So are pictures that have changed, and those that are
    neither below the rows' own folder nor where you ran the batch; --root names another folder.
    """
    from llava_cli.batch.export.export import export as export_rows
    from llava_cli.batch.export.export_job import Job
    from llava_cli.batch.report.report_rows import RowsFile

    raise typer.Exit(export_rows(Job(RowsFile(rows), to, output, question, root, embed, force, quiet)))
