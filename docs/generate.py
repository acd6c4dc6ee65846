"""Writes the generated parts of the documentation: `python docs/generate.py`.

A page has a part generated where it says `<!-- generated: NAME -->`; the part ends at `<!-- end -->`. Everything in
it comes from the code: the commands from Typer, options from `settings`, limits from `limits`, the API from docstrings.
`tests/ground/test_docs.py` checks that the pages are up to date.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import typer

import llava_cli
from llava_cli import errors, limits, paths, settings
from llava_cli.catalog import sizes_of_alias
from llava_cli.chat.commands import COMMANDS
from llava_cli.cli import app, register
from llava_cli.hardware import cpu
from llava_cli.hardware.device import Plan
from llava_cli.models.aliases import ALIASES
from llava_cli.models.families import FAMILIES
from llava_cli.models.footprint import footprint
from llava_cli.prompts.question_fields import FIELDS
from llava_cli.prompts.saved_prompts import BUILTIN

DOCS = Path(__file__).parent
PLACES = (
    paths.config_file,
    paths.data_folder,
    paths.prompts_folder,
    paths.quantized_cache,
    paths.digest_cache,
    paths.kernel_cache,
    paths.speed_file,
    paths.hub_cache,
    paths.socket_path,
)
PART = re.compile(r"(<!-- generated: ([\w ]+) -->\n).*?(<!-- end -->)", re.S)


def main() -> None:
    """Brings all pages up to date."""
    for page, text in pages():
        if page.read_text("utf-8") != text:
            page.write_text(text, "utf-8")
            print(f"written: {page.relative_to(DOCS.parent)}", file=sys.stderr)


def pages() -> Iterator[tuple[Path, str]]:
    """Each page that has generated parts, and what it should read."""
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text("utf-8")
        if PART.search(text):
            yield page, PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]]().strip()}\n\n{part[3]}", text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *(list(row) for row in rows)]
    cells = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]
    return "\n".join([cells[0], "|" + "---|" * len(lines[0]), *cells[1:]])


def code(text: object) -> str:
    return f"`{text}`" if text not in ("", None) else ""


def commands() -> str:
    """Every command, with its arguments and options."""
    register()
    return "\n".join(_describe(typer.main.get_command(app), "llava"))


def _describe(command: Any, name: str) -> Iterator[str]:
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    is_example = re.compile(r"^(llava|find|printf|curl) ").match
    examples = [text for text in paragraphs if is_example(text)]
    yield f"## `{name}`\n"
    yield from (f"{' '.join(text.split())}\n" for text in paragraphs if not is_example(text))
    if examples:
        yield "```sh\n" + "\n".join(examples) + "\n```\n"
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    if arguments:
        yield table(("argument", ""), ((code(one.metavar or one.name), one.help or "") for one in arguments)) + "\n"
    if found := [_row_of(one) for one in command.params if one.param_type_name == "option"]:
        yield table(("option", "value", ""), found) + "\n"
    for word in sorted(getattr(command, "commands", {})):
        yield from _describe(command.commands[word], f"{name} {word}")


def _row_of(option: Any) -> tuple[str, str, str]:
    choices = getattr(option.type, "choices", None)
    value = "" if option.is_flag else option.metavar or ("|".join(choices) if choices else option.type.name.upper())
    default = "" if option.is_flag or option.default in (None, ()) or option.multiple else f" [{option.default}]"
    return ", ".join(map(code, option.opts)), code(value), (option.help or "") + default


def options() -> str:
    """Every setting: its flag, its environment variable and its key in the config file."""
    return table(
        ("flag", "environment", "config file", "value", "default", ""),
        (
            (
                ", ".join(map(code, filter(None, (option.short, option.flag)))) or "none",
                code(option.variable),
                code(option.key),
                _values_of(option),
                "" if option.default in (None, ()) else code(str(option.default).lower()),
                option.help,
            )
            for option in settings.OPTIONS.values()
        ),
    )


def _values_of(option: settings.Option) -> str:
    if option.choices:
        return ", ".join(map(code, option.choices))
    words = {bool: "`true` or `false`", int: "a whole number", float: "a number", str: "text"}
    value = words.get(option.type, "text, or a list of texts")
    return f"{value}, {_bound(option.bounds[0])} to {_bound(option.bounds[1])}" if option.bounds else value


def _bound(number: float) -> str:
    if abs(number) < 10**9:
        return f"{number:,}"
    return f"-2^{int(-number).bit_length() - 1}" if number < 0 else f"2^{int(number).bit_length()} - 1"


def variables() -> str:
    """The environment variables that are not options."""
    return table(("variable", ""), ((code(name), words) for name, words in settings.VARIABLES.items()))


def files() -> str:
    """Where the user's files are on Linux, in an environment that names none of them."""
    named = (
        "config_file",
        "data_folder",
        "prompts_folder",
        "quantized_cache",
        "digest_cache",
        "kernel_cache",
        "speed_file",
        "hub_cache",
        "socket_path",
    )
    clean = {"HOME": "/home/USER", "XDG_RUNTIME_DIR": "/run/user/UID", "PATH": os.environ["PATH"]}
    rows = []
    with mock.patch.dict(os.environ, clean, clear=True):
        for name in named:
            function = getattr(paths, name)
            place = str(function()).replace("/home/USER", "~").replace("/run/user/UID", "$XDG_RUNTIME_DIR")
            rows.append((code(place), " ".join(inspect.getdoc(function).split())))
    return table(("on Linux", ""), rows)


def exit_codes() -> str:
    """Each error of the package with its exit code."""
    lines = re.findall(r"([A-Z]\w+) +(\d+) +(.+)", errors.__doc__ or "")
    for name, number, _ in lines:
        assert getattr(errors, name).exit_code == int(number), name
    rows = [(number, code(name), words) for name, number, words in lines if name != "LlavaError"]
    return table(("exit code", "error", "what went wrong"), rows)


def models() -> str:
    """The models that have a short name, and their memory on a CPU with bf16 instructions and our kernels."""

    def memory(name: str, precision: str) -> str:
        with mock.patch.multiple(cpu, cpu_features=lambda: cpu.BF16_FEATURES, may_have_kernels=lambda: True):
            plan = Plan("cpu", precision, attention="", why="")
            return f"{footprint(sizes_of_alias(name), plan).total / 1e9:.1f} GB"

    rows = (
        (
            code(name),
            alias.repo,
            f"{alias.bytes / 1e9:.1f} GB",
            *(memory(name, precision) for precision in ("bf16", "8bit", "4bit")),
            "; ".join(filter(None, (alias.language_model, alias.note))),
        )
        for name, alias in ALIASES.items()
    )
    return table(("name", "repository", "download", "bf16", "8bit", "4bit", "language model"), rows)


def families() -> str:
    """What each family was trained with."""
    rows = (
        (
            family.name,
            code(family.model_type),
            code(family.backbone),
            code(family.template) or "the checkpoint's own",
            f"{family.context:,} tokens" if family.context else "as its config says",
            family.image_layout,
            family.pictures or "not known",
        )
        for family in FAMILIES
    )
    head = (
        "family",
        "`model_type`",
        "decoder",
        "trained format",
        "context, tokens",
        "pictures are",
        "pictures a prompt",
    )
    return table(head, rows)


def templates() -> str:
    """The names that `--template` takes."""
    folder = Path(llava_cli.__file__).parent / "prompts" / "templates"
    return ", ".join(code(file.stem) for file in sorted(folder.glob("*.jinja")))


def fields() -> str:
    """What a question may have in braces."""
    return table(("field", "", "such as"), ((code(f"{{{one}}}"), *words) for one, words in FIELDS.items()))


def builtin_prompts() -> str:
    """The prompts that every user has."""
    return table(("name", "prompt"), ((code(prompt.name), code(prompt.text)) for prompt in BUILTIN.values()))


def bounds() -> str:
    """The table of limits, section by section."""
    source = Path(limits.__file__).read_text("utf-8")
    text: list[str] = []
    rows: list[tuple[str, str, str]] = []
    notes = dict(_fields(ast.parse(source).body))
    for line in source.splitlines():
        if heading := re.match(r"# (.+)\.$", line):
            text += [table(("limit", "", "of what"), rows)] * bool(rows) + [f"## {heading[1]}"]
            rows = []
        elif (name := line.partition(" = ")[0]).isupper() and name in vars(limits):
            rows.append((code(name), _quantity(getattr(limits, name)), notes[name]))
    return "\n\n".join([*text, table(("limit", "", "of what"), rows)])


def _quantity(value: Any) -> str:
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) and value < 10**15 else f"{value:,g}"
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list, set, frozenset)) else str(value)


def modules() -> str:
    """Every file of the package, with the first line of its docstring."""
    package = Path(llava_cli.__file__).parent
    lines: list[str] = []
    for folder in sorted(
        {file.parent for file in package.rglob("*.py")}, key=lambda one: one.relative_to(package).parts
    ):
        rows = []
        for file in sorted(folder.glob("*.py")):
            words = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n\n")[0]
            rows.append((code(file.name), " ".join(words.split())))
        lines += [f"### `{folder.relative_to(package.parent)}/`", table(("file", ""), rows)]
    return "\n\n".join(lines)


def chat_commands() -> str:
    """What `/` does in a chat."""
    rows = ((code(f"/{name} {command.takes}".strip()), command.help) for name, command in COMMANDS.items())
    return table(("command", ""), rows)


def api() -> str:
    """The public names, from their docstrings."""
    return "\n".join(line for name in llava_cli.__all__ for line in _entry(name, getattr(llava_cli, name)))


def _entry(name: str, thing: Any) -> Iterator[str]:
    yield f"## `{name}`\n"
    if not inspect.isclass(thing):
        yield from _function(name, thing)
        return
    if "__dataclass_fields__" in vars(thing):
        yield from _function(name, thing)
        notes = dict(_fields(ast.parse(inspect.getsource(thing)).body[0].body))  # type: ignore[attr-defined]
        declared = thing.__dataclass_fields__
        rows = [(code(one), notes.get(one) or declared[one].metadata.get("help", "")) for one in declared]
        yield table(("field", ""), rows) + "\n"
    else:
        yield f"{inspect.getdoc(thing)}\n"
    for word, member in vars(thing).items():
        member = getattr(member, "__func__", member)
        if word.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        if words := inspect.getdoc(member):
            yield f"### `{name}.{word}`\n"
            if isinstance(member, property):
                yield f"{words}\n"
            else:
                yield from _function(word, member)


def _function(name: str, function: Any) -> Iterator[str]:
    signature = re.sub(r"'([^']*)'", lambda quoted: quoted[1] or "''", str(inspect.signature(function)))
    signature = re.sub(r"<function .*? at 0x\w+>|<factory>", "...", re.sub(r"\((self|cls)(, )?", "(", signature))
    yield f"```python\n{_folded(name + signature.removesuffix(' -> None'))}\n```\n"
    yield f"{inspect.getdoc(function)}\n"


def _folded(call: str) -> str:
    """A call on several lines if it is too long for one."""
    name, _, rest = call.partition("(")
    inner, _, result = rest.rpartition(")")
    parts, depth = [""], 0
    for char in inner:
        depth += (char in "[(") - (char in "])")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return call if len(call) <= 88 else f"{name}(\n" + "".join(f"    {one.strip()},\n" for one in parts) + f"){result}"


def _fields(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """Each name that is assigned, with the string below it."""
    for i, node in enumerate(body):
        assigned = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        note = ""
        if i + 1 < len(body) and isinstance(below := body[i + 1], ast.Expr) and isinstance(below.value, ast.Constant):
            note = " ".join(str(below.value.value).split())
        yield from ((target.id, note) for target in assigned if isinstance(target, ast.Name))


PARTS: dict[str, Callable[[], str]] = {
    "api": api,
    "builtin prompts": builtin_prompts,
    "chat commands": chat_commands,
    "commands": commands,
    "exit codes": exit_codes,
    "families": families,
    "fields": fields,
    "files": files,
    "limits": bounds,
    "models": models,
    "modules": modules,
    "options": options,
    "templates": templates,
    "variables": variables,
}

if __name__ == "__main__":
    main()
