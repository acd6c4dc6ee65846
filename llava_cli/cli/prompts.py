"""`llava prompts`: lists, shows, saves and deletes prompts that have a name."""

from __future__ import annotations

from typing import Annotated

import typer

from llava_cli import render
from llava_cli.cli import Group, app
from llava_cli.cli.arguments import piped_text
from llava_cli.cli.options import JsonOpt, is_given, with_options
from llava_cli.errors import UsageError
from llava_cli.files import quoted
from llava_cli.prompts.saved_prompts import KEPT_OPTIONS, SavedPrompt, all_prompts, check_name, find
from llava_cli.prompts.saved_prompts import delete as delete_prompt
from llava_cli.prompts.saved_prompts import save as save_prompt
from llava_cli.settings import OPTIONS, Sampling
from llava_cli.untrusted_text import one_line

prompts = typer.Typer(cls=Group, help="List, show, save and delete prompts that have a name.", rich_markup_mode=None)
app.add_typer(prompts, name="prompts")

NameArg = Annotated[str, typer.Argument(metavar="NAME", help="The prompt's name.")]
TextArg = Annotated[
    str | None, typer.Argument(metavar="[TEXT]", help="The question; from stdin without it.", show_default=False)
]
DefaultOpt = Annotated[
    list[str] | None,
    typer.Option("-P", "--param", metavar="NAME=VALUE", help="What stands for {NAME} unless -P says it; repeatable."),
]
ForceOpt = Annotated[bool, typer.Option("--force", help="Replace another prompt of that name.")]


@prompts.callback(invoke_without_command=True)
def _prompts(context: typer.Context, json: JsonOpt = False) -> None:
    if context.invoked_subcommand is None:
        list_prompts(json)


@prompts.command("list")
def list_prompts(json: JsonOpt = False) -> None:
    """List the prompts that `ask -t NAME` and `batch -t NAME` know."""
    found = list(all_prompts())
    if json:
        render.show_json([prompt.as_object() for prompt in found])
        return
    rows = [[p.name, one_line(p.text, 80), "built in" if p.is_builtin else ""] for p in found]
    render.table(["name", "text", ""], rows)


@prompts.command()
def show(name: NameArg, json: JsonOpt = False) -> None:
    """Print a prompt as its file has it.

    llava prompts show caption
    """
    prompt = find(name)
    if json:
        render.show_json(prompt.as_object())
    else:
        render.say(prompt.to_toml().rstrip("\n"))


@prompts.command()
@with_options(*KEPT_OPTIONS)
def save(
    name: NameArg,
    text: TextArg = None,
    parameters: DefaultOpt = None,
    force: ForceOpt = False,
    *,
    context: typer.Context,
) -> None:
    """Save a prompt under a name, with the options that belong to it.

    llava prompts save caption "Describe this picture in one sentence of {lang or 'English'}."

    llava prompts save weather "how is the weather?" --choices sunny,cloudy,rain

    llava prompts save terse "what is this?" --system "Answer in at most five words."
    """
    from llava_cli.prompts.question_fields import QuestionFields, parse_parameters

    check_name(name)
    text = piped_text("TEXT") if text is None else text
    if not text.strip():
        raise UsageError("TEXT", "it is empty", 'llava prompts save caption "Describe this picture in one sentence."')
    fields = QuestionFields(parse_parameters(parameters or ()))
    fields.check(text, is_saved=True)
    fields.check_parameters([text])
    needed = "".join(f" -P {key}=…" for key in fields.missing(text))
    fields.close()
    given = [OPTIONS[key] for key in KEPT_OPTIONS if is_given(context, key)]
    options = {option.key: option.convert(option.flag, context.params[option.key]) for option in given}
    Sampling(**{key: value for key, value in options.items() if key in Sampling.names()})  # holds them together
    path = save_prompt(SavedPrompt(name, text, options, fields.parameters), force)
    render.note(f"saved: {quoted(path)}; llava ask img.jpg -t {name}{needed} asks it")


@prompts.command()
def delete(names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The prompts' names.")]) -> None:
    """Delete prompts that you have saved.

    llava prompts delete weather terse
    """
    for name in names:
        delete_prompt(name)
        render.note(f"deleted: {name}")
