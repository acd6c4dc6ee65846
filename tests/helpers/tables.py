"""Tests over a table: one test that runs its body once for each row, and reports every row that fails."""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

Test = Callable[..., None]


def for_each(
    names: str | tuple[str, ...],
    rows: Iterable[Any],
    ids: Iterable[str] = (),
    own: tuple[Callable[..., Any], ...] = (),
) -> Callable[[Test], Test]:
    """Like `pytest.mark.parametrize`, but as one test in which each row is a subtest.

    `names` are parameters of the test, in a tuple or separated by commas; with more than one, a row is a tuple, too.
    Each row has its own `tmp_path`, `monkeypatch` and fixtures that are in `own`, those that others need first. The
    rows share all other fixtures.
    """
    columns = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    table = [dict(zip(columns, row if len(columns) > 1 else (row,), strict=True)) for row in rows]
    labels = list(ids) or [", ".join(_label(value) for value in row.values()) for row in table]
    makers = {fixture.__name__: inspect.unwrap(fixture) for fixture in own}

    def decorate(test: Test) -> Test:
        needed = {name for function in (test, *makers.values()) for name in _parameters(function)}
        shared = sorted(needed - {*columns, *makers, "monkeypatch"})

        @functools.wraps(test)
        def run_table(subtests: pytest.Subtests, **fixtures: Any) -> None:
            for number, (label, row) in enumerate(zip(labels, table, strict=True)):
                with subtests.test(label), ExitStack() as stack:
                    values = {**fixtures, **row, "monkeypatch": stack.enter_context(pytest.MonkeyPatch.context())}
                    if "tmp_path" in fixtures:
                        values["tmp_path"] = fixtures["tmp_path"] / str(number)
                        values["tmp_path"].mkdir()
                    for name, maker in makers.items():
                        values[name] = _made(maker, values, stack)
                    _call(test, values)

        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ["subtests", *shared]]
        run_table.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run_table

    return decorate


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _call(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    return function(**{name: values[name] for name in _parameters(function)})


def _made(maker: Callable[..., Any], values: Mapping[str, Any], stack: ExitStack) -> Any:
    """A fixture's value; what the fixture does behind its `yield` is done when the stack is closed."""
    made = _call(maker, values)
    return stack.enter_context(contextmanager(lambda: made)()) if inspect.isgenerator(made) else made


def _label(value: object) -> str:
    """A value in a few words."""
    return value.name if isinstance(value, Path) else getattr(value, "__name__", None) or reprlib.repr(value)
