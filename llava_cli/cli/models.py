"""`llava models`: lists, shows, downloads and converts models, and sets the default."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_cli import render
from llava_cli.cli import Group, app
from llava_cli.cli.options import JsonOpt
from llava_cli.files import quoted
from llava_cli.models.aliases import ALIASES
from llava_cli.models.registry import default_name, is_folder, on_disk, pulled
from llava_cli.paths import data_folder
from llava_cli.settings import LoadOptions, Settings, set_default_model
from llava_cli.untrusted_text import printable

if TYPE_CHECKING:
    from llava_cli.catalog import Entry
    from llava_cli.speed import Outlook

models = typer.Typer(cls=Group, help="List, pull and choose models.", rich_markup_mode=None)
app.add_typer(models, name="models")

NameArg = Annotated[str, typer.Argument(metavar="NAME|REPO|FOLDER", help="An alias, a Hub repo or a folder.")]


@models.callback(invoke_without_command=True)
def _models(context: typer.Context, json: JsonOpt = False) -> None:
    if context.invoked_subcommand is None:
        list_models(json)


@models.command("list")
def list_models(json: JsonOpt = False) -> None:
    """List the models that have a name: size, whether on disk, and what to expect of them on this machine.

    That is the precision that auto takes here, the memory that it needs, and a guess of how long the first word of an
    answer about a photo takes, and how many tokens follow in a second. The guess is from half a second of measuring,
    which is done once.
    """
    from llava_cli.catalog import Machine, entries, notes

    with render.spinner("looking at this machine", json):
        machine = Machine.here()
        found = list(entries(Settings.resolve().load, machine))
    if json:
        render.show_json([entry.as_object() for entry in found])
    else:
        render.table(_COLUMNS, [_cells(entry) for entry in found], optional=1)
        for line in notes(machine, found) if sys.stdout.isatty() else ():
            render.note(line)


_UNKNOWN = "-"
_COLUMNS = ("", "model", "size", "here", "auto", "memory", "first token", "tokens/s", "")


def _cells(entry: Entry) -> list[str]:
    """A row of the list; "no" stands for a precision where none fits, with the memory that the smallest needs."""
    size = "" if entry.bytes is None else _bytes(entry.bytes)
    row = ["*" if entry.is_default else " ", printable(entry.name), size, "yes" if entry.on_disk else "-"]
    expected = entry.outlook
    return [*row, *(_expected(expected) if expected else [_UNKNOWN] * 4), entry.note]


def _expected(outlook: Outlook) -> list[str]:
    from llava_cli.speed import duration, rate

    seconds, speed = outlook.first_token_seconds, outlook.tokens_per_second
    return [
        outlook.precision or "no",
        _bytes(outlook.memory),
        _UNKNOWN if seconds is None else f"~{duration(seconds)}",
        _UNKNOWN if speed is None else f"~{rate(speed)}",
    ]


def _bytes(size: float) -> str:
    return _gigabytes(size) if size >= 1e9 else f"{size / 1e6:.0f} MB"


@models.command()
def show(name: NameArg, json: JsonOpt = False) -> None:
    """Show what is known of a model: where it comes from, what it takes, what it was trained with.

    llava models show llava-1.5-7b
    """
    from llava_cli.catalog import Machine, folder_size, memory_on, outlook_on, sizes_here, sizes_of_alias
    from llava_cli.models.families import Family, family_named

    family: Family | None
    facts: dict[str, str] = {"model": name}
    if name in ALIASES:
        alias = ALIASES[name]
        family = family_named(alias.family)
        facts |= {
            "repository": alias.repo,
            "weights": f"{alias.parameters} billion",
            "download": _gigabytes(alias.bytes),
            "language model": alias.language_model,
            "note": alias.note,
        }
    else:
        from llava_cli.loader import find_checkpoint, load_prompter

        checkpoint = find_checkpoint(LoadOptions(model=name))
        facts |= {"folder": str(checkpoint.folder), "on disk": _bytes(folder_size(checkpoint.folder))}
        with render.spinner("reading the checkpoint"):
            family = load_prompter(LoadOptions(model=name)).family
    with render.spinner("looking at this machine", json):
        machine = Machine.here()
    is_here = name not in ALIASES or on_disk(name)
    sizes = sizes_here(name, machine, Settings.resolve().load) if is_here else sizes_of_alias(name)
    if sizes:
        facts |= {f"memory in {precision}": _bytes(size) for precision, size in memory_on(machine, sizes).items()}
        auto, _, wait, speed = _expected(outlook_on(machine, sizes))
        facts |= {"auto here": auto, "first token": wait, "tokens/s": speed}
    if family:
        facts |= {
            "family": family.name,
            "context": f"{family.context} tokens" if family.context else "",
            "pictures": f"{family.pictures} in a prompt, {family.image_layout}".removeprefix(" in a prompt, "),
            "trained format": family.template or "the checkpoint's own",
        }
    facts["here"] = "yes" if is_here else f"no; llava models pull {name}"
    facts = {fact: value for fact, value in facts.items() if value not in ("", _UNKNOWN)}
    if json:
        render.show_json(facts)
    else:
        render.table(["", ""], [[fact, printable(value)] for fact, value in facts.items()])


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


@models.command()
def pull(
    name: NameArg,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Download it on each node of a Ray cluster.")
    ] = None,
) -> None:
    """Download a model; resumes where it was cut off.

    llava models pull llava-1.5-7b
    """
    if ray is not None:
        from llava_cli.batch.cluster.pull import pull_on_cluster

        pull_on_cluster(name, ray)
        return
    from llava_cli.models import download
    from llava_cli.models.validate import check_files

    with render.progress(name) as meter:
        folder = download.pull(name, meter, check=check_files)
    render.note(f"{printable(name)} is in {printable(str(folder))}")
    render.note(f'  llava ask -m {quoted(name)} img.jpg "what is this?"')
    if not is_folder(name) and name not in pulled():
        render.note(f"not noted as pulled, for nothing can be kept in {printable(str(data_folder()))}")


@models.command()
def convert(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="One of LLaVA's original code: llava_llama, …")],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="A new folder for the checkpoint.")],
    vision_tower: Annotated[
        str | None, typer.Option("--vision-tower", metavar="FOLDER|REPO", help="Its tower, CLIP or SigLIP. [its own]")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="FOLDER|REPO", help="The language model of a LoRA or of a projector alone."),
    ] = None,
) -> None:
    """Make a checkpoint of a folder in LLaVA's original format (llava_llama, llava_mistral, llava_qwen).

    llava models convert llava-v1.5-7b -o llava-1.5-7b

    llava models convert llava-v1.5-7b-lora --base vicuna-7b-v1.5 -o llava-tuned

    Tower, projector and language model are put together, tensor by tensor; nothing of FOLDER is run.
    """
    from llava_cli.convert.conversion import convert as convert_checkpoint

    with render.progress(folder) as meter:
        options = convert_checkpoint(folder, out, vision_tower, base, meter)
    render.note(f"{printable(folder)} is in {printable(str(out))}")
    render.note(f'  llava ask -m {quoted(out)} {options}{" " * bool(options)}img.jpg "what is this?"')


@models.command()
def default(
    name: Annotated[str | None, typer.Argument(metavar="[NAME|REPO|FOLDER]", show_default=False)] = None,
) -> None:
    """Set the default model, or print it.

    llava models default llava-1.5-7b
    """
    if name is None:
        render.say(default_name(Settings.resolve().load))
        return
    from llava_cli.loader import find_checkpoint

    checkpoint = find_checkpoint(LoadOptions(model=name))
    if is_folder(name):
        from llava_cli.models.validate import check_files

        check_files(checkpoint)  # a folder need not contain a model
        name = str((checkpoint.adapter or checkpoint.folder).resolve())  # the next command may run in another folder
    set_default_model(name)
    render.note(f"{printable(name)} is the default model")


@models.command()
def prune() -> None:
    """Delete the quantized copies that 4-bit and 8-bit models start from; the next start makes its own again.

    llava models prune
    """
    from llava_cli.models.quantized_cache import prune as pruned

    freed = 0
    for name, size in pruned():
        print(f"{printable(name)}  {_bytes(size)}")
        freed += size
    render.note(f"{_bytes(freed)} are free again" if freed else "there are no quantized copies")
