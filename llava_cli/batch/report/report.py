"""`llava report`: writes the page of a batch's rows."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from llava_cli import files, render
from llava_cli.batch.report import report_page
from llava_cli.batch.report.report_pictures import PictureFolders
from llava_cli.batch.report.report_rows import RowsFile
from llava_cli.errors import OutputTaken, UsageError, os_reason, output_failure
from llava_cli.untrusted_text import printable


def report(
    source: Path, output: Path | None = None, first: int = 1, quiet: bool = False, root: str | None = None
) -> None:
    """Writes the page of the rows from number `first` on, with the pictures that `PictureFolders` allows.

    It goes beside the rows unless there is an `output`.

    Raises `InputMissing`, `BadData`, `UsageError`, `OutputTaken` or `OutputError`.
    """
    rows = RowsFile(source)
    rows.check()
    output = output or rows.beside(".html")
    check_output(output, source)
    if first > max(rows.total, 1):
        raise UsageError("--from", f"the last row is {rows.total:,}", "llava report --help")
    if rows.is_torn and not quiet:
        render.note(f"{printable(str(source))}: its last line is not whole and left out; the batch will go on there")
    counts, folders = report_page.PageCounts(), PictureFolders.of(source, root)
    try:
        with render.spinner("making thumbnails", quiet), closing(folders):
            files.atomic_write(output, report_page.page(rows, first, folders, counts, output))
    except OSError as error:
        raise output_failure(printable(str(output)), error) from None
    if not quiet:
        without = f", {counts.without_picture:,} without their picture" if counts.without_picture else ""
        lines = [f"{printable(str(output))}: {counts.rows:,} rows{without}", *report_page.notes(rows, first)]
        if folders.outside:
            common = os.path.commonpath(folders.outside)
            lines.append(f"Pictures outside {printable(folders.roots[0])}: --root {files.quoted(common)} shows them.")
        render.note("\n  ".join(lines))


def check_output(output: Path, source: Path, option: str = "-o") -> None:
    """Raises `UsageError` or `OutputTaken` if `output`, given by `option`, is the file of rows or cannot be written."""
    name, hint = printable(str(output)), f"give another file to {option}"
    if os.path.realpath(output) == os.path.realpath(source):
        raise UsageError(option, f"{name} is the file of rows", hint)
    reason = ""
    if output.exists() and not output.is_file():
        reason = "is a directory" if output.is_dir() else "not a regular file"
    elif not output.parent.is_dir():
        reason = "no such folder"
    elif not os.access(output.parent, os.W_OK):
        reason = "permission denied"
    try:
        files.refuse_link(output)
    except files.IsLink as error:
        reason, hint = os_reason(error), f"{option} {files.quoted(error.target)} writes there"
    if reason:
        raise OutputTaken(name, reason, hint)
