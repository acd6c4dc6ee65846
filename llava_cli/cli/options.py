"""The options of the command line: those of `settings.OPTIONS`, and the few others that several commands have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from llava_cli.errors import UsageError
from llava_cli.settings import OPTIONS, PLAIN_OPTIONS, LoadOptions, PictureOptions, Sampling, Settings

LOADING = LoadOptions.names()
FORM = [name for name in Sampling.names() if name not in PLAIN_OPTIONS]
"""The settings of what an answer is, and of what is told about it."""
PICTURES = PictureOptions.names()
"""The settings of which pictures a file gives."""
ANSWERING = [*LOADING, *PLAIN_OPTIONS, "system", "server"]
"""The settings of a command that loads a model and has it answer."""

TruncatedOpt = Annotated[
    bool, typer.Option("--allow-truncated", help="Take what there is of a picture whose end is missing.")
]
ClipboardOpt = Annotated[bool, typer.Option("--clipboard", help="Take the picture that is on the clipboard.")]
ScreenOpt = Annotated[bool, typer.Option("--screen", help="Take a picture of the screen.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
StatsOpt = Annotated[bool, typer.Option("--stats", help="Print times and memory on stderr.")]
QuietOpt = Annotated[bool, typer.Option("-q", "--quiet", help="No hints, warnings or spinner on stderr.")]
PicturesAndQuestion = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[IMAGE]... QUESTION",
        help="Paths, http(s) URLs or - for stdin, then the question (or the question on stdin).",
        show_default=False,
    ),
]


def with_options(*keys: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options with these keys, after its parameter `context`, by which `settings_of` finds them."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters = []
        for parameter in signature.parameters.values():
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            if parameter.name == "context":
                parameters += map(_parameter, keys)

        @wraps(command)
        def run(**values: Any) -> None:
            command(**{name: values[name] for name in signature.parameters})

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(key: str) -> inspect.Parameter:
    option = OPTIONS[key]
    default = f" [{option.default:g}]" if option.bounds and option.default is not None else ""
    flags = [flag for flag in (option.short, option.flag) if flag]
    declared = typer.Option(*flags, metavar=option.metavar, help=option.help + default)
    text = str if option.parse else option.type  # Typer would take a time such as 5s for a number
    kind: Any = list[str] if option.type == tuple[str, ...] else text
    annotation = Annotated[kind | None, declared]
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def options_given(context: typer.Context) -> list[str]:
    """The options that the command line has, by their long names."""
    sources = ((param, context.get_parameter_source(param.name or "")) for param in context.command.params)
    return [param.opts[-1] for param, source in sources if source and source.name == "COMMANDLINE"]


def is_given(context: typer.Context, key: str) -> bool:
    """Whether the command line has the option of a setting."""
    return context.params.get(key) not in (None, [], ())


def settings_of(context: typer.Context) -> Settings:
    """The options of the command line, merged with the environment and the config file. None means "not given"."""
    given = {key: context.params[key] for key in OPTIONS if key in context.params}
    settings = Settings.resolve(**given)
    if (server := settings.remote.server) and "server" in given:
        for key in LOADING:
            if key != "model" and given[key] is not None:
                flag = OPTIONS[key].flag
                raise UsageError(flag, f"{server} decides that", f"--server '' {flag} … loads a model here")
    if settings.sampling.grammar_option and not settings.remote.server:
        from llava_cli.engine.generate.constraint import check

        check(settings.sampling)
    return settings
