"""The options that only `llava batch` has, and what their values mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_cli.errors import UsageError

WordsArg = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SOURCE]... [QUESTION]",
        help="Pictures, folders, archives (zip, tar), tables (Parquet, Arrow), files of paths or of questions (.jsonl,"
        " .json, .csv), and - for stdin.",
        show_default=False,
    ),
]
QuestionsOpt = Annotated[
    list[str] | None, typer.Option("--question", metavar="TEXT", help="One more question about each picture.")
]
OutputOpt = Annotated[
    str | None,
    typer.Option("-o", "--output", metavar="FILE", help="Write rows here; the same command resumes after a stop."),
]
IncludeOpt = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="GLOB", help="Names to take from a folder or an archive; repeatable."),
]
NullOpt = Annotated[bool, typer.Option("-0", "--null", help="Paths end in NUL, as from `find -print0`.")]
RootOpt = Annotated[
    str | None,
    typer.Option(
        "--root",
        metavar="FOLDER",
        help="Where relative paths of a list or questions file begin; the latter's pictures are all below it.",
    ),
]
UrlsOpt = Annotated[bool, typer.Option("--allow-urls", help="Fetch URLs in a list, from public addresses only.")]
SizeOpt = Annotated[
    str, typer.Option("--batch-size", metavar="auto|N", help="Answers at a time; auto: what the memory allows.")
]
ExtendOpt = Annotated[bool, typer.Option("--extend", help="Take in pictures that were added to SOURCE since.")]
RetryOpt = Annotated[bool, typer.Option("--retry-errors", help="Ask again where a row has an error.")]
RepairOpt = Annotated[bool, typer.Option("--repair", help="Ask again where a row is damaged; keeps what was there.")]
VerifyOpt = Annotated[int, typer.Option("--verify", metavar="N", min=0, help="Ask N rows again alone, and compare.")]
CalibrationOpt = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE", help="With --choices: what `llava calibrate` has learned of them."),
]
ErrorOpt = Annotated[
    str | None,
    typer.Option(
        "--max-error", metavar="2%|0.02", help="With --calibration: answer so that no more are wrong, else `unsure`."
    ),
]
EscalateOpt = Annotated[
    str | None,
    typer.Option("--escalate", metavar="URL", help="Ask the larger model of this server about what stays unsure."),
]
LargerOpt = Annotated[
    str | None, typer.Option("--escalate-model", metavar="NAME", help="Which of the models of that server.")
]
SightOpt = Annotated[
    int,
    typer.Option("--sight", metavar="N", min=0, help="Of N rows, tell how far the answer depends on the picture."),
]
TemplateOpt = Annotated[
    bool,
    typer.Option("--template-question", help="Fill in the fields of questions, such as {name}, {date}, {row.city}."),
]
DryRunOpt = Annotated[
    bool,
    typer.Option("--dry-run", help="Write nothing: tell what would be done, and the time and memory that it takes."),
]
ShardOpt = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Only part I of N of the rows, beside -o; the last one joins them."),
]
MergeOpt = Annotated[
    str | None,
    typer.Option("--merge", metavar="FILE", help="Join the rows that shards have left beside this output."),
]
RayOpt = Annotated[
    str | None,
    typer.Option("--ray", metavar="local|ADDRESS", help="Answer on a Ray cluster: on this machine, or at ADDRESS."),
]
WorkersOpt = Annotated[
    str, typer.Option("--workers", metavar="auto|N", help="With --ray: workers, each with the model; auto: all fit.")
]
ProgressOpt = Annotated[
    bool,
    typer.Option(
        "--json-progress", help="Tell the progress on stderr as a line of JSON each second, in place of a bar."
    ),
]
USAGE = 'llava batch photos/ "describe the photo" -o out.jsonl'


def parse_size(text: str) -> int | None:
    """The value of --batch-size; None for "auto". Raises `UsageError`."""
    return _auto_or_count("--batch-size", text, USAGE)


def parse_workers(text: str) -> int | None:
    """The value of --workers; None for "auto". Raises `UsageError`."""
    return _auto_or_count("--workers", text, "--workers 4")


def _auto_or_count(option: str, text: str, hint: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(option, f"{text!r} is neither auto nor a number", hint)
    return int(text)


def parse_output(text: str | None) -> Path | str | None:
    """The value of -o: a path, the URL of an object in a bucket, or None for stdout."""
    from llava_cli.images.remote_names import is_cloud_url

    if text is None or text == "-":
        return None
    return text if is_cloud_url(text) else Path(text)
