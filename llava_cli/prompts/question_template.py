"""The sandboxed job for questions with fields: what a template uses, and what becomes of it with their values.

A template has Jinja's syntax with one brace on each side of an expression: `{name}`, `{exif.Model or 'unknown'}`,
`{% if page %}…{% endif %}`. It may be a stranger's, in a questions file, and may compute for ever, so it is compiled
and rendered in a process with bounded time and memory. What is filled in are values, never templates.

A request is one letter and JSON. A reply is `_DONE` and JSON, `_LACKS` and the name of a field without a value, or
`_REFUSED` and the reason.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

from llava_cli import limits
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import SandboxUnavailable
from llava_cli.sandbox.process import Worker, WorkerDied, WorkerLate
from llava_cli.untrusted_text import one_line

_INSPECT, _RENDER = b"I", b"R"
_DONE, _LACKS, _REFUSED = b"=", b"?", b"!"
_REPLY_BOUNDS = Bounds(12 * limits.TEXT_CHARACTERS, 8, limits.TEXT_CHARACTERS)  # a character takes up to 12 bytes
_KEPT = 256
"""Different templates that are remembered: most runs have one, a questions file may have one for each row."""


class TemplateRefused(Exception):
    """A template is none, or cannot be filled in within the limits: the reason in a few words."""


class FieldMissing(Exception):
    """A field that a template writes has no value: its name, such as `exif.Model`."""


class Used(NamedTuple):
    """What a template uses of what is around it."""

    names: frozenset[str]
    optional: frozenset[str]
    """Those of `names` that may be missing: there is a condition or another value for that."""
    members: Mapping[str, frozenset[str]]
    """What of these names is used, as far as it stands in the template: `exif` -> `Model`."""


class TemplateSandbox:
    """A process that renders templates; threads take turns. It starts with the first template."""

    def __init__(self) -> None:
        self._worker = Worker(__name__, limits.QUESTION_MEMORY)
        self._lock = threading.Lock()
        self.inspect = lru_cache(_KEPT)(self._inspect)
        """What a template uses. Raises `TemplateRefused`, or `SandboxUnavailable`."""

    def _inspect(self, template: str) -> Used:
        found = self._ask(_INSPECT, {"template": template})
        members = {name: frozenset(used) for name, used in found["members"].items()}
        return Used(frozenset(found["names"]), frozenset(found["optional"]), members)

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """The text of a template with these values. Raises as `inspect`, or `FieldMissing`."""
        return str(self._ask(_RENDER, {"template": template, "values": values}))

    def close(self) -> None:
        """Kills the process."""
        self._worker.end()

    def _ask(self, letter: bytes, request: Mapping[str, Any]) -> Any:
        if len(request["template"]) > limits.TEXT_CHARACTERS:
            raise TemplateRefused(f"longer than {limits.TEXT_CHARACTERS:,} characters")
        try:
            with self._lock:
                data = letter, json.dumps(request).encode()
                reply = self._worker.ask(data, 1 + _REPLY_BOUNDS.bytes, limits.QUESTION_SECONDS)
        except WorkerLate as error:
            raise TemplateRefused(f"takes longer than {error} s to fill in") from None
        except WorkerDied as error:
            if problem := str(error):
                hint = "the same command may succeed later"
                raise SandboxUnavailable("the sandbox for questions", problem, hint) from None
            raise TemplateRefused("takes too much memory to fill in") from None
        kind, content = bytes(reply[:1]), bytes(reply[1:])
        if kind == _DONE:
            return loads(content, _REPLY_BOUNDS)
        words = one_line(content[:1000].decode("utf-8", "replace"))
        raise FieldMissing(words) if kind == _LACKS else TemplateRefused(words)


# Below: inside the sandbox.

_SYNTAX = {"variable_start_string": "{", "variable_end_string": "}", "keep_trailing_newline": True}
_NOT_REPEATABLE = ("random", "lipsum")
"""Filters and functions that would ask another question each time."""
_TO_COMPILE = "{% for a, b in {'x': [1, -1.5]} | dictsort if a %}{a ~ b | default('', true) | upper}{% endfor %}"
"""Uses what Jinja imports late."""


def prepare() -> None:
    """Imports everything that may be needed: after this no file can be opened."""
    for name in ("difflib", "encodings.unicode_escape", "html", "jinja2.debug", "jinja2.meta", "pprint", "textwrap"):
        import_module(name)
    _compiled(_TO_COMPILE).render()
    answer(_INSPECT + b'{"template": "{a | uper}"}')


def answer(request: bytes) -> tuple[bytes, ...]:
    """The parts of a reply."""
    from jinja2 import TemplateSyntaxError, UndefinedError

    handle: Callable[..., Any] = _used if request[:1] == _INSPECT else _rendered
    values = json.loads(request[1:])
    try:
        return _DONE, json.dumps(handle(**values)).encode()
    except UndefinedError as error:
        return _LACKS, (error.message or "").encode(errors="replace")
    except TemplateSyntaxError as error:
        return _REFUSED, _syntax_error(values["template"], error).encode(errors="replace")
    except MemoryError:
        return _REFUSED, b"takes too much memory to fill in"
    except RecursionError:
        return _REFUSED, b"too deeply nested"
    except Exception as error:
        return _REFUSED, (str(error) or type(error).__name__).encode(errors="replace")


def _rendered(template: str, values: dict[str, Any]) -> str:
    groups = {name: _Group(name, value) if isinstance(value, dict) else value for name, value in values.items()}
    text: str = _compiled(template).render(groups)
    if len(text) > limits.TEXT_CHARACTERS:
        raise ValueError(f"becomes longer than {limits.TEXT_CHARACTERS:,} characters")
    return text


def _used(template: str) -> dict[str, Any]:
    """What `Used` has. The template is compiled, too, since that finds filters that there are not."""
    from jinja2 import meta, nodes

    _compiled(template)
    environment = _environment()
    tree = environment.parse(template)
    guards: list[Any] = [node.test for node in tree.find_all((nodes.If, nodes.CondExpr))]
    guards += [node.left for node in tree.find_all((nodes.Or, nodes.And))]
    guards += [node.node for node in tree.find_all(nodes.Filter) if node.name in ("default", "d")]
    guards += [node.node for node in tree.find_all(nodes.Test) if node.name in ("defined", "undefined")]
    names = meta.find_undeclared_variables(tree) - environment.globals.keys()
    members: dict[str, list[str]] = {}
    for node in tree.find_all((nodes.Getattr, nodes.Getitem)):
        key = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
        if isinstance(node.node, nodes.Name) and isinstance(key, str):
            members.setdefault(node.node.name, []).append(key)
    optional = {name for guard in guards for name in _names_in(guard)}
    return {"names": sorted(names), "optional": sorted(optional & names), "members": members}


def _names_in(node: Any) -> set[str]:
    from jinja2 import nodes

    own = {node.name} if isinstance(node, nodes.Name) else set()
    return own | {name.name for name in node.find_all(nodes.Name)}


def _syntax_error(template: str, error: Any) -> str:
    """Jinja's words about a template, with the line where it has several, and a name that was probably meant."""
    from difflib import get_close_matches

    words = str(error.message).replace("'end of print statement'", "'}'").rstrip(".")
    if match := re.fullmatch(r"No (filter|test) named '(.*)'", words):
        known = getattr(_environment(), f"{match[1]}s")
        close = get_close_matches(match[2], known, 1)
        words = f"no {match[1]} is called {match[2]!r}" + (f"; did you mean {close[0]}?" if close else "")
    return (f"line {error.lineno}: " if "\n" in template else "") + words[:1].lower() + words[1:]


class _Group(dict[str, Any]):
    """Values that have names of their own, such as those of `exif`."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.name = name


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Where templates are compiled. They see their values, and nothing of Python that could do harm."""
    from jinja2 import ChainableUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Missing(ChainableUndefined):
        """A field without a value: false in a condition, and an error where it is written."""

        @property
        def _undefined_message(self) -> str:
            return self._undefined_hint or str(self._undefined_name)

        def __str__(self) -> str:
            raise self._undefined_exception(self._undefined_message)

    class Environment(ImmutableSandboxedEnvironment):
        def getattr(self, obj: Any, attribute: str) -> Any:
            return self.getitem(obj, attribute) if isinstance(obj, dict) else super().getattr(obj, attribute)

        def getitem(self, obj: Any, argument: Any) -> Any:
            """Of a dictionary only what is in it: a column may be called `items`."""
            if not isinstance(obj, dict):
                return super().getitem(obj, argument)
            if argument in obj:
                return obj[argument]
            name = str(argument)
            return self.undefined(obj=obj, name=f"{obj.name}.{name}" if isinstance(obj, _Group) else name)

    environment = Environment(**_SYNTAX, undefined=Missing, finalize=_written)
    for name in _NOT_REPEATABLE:
        environment.filters.pop(name, None)
        environment.globals.pop(name, None)
    return environment


def _written(value: Any) -> Any:
    """How a value is written: lists, objects and truth values as in JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (bool, list, dict)) else value


@lru_cache(maxsize=_KEPT)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)
