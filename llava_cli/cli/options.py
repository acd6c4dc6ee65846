"""Every option that more than one command has, declared once. None means "not given"."""

from __future__ import annotations

from typing import Annotated

import typer

from llava_cli.errors import UsageError
from llava_cli.settings import Device, Fit, Precision, Settings

ModelOpt = Annotated[
    str | None, typer.Option("-m", "--model", metavar="NAME|REPO|FOLDER", help="The model; `llava models` lists them.")
]
AdapterOpt = Annotated[
    str | None,
    typer.Option("--adapter", metavar="FOLDER", help="Merge this PEFT adapter (LoRA, DoRA, …) into the model."),
]
PrecisionOpt = Annotated[
    Precision | None, typer.Option("-p", "--precision", help="Number format of the weights; auto suits the device.")
]
DoubleOpt = Annotated[
    bool | None, typer.Option("--double-quant", help="With 4bit: quantise the scales too; 0.4 bits a weight less.")
]
DeviceOpt = Annotated[Device | None, typer.Option("--device", help="Where the model runs.")]
MaxTokensOpt = Annotated[int | None, typer.Option("--max-tokens", metavar="N", help="End the answer here. [512]")]
TemperatureOpt = Annotated[
    float | None, typer.Option("--temperature", metavar="T", help="0 is greedy and always the same. [0]")
]
TopPOpt = Annotated[float | None, typer.Option("--top-p", metavar="P", help="Sample from this much probability. [1]")]
SeedOpt = Annotated[int | None, typer.Option("--seed", metavar="N", help="Make sampling repeatable.")]
StopOpt = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; repeatable.")]
SystemOpt = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="Instructions before the conversation.")
]
TemplateOpt = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="hub|native|NAME|FILE",
        help="Prompt format: the checkpoint's own, that of its training, a named one or a .jinja file. [hub]",
    ),
]
FitOpt = Annotated[
    Fit | None,
    typer.Option("--fit", help="All of a picture that is not square, or its middle; auto: as in training."),
]
VisualOpt = Annotated[
    int | None,
    typer.Option("--visual-tokens", metavar="N", help="Read only the N most diverse tokens of each picture. [all]"),
]
TruncatedOpt = Annotated[
    bool, typer.Option("--allow-truncated", help="Take what there is of a picture whose end is missing.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
StatsOpt = Annotated[bool, typer.Option("--stats", help="Print times and memory on stderr.")]
QuietOpt = Annotated[bool, typer.Option("-q", "--quiet", help="No hints, warnings or spinner on stderr.")]
ServerOpt = Annotated[
    str | None,
    typer.Option("--server", metavar="URL", help="Ask this OpenAI-compatible API; the key is in LLAVA_API_KEY."),
]
PicturesAndQuestion = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[IMAGE]... QUESTION",
        help="Paths, http(s) URLs or - for stdin, then the question (or the question on stdin).",
        show_default=False,
    ),
]


LOADING = ("adapter", "precision", "double_quant", "device", "template", "fit", "visual_tokens")
"""What is decided where the model is loaded."""


def settings_of(context: typer.Context) -> Settings:
    """What the command line says, over the environment, over the config file."""
    given = {name: context.params[name] for name in Settings.names() if name in context.params}
    settings = Settings.resolve(**given)
    if settings.server and "server" in given and (decided := [name for name in LOADING if given[name] is not None]):
        option = "--" + decided[0].replace("_", "-")
        raise UsageError(option, f"{settings.server} decides that", f"--server '' {option} … loads a model here")
    return settings
