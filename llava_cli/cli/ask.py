"""`llava ask`: one question, one answer."""

from __future__ import annotations

import typer

from llava_cli import render
from llava_cli.cli import app
from llava_cli.cli.arguments import conversation_from
from llava_cli.cli.options import (
    AdapterOpt,
    DeviceOpt,
    DoubleOpt,
    FitOpt,
    JsonOpt,
    MaxTokensOpt,
    ModelOpt,
    PicturesAndQuestion,
    PrecisionOpt,
    QuietOpt,
    SeedOpt,
    ServerOpt,
    StatsOpt,
    StopOpt,
    SystemOpt,
    TemperatureOpt,
    TemplateOpt,
    TopPOpt,
    TruncatedOpt,
    VisualOpt,
    settings_of,
)


@app.command()
def ask(
    context: typer.Context,
    args: PicturesAndQuestion = None,
    model: ModelOpt = None,
    adapter: AdapterOpt = None,
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
    allow_truncated: TruncatedOpt = False,
    json: JsonOpt = False,
    stats: StatsOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Answer one question about one or more pictures.

    llava ask img.jpg "what is this?"

    llava ask before.png after.png "what changed?"

    llava ask - "how many people are there?" < img.jpg
    """
    settings = settings_of(context)
    conversation = conversation_from(args, settings, allow_truncated, quiet)
    with render.spinner("loading the model", quiet):
        from llava_cli.loader import open_engine

        engine = open_engine(settings, render.note)
    if not quiet:
        render.say_demo(settings, engine)
        render.say_pictures(engine.family, conversation)
    if json:
        answer = engine.answer(conversation, settings)
        render.show_json(render.answer_object(answer, conversation, engine))
    else:
        answer = render.show(engine.stream(conversation, settings))
    if stats:
        render.note(render.stats(answer, engine))
