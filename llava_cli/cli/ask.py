"""`llava ask`: one question, one answer."""

from __future__ import annotations

from llava_cli import render
from llava_cli.cli import app
from llava_cli.cli.arguments import conversation_from, say_demo
from llava_cli.cli.options import (
    DeviceOpt,
    FitOpt,
    JsonOpt,
    MaxTokensOpt,
    ModelOpt,
    PicturesAndQuestion,
    PrecisionOpt,
    QuietOpt,
    SeedOpt,
    StatsOpt,
    StopOpt,
    SystemOpt,
    TemperatureOpt,
    TemplateOpt,
    TopPOpt,
    TruncatedOpt,
)
from llava_cli.settings import Settings


@app.command()
def ask(
    args: PicturesAndQuestion = None,
    model: ModelOpt = None,
    precision: PrecisionOpt = None,
    device: DeviceOpt = None,
    max_tokens: MaxTokensOpt = None,
    temperature: TemperatureOpt = None,
    top_p: TopPOpt = None,
    seed: SeedOpt = None,
    stop: StopOpt = None,
    system: SystemOpt = None,
    template: TemplateOpt = None,
    fit: FitOpt = None,
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
    settings = Settings.resolve(
        model=model,
        precision=precision,
        device=device,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
        system=system,
        template=template,
        fit=fit,
    )
    conversation = conversation_from(args, settings, allow_truncated, quiet)
    with render.spinner("loading the model", quiet):
        from llava_cli.loader import load_engine

        engine = load_engine(settings)
    say_demo(settings, engine, quiet)
    if json:
        answer = engine.answer(conversation, settings)
        render.show_json(render.answer_object(answer, conversation, engine))
    else:
        answer = render.show(engine.stream(conversation, settings))
    if stats:
        render.note(render.stats(answer, engine))
