"""`llava batch`: answers questions about many pictures, one row each."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llava_cli import render
from llava_cli.cli import app
from llava_cli.cli.batch_options import (
    USAGE,
    CalibrationOpt,
    DryRunOpt,
    ErrorOpt,
    EscalateOpt,
    ExtendOpt,
    IncludeOpt,
    LargerOpt,
    MergeOpt,
    NullOpt,
    OutputOpt,
    ProgressOpt,
    QuestionsOpt,
    RayOpt,
    RepairOpt,
    RetryOpt,
    RootOpt,
    ShardOpt,
    SightOpt,
    SizeOpt,
    TemplateOpt,
    UrlsOpt,
    VerifyOpt,
    WordsArg,
    WorkersOpt,
    parse_output,
    parse_size,
    parse_workers,
)
from llava_cli.cli.batch_promise import larger_model_of, leave_to, promise_of
from llava_cli.cli.options import (
    ANSWERING,
    FORM,
    PICTURES,
    JsonOpt,
    QuietOpt,
    TruncatedOpt,
    options_given,
    settings_of,
    with_options,
)
from llava_cli.cli.saved_prompt import NamedQuestion, ParamOpt, PromptOpt, named_question
from llava_cli.errors import UsageError
from llava_cli.files import quoted

if TYPE_CHECKING:
    from llava_cli.batch.run import Job
    from llava_cli.batch.sources.source import Source
    from llava_cli.batch.task_questions import TaskQuestions


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
    shard: ShardOpt = None,
    merge: MergeOpt = None,
    ray: RayOpt = None,
    workers: WorkersOpt = "auto",
    json_progress: ProgressOpt = False,
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
    if merge is not None:
        _merge(merge, words, context, quiet)
        return
    from llava_cli.batch.run import Job
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
    to_file = parse_output(output)
    most = parse_workers(workers)
    if ray is None and most is not None:
        raise UsageError("--workers", "is about --ray, which is not given", f"--ray local --workers {workers}")
    if dry_run:
        _refuse_elsewhere(to_file, shard, ray)
    if ray is not None and shard is not None:
        raise UsageError("--shard", "does not go with --ray, which has all ranges answered", "leave one of them out")
    if to_file is None:
        _refuse_without_file(extend or retry_errors or repair, shard, ray)
    sources, question = split_question(words or [""])
    all_questions = (*([question] if question is not None else []), *(questions or []))
    named = named_question(context, prompt, parameters, next(iter(all_questions), None))
    all_questions = (named.saved.text,) if named else all_questions
    if max_error is not None and context.params["otherwise"] is not None:
        leave_to(context, max_error)
    settings = settings_of(context)
    promise = promise_of(settings, calibration, max_error)
    if settings.remote.server and batch_size != "auto":
        raise UsageError("--batch-size", f"{settings.remote.server} decides that", "--concurrency N requests at a time")
    size = parse_size(batch_size)
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
    check_source(source, allow_urls, to_file if isinstance(to_file, Path) else None)
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
        escalate=larger_model_of(settings, max_error, escalate, escalate_model),
        sight=sight_sample,
        allow_truncated=allow_truncated,
        allow_urls=allow_urls,
        json_progress=json_progress,
        quiet=quiet,
    )
    if code := _run(job, dry_run, json, shard, ray, most):
        raise typer.Exit(code)


def _run(job: Job, dry_run: bool, json: bool, shard: str | None, ray: str | None, workers: int | None) -> int:
    """Does what is asked for, here or elsewhere; returns the exit code."""
    if dry_run:
        from llava_cli.batch.dry_run import dry_run as dry

        return dry.dry_run(job, json)
    if ray is not None:
        from llava_cli.batch.cluster.driver import run_on_cluster

        return run_on_cluster(job, ray, workers)
    if shard is not None or isinstance(job.output, str):
        from llava_cli.batch.ranges.row_range import ALL, parse_shard
        from llava_cli.batch.ranges.shard import run_shard

        return run_shard(job, ALL if shard is None else parse_shard(shard))
    from llava_cli.batch.run import run

    return run(job)


def _merge(output: str, words: list[str] | None, context: typer.Context, quiet: bool) -> None:
    hint = f"llava batch --merge {quoted(output)}"
    if words:
        raise UsageError("--merge", f"needs no SOURCE: {words[0]!r}", hint)
    if others := [option for option in options_given(context) if option not in ("--merge", "--quiet")]:
        raise UsageError(others[0], "does not go with --merge, which asks nothing", hint)
    from llava_cli.batch.ranges.merge import merge

    if code := merge(parse_output(output) or Path("-"), quiet):
        raise typer.Exit(code)


def _refuse_elsewhere(output: Path | str | None, shard: str | None, ray: str | None) -> None:
    """Raises `UsageError` for what --dry-run does not look at."""
    for option, value in (("--shard", shard), ("--ray", ray)):
        if value is not None:
            raise UsageError("--dry-run", "is about all rows, on this machine alone", f"leave {option} {value} out")
    if isinstance(output, str):
        from llava_cli.images.remote_names import shown

        raise UsageError("--dry-run", f"does not look at {shown(output)}", "leave -o out: then it is about all rows")


def _refuse_without_file(is_resumed: bool, shard: str | None, ray: str | None) -> None:
    """Raises `UsageError` for what needs a file of rows where there is none."""
    if is_resumed:
        raise UsageError("--extend, --retry-errors, --repair", "are about a file of rows", USAGE)
    for option, value in (("--shard", shard), ("--ray", ray)):
        if value is not None:
            raise UsageError(option, "needs a file for the rows, which -o names", f"{USAGE} {option} {quoted(value)}")


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
