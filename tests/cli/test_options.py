"""Each option is declared once: the command line, `load()`, the environment and the config file have the same ones."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import llava_cli
from llava_cli import load
from llava_cli.cli import app
from llava_cli.loader import engine_identity
from llava_cli.settings import OPTIONS, VARIABLES, LoadOptions, PictureOptions, Sampling, ServerOptions, Settings

PACKAGE = Path(llava_cli.__file__).parent


def flags(command: str) -> set[str]:
    """All flags of a command."""
    group: Any = typer.main.get_command(app)
    return {flag for parameter in group.commands[command].params for flag in parameter.opts}


@pytest.mark.parametrize("command", ["ask", "batch", "chat", "serve"])
def test_a_command_that_loads_a_model_takes_every_load_option(command: str) -> None:
    expected = {flag for key in LoadOptions.names() for flag in (OPTIONS[key].flag, OPTIONS[key].short) if flag}
    assert expected <= flags(command)


@pytest.mark.parametrize("command", ["ask", "batch", "chat"])
def test_a_command_that_answers_takes_every_sampling_option(command: str) -> None:
    assert {OPTIONS[key].flag for key in [*Sampling.names(), "system", "server"]} <= flags(command)


def test_load_takes_every_load_option() -> None:
    assert set(inspect.signature(load).parameters) == set(LoadOptions.names())


def test_every_load_option_is_part_of_what_two_engines_have_in_common() -> None:
    """A name and an adapter are there as the checkpoint that they lead to."""
    options = LoadOptions(model="builtin")
    assert set(LoadOptions.names()) - engine_identity(options).keys() == {"adapter"}


def test_the_environment_turns_off_what_two_engines_have_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = engine_identity(LoadOptions(model="builtin"))
    monkeypatch.setenv("LLAVA_FAST", "0")
    assert engine_identity(LoadOptions(model="builtin")) != fast


def test_an_option_is_in_one_group() -> None:
    groups = [group.names() for group in (LoadOptions, PictureOptions, Sampling, ServerOptions, Settings)]
    assert sorted(key for names in groups for key in names) == sorted(OPTIONS)


def test_no_key_is_on_a_command_line() -> None:
    assert OPTIONS["api_key"].flag == ""
    assert not any("key" in flag for command in ("ask", "batch", "chat", "serve") for flag in flags(command))
    assert "secret" not in repr(Settings(remote=ServerOptions(api_key="secret")))


def test_every_variable_of_the_code_is_an_option_or_listed() -> None:
    code = "".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    found = {name.rstrip("_") for name in re.findall(r"\bLLAVA_[A-Z_]+", code)} - {"LLAVA"}
    known = {option.variable for option in OPTIONS.values()} | VARIABLES.keys()
    assert found <= known
    assert VARIABLES.keys() <= found
