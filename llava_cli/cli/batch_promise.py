"""What is promised of a batch's answers: `--calibration`, `--max-error`, and the larger model of `--escalate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llava_cli.cli.batch_options import USAGE
from llava_cli.errors import UsageError
from llava_cli.files import quoted
from llava_cli.settings import LoadOptions, Settings

if TYPE_CHECKING:
    from llava_cli.batch.judged_engine import Promise


def leave_to(context: typer.Context, max_error: str) -> None:
    """`--or` without --at-least: the calibration says where its word is the answer. Raises `UsageError` for both."""
    if context.params["at_least"] is not None:
        raise UsageError("--at-least", f"--max-error {max_error} decides that", "give one of them")
    context.params["at_least"] = 0.0


def promise_of(settings: Settings, calibration: Path | None, max_error: str | None) -> Promise | None:
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


def larger_model_of(settings: Settings, max_error: str | None, url: str | None, model: str | None) -> Settings | None:
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
