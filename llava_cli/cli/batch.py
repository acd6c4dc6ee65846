"""`llava batch`: many pictures, one row each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llava_cli.cli import app
from llava_cli.cli.options import (
    DeviceOpt,
    DoubleOpt,
    FitOpt,
    MaxTokensOpt,
    ModelOpt,
    PrecisionOpt,
    QuietOpt,
    SeedOpt,
    ServerOpt,
    StopOpt,
    SystemOpt,
    TemperatureOpt,
    TemplateOpt,
    TopPOpt,
    TruncatedOpt,
    VisualOpt,
    settings_of,
)
from llava_cli.errors import UsageError

SourceArg = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A folder, a file of paths, a questions .jsonl, or - for stdin."),
]
QuestionArg = Annotated[str | None, typer.Argument(metavar="[QUESTION]", show_default=False)]
QuestionsOpt = Annotated[
    list[str] | None, typer.Option("--question", metavar="TEXT", help="One more question about each picture.")
]
OutputOpt = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="Write rows here; the same command goes on after a stop."),
]
IncludeOpt = Annotated[
    list[str] | None, typer.Option("--include", metavar="GLOB", help="Names to take from a folder; repeatable.")
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
ConcurrencyOpt = Annotated[
    int | None, typer.Option("--concurrency", metavar="N", help="Requests at a time to the --server. [8]")
]
ExtendOpt = Annotated[bool, typer.Option("--extend", help="Take in pictures that were added to SOURCE since.")]
RetryOpt = Annotated[bool, typer.Option("--retry-errors", help="Ask again where a row has an error.")]
RepairOpt = Annotated[bool, typer.Option("--repair", help="Ask again where a row is damaged; keeps what was there.")]
VerifyOpt = Annotated[int, typer.Option("--verify", metavar="N", min=0, help="Ask N rows again alone, and compare.")]
USAGE = 'llava batch photos/ "describe the photo" -o out.jsonl'


@app.command()
def batch(
    context: typer.Context,
    source: SourceArg,
    question: QuestionArg = None,
    questions: QuestionsOpt = None,
    output: OutputOpt = None,
    include: IncludeOpt = None,
    null: NullOpt = False,
    root: RootOpt = None,
    allow_urls: UrlsOpt = False,
    batch_size: SizeOpt = "auto",
    extend: ExtendOpt = False,
    retry_errors: RetryOpt = False,
    repair: RepairOpt = False,
    verify: VerifyOpt = 0,
    model: ModelOpt = None,
    precision: PrecisionOpt = None,
    double_quant: DoubleOpt = None,
    device: DeviceOpt = None,
    max_tokens: MaxTokensOpt = None,
    temperature: TemperatureOpt = None,
    top_p: TopPOpt = None,
    seed: SeedOpt = None,
    stop: StopOpt = None,
    system: SystemOpt = None,
    template: TemplateOpt = None,
    fit: FitOpt = None,
    visual_tokens: VisualOpt = None,
    server: ServerOpt = None,
    concurrency: ConcurrencyOpt = None,
    allow_truncated: TruncatedOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Answer questions about many pictures: a row of JSON each, on stdout or in a file that survives anything.

    llava batch photos/ "describe the photo" -o out.jsonl

    find . -name '*.jpg' | llava batch - "what is this?" | jq -r .answer

    llava batch questions.jsonl -o answers.jsonl
    """
    from llava_cli.batch.run import Job, run
    from llava_cli.batch.tasks import Source
    from llava_cli.files import quoted
    from llava_cli.memory import prepare_for_many

    prepare_for_many(kernels=32)
    if output is None and (extend or retry_errors or repair):
        raise UsageError("--extend, --retry-errors, --repair", "are about a file of rows", USAGE)
    asked = (*([question] if question is not None else []), *(questions or []))
    given = Source(source, asked, tuple(include or ()), null, root)
    given.check()
    settings = settings_of(context)
    if settings.server and batch_size != "auto":
        raise UsageError("--batch-size", f"{settings.server} decides that", "--concurrency N requests at a time")
    command = " ".join(["llava", *map(quoted, sys.argv[1:])])
    job = Job(
        source=given,
        settings=settings,
        command=f"… | {command}" if source == "-" else command,
        output=output,
        size=_size(batch_size),
        extend=extend,
        retry=retry_errors,
        repair=repair,
        verify=verify,
        allow_truncated=allow_truncated,
        allow_urls=allow_urls,
        quiet=quiet,
    )
    if code := run(job):
        raise typer.Exit(code)


def _size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError("--batch-size", f"{text!r} is neither auto nor a number", USAGE)
    return int(text)
