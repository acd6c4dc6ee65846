"""`llava export`: the rows of a batch in the form that another program reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llava_cli import render
from llava_cli.batch.export.export_job import Job
from llava_cli.batch.export.export_shards import export_shards
from llava_cli.batch.export.export_sidecars import export_captions, export_descriptions
from llava_cli.batch.export.export_tables import export_csv, export_parquet
from llava_cli.errors import UsageError
from llava_cli.untrusted_text import printable


class Format(NamedTuple):
    export: Callable[[Job], None]
    is_one_text: bool = False
    """Whether a picture has one text in it: the answers to one question."""
    has_output: bool = True


FORMATS = {
    "parquet": Format(export_parquet),
    "csv": Format(export_csv),
    "txt": Format(export_captions, is_one_text=True, has_output=False),
    "xmp": Format(export_descriptions, is_one_text=True, has_output=False),
    "webdataset": Format(export_shards),
}


def export(job: Job) -> int:
    """Writes what is asked for, says what was written, and returns the exit code.

    Raises `InputMissing`, `BadData`, `UsageError`, `OutputTaken` or `OutputError`.
    """
    kind = FORMATS[job.to]
    if job.output and not kind.has_output:
        raise UsageError("-o", f"{job.to} goes beside the pictures", "leave -o out")
    if job.embed and job.to != "xmp":
        raise UsageError("--embed", f"puts XMP into pictures, not {job.to}", "--to xmp --embed")
    job.rows.check()
    if job.rows.is_torn and not job.quiet:
        render.note(f"{printable(str(job.rows.path))}: its last line is not whole and left out")
    job.check_question(kind.is_one_text)
    kind.export(job)
    for line in () if job.quiet else job.outcome.lines():
        render.note(f"  {line}")
    return job.outcome.exit_code
