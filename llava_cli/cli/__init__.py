"""The command line: one module for each command, which translates its arguments and delegates."""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llava_cli._version import __version__
from llava_cli.errors import LlavaError, OutputError, UsageError, os_reason, printable


class Group(TyperGroup):
    """Turns an error of a command into one line, a hint and an exit code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        from llava_cli import render

        render.plain_streams()
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
            sys.stdout.flush()
        except OSError as error:
            code = _output_failed(error)
        except Exception as error:
            if not hasattr(error, "format_message"):  # the mark of Click's errors; Typer has its own copy of Click
                raise
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "llava"
            reason = error.format_message().rstrip(".")
            thing = path.partition(" ")[2] or "command"
            render.show_error(UsageError(thing, reason[:1].lower() + reason[1:], f"{path} --help"))
            code = UsageError.exit_code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LlavaError as error:
            if os.environ.get("LLAVA_DEBUG"):
                raise
            from llava_cli import render

            render.show_error(error)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            raise typer.Exit(_output_failed(error)) from None


def _output_failed(error: OSError) -> int:
    """Reports what could not be written, and returns the exit code."""
    from llava_cli import render

    if os.environ.get("LLAVA_DEBUG"):
        raise error
    has_no_reader = isinstance(error, BrokenPipeError)  # `llava … | head` has read enough
    if not has_no_reader:
        render.show_error(OutputError(printable(str(error.filename or "output")), _reason(error)))
    render.close_stdout()
    return 0 if has_no_reader else OutputError.exit_code


def _reason(error: OSError) -> str:
    return "stdout is closed" if error.errno == errno.EBADF else os_reason(error)


app = typer.Typer(
    cls=Group,
    name="llava",
    help="Answer questions about pictures with LLaVA models on this machine.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(is_asked: bool) -> None:
    if is_asked:
        print(f"llava {__version__}")
        raise typer.Exit


@app.callback()
def _llava(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


COMMANDS = (
    *("ask", "batch", "calibrate", "chat", "chats", "check", "doctor", "export", "models", "prompt", "prompts"),
    "report",
    "serve",
)


def register(command: str = "") -> None:
    """Adds a command to `app` by importing its module; for an unknown one all of them, which takes 16 ms more."""
    for name in [command] if command in COMMANDS else COMMANDS:
        import_module(f"llava_cli.cli.{name}")
