"""`llava batch`: answers questions about many pictures, one row each."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_cli import render
from llava_cli.cli import app
from llava_cli.cli.options import ANSWERING, FORM, PICTURES, JsonOpt, QuietOpt, TruncatedOpt, settings_of, with_options
from llava_cli.cli.saved_prompt import NamedQuestion, ParamOpt, PromptOpt, named_question
from llava_cli.errors import UsageError
from llava_cli.files import quoted
from llava_cli.settings import LoadOptions, Settings

if TYPE_CHECKING:
    from llava_cli.batch.judged_engine import Promise
    from llava_cli.batch.sources.source import Source
    from llava_cli.batch.task_questions import TaskQuestions

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
    Path | None,
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
USAGE = 'llava batch photos/ "describe the photo" -o out.jsonl'


@app.command()
@with_options(*ANSWERING, *(name for name in FORM if name != "sight"), *PICTURES, "concurrency")
def batch(
    words: WordsArg = None,
    questions: QuestionsOpt = None,
    template_question: TemplateOpt = False,
    prompt: PromptOpt = None,
    parameters: ParamOpt = None,
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
    calibration: CalibrationOpt = None,
    max_error: ErrorOpt = None,
    escalate: EscalateOpt = None,
    escalate_model: LargerOpt = None,
    sight_sample: SightOpt = 0,
    dry_run: DryRunOpt = False,
    json: JsonOpt = False,
    *,
    context: typer.Context,
    allow_truncated: TruncatedOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Answer questions about many pictures: a row of JSON each, on stdout or in a file that survives anything.

    llava batch photos/ "describe the photo" -o out.jsonl

    llava batch *.jpg "what is this?"

    llava batch photos.zip shard-{000..099}.tar more/ questions.jsonl "what is this?" -o out.jsonl

    find . -name '*.jpg' | llava batch - "what is this?" | jq -r .answer

    llava batch questions.jsonl -o answers.jsonl

    llava batch photos/ "the weather?" --choices sunny,rain --calibration weather.cal.json --max-error 2%

    Each picture, each path of a list and each line of a questions file has its own row, in their order. SOURCE is known
    by its content: questions may have any name, or come on stdin. What is skipped in a folder or an archive is counted
    on stderr.
    """
    from llava_cli.batch.run import Job, run
    from llava_cli.batch.runner import check_form
    from llava_cli.batch.sources.questions import Check
    from llava_cli.batch.sources.source import Source
    from llava_cli.batch.sources.source_arguments import expand, split_question
    from llava_cli.batch.sources.source_check import check_source
    from llava_cli.engine.generate.form_sandbox import FormSandbox
    from llava_cli.hardware.allocator import limit_caches

    limit_caches(primitives=32)
    if json and not dry_run:
        raise UsageError("--json", "is about --dry-run", "rows are JSON as they are")
    to_file = None if output is None or str(output) == "-" else output
    if to_file is None and (extend or retry_errors or repair):
        raise UsageError("--extend, --retry-errors, --repair", "are about a file of rows", USAGE)
    sources, question = split_question(words or [""])
    all_questions = (*([question] if question is not None else []), *(questions or []))
    named = named_question(context, prompt, parameters, next(iter(all_questions), None))
    all_questions = (named.saved.text,) if named else all_questions
    if max_error is not None and context.params["otherwise"] is not None:
        _leave_to(context, max_error)
    settings = settings_of(context)
    promise = _promise(settings, calibration, max_error)
    if settings.remote.server and batch_size != "auto":
        raise UsageError("--batch-size", f"{settings.remote.server} decides that", "--concurrency N requests at a time")
    size = _size(batch_size)
    check: Check = partial(
        check_form, sampling=settings.sampling, sandbox=None if settings.remote.server else FormSandbox()
    )
    templates = _templates(all_questions, named, template_question)
    if templates:
        check = templates.checking(check)
    elif not quiet:
        _note_fields(all_questions)
    source = Source(
        expand(sources),
        all_questions,
        tuple(include or ()),
        null,
        root,
        check,
        templates.columns if templates else (),
        settings.pictures,
        allow_urls,
    )
    check_source(source, allow_urls, to_file)
    job = Job(
        source=source,
        settings=settings,
        command=_command(source),
        output=to_file,
        templates=templates,
        size=size,
        extend=extend,
        retry=retry_errors,
        repair=repair,
        verify=verify,
        promise=promise,
        escalate=_larger_model(settings, max_error, escalate, escalate_model),
        sight=sight_sample,
        allow_truncated=allow_truncated,
        allow_urls=allow_urls,
        quiet=quiet,
    )
    if dry_run:
        from llava_cli.batch.dry_run import dry_run as dry

        code = dry.dry_run(job, json)
    else:
        code = run(job)
    if code:
        raise typer.Exit(code)


def _command(source: Source) -> str:
    """The command line that resumes this run; a pipe is written as `…`."""
    words = ["<(…)" if source.is_substituted(word) else quoted(_without_secrets(word)) for word in sys.argv[1:]]
    command = " ".join(["llava", *words])
    return f"… | {command}" if source.is_stdin else command


def _templates(questions: tuple[str, ...], named: NamedQuestion | None, every: bool) -> TaskQuestions | None:
    """What fills in the questions; None if they are asked as they are. Raises `UsageError` for one that it cannot."""
    if not (named or every):
        return None
    from llava_cli.batch.task_questions import TaskQuestions
    from llava_cli.prompts.question_fields import QuestionFields

    fields = named.fields if named else QuestionFields({})
    templates = TaskQuestions(fields, questions, every, is_saved=named is not None)
    templates.check_command_line()
    return templates


def _note_fields(questions: Iterable[str]) -> None:
    """Notes what looks like a field in a question that is asked as it is."""
    from llava_cli.prompts.question_fields import fields_in

    if found := {f"{{{field}}}": None for question in questions for field in fields_in(question)}:
        render.note(f"the question has {', '.join(found)} as text; --template-question fills fields in")


def _without_secrets(word: str) -> str:
    from llava_cli.images.remote_names import scheme_of, shown

    return shown(word) if scheme_of(word) in ("http", "https") else word


def _size(text: str) -> int | None:
    """The value of --batch-size; None for "auto". Raises `UsageError`."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError("--batch-size", f"{text!r} is neither auto nor a number", USAGE)
    return int(text)


def _leave_to(context: typer.Context, max_error: str) -> None:
    """`--or` without --at-least: the calibration says where its word is the answer. Raises `UsageError` for both."""
    if context.params["at_least"] is not None:
        raise UsageError("--at-least", f"--max-error {max_error} decides that", "give one of them")
    context.params["at_least"] = 0.0


def _promise(settings: Settings, calibration: Path | None, max_error: str | None) -> Promise | None:
    """What --calibration and --max-error ask for. Raises `UsageError`, or as `Calibration.read` and `.threshold`."""
    if calibration is None:
        if max_error is not None:
            raise UsageError("--max-error", "there is no --calibration to tell", "llava calibrate --help")
        return None
    from llava_cli.batch.calibration.calibration import Calibration, parse_error
    from llava_cli.batch.judged_engine import UNSURE, Promise

    found = Calibration.read(calibration)
    if not settings.sampling.choices:
        words = quoted(",".join(found.choices))
        raise UsageError("--calibration", "is about choices, and there are none", f"--choices {words}")
    if settings.sampling.at_least:
        reason = "is about probabilities as the model has them, and --calibration gives others"
        raise UsageError("--at-least", reason, "--max-error 2% in its place says what to leave open")
    if max_error is None:
        return Promise(found)
    if (error := parse_error(max_error)) is None:
        raise UsageError("--max-error", f"{max_error!r} is no part of all from 0.001% on: 2% or 0.02", USAGE)
    if settings.sampling.otherwise is None and UNSURE in settings.sampling.choices:
        raise UsageError("--choices", f"{UNSURE!r} is what --max-error says", "--or WORD has it say another word")
    return Promise(found, found.threshold(error))


def _larger_model(settings: Settings, max_error: str | None, url: str | None, model: str | None) -> Settings | None:
    """The settings of the model that --escalate asks. Raises `UsageError` where nothing could stay unsure."""
    if url is None:
        if model is not None:
            raise UsageError("--escalate-model", "there is no --escalate", "--escalate URL is its server")
        return None
    if not url.strip():
        raise UsageError("--escalate", "the URL is empty", "--escalate http://gpu-box:8000/v1")
    if max_error is None and settings.sampling.at_least is None:
        raise UsageError("--escalate", "nothing can stay unsure", "--calibration FILE --max-error 2% says what does")
    remote = replace(settings.remote, server=url, api_key=settings.remote.escalate_key)
    return replace(settings, load=LoadOptions(model=model), remote=remote)
