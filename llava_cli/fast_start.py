"""Leaves out of a process what transformers imports and a run of ours never needs: a third of a start.

For the command line alone, whose process is its own; who imports `llava_cli` has transformers whole.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

UNUSED = ("scipy", "sklearn")
"""transformers imports them where they are installed: for losses of training, for a way of decoding."""


def start() -> None:
    """From here on transformers is imported without them, unless `LLAVA_FAST=0`. Imports nothing itself."""
    if os.environ.get("LLAVA_FAST") != "0":
        sys.meta_path.insert(0, _BeforeTransformers())


class _BeforeTransformers(MetaPathFinder):
    """Finds nothing: it sees that transformers is about to be imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "transformers":
            sys.meta_path.remove(self)
            _leave_out()


def _leave_out() -> None:
    import torch

    for name in UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # what import takes for "not installed"
    # As in a torch that is built without it: one process has no tensors that are spread over several.
    torch.distributed.is_available = lambda: False
    # Nothing is compiled here, but torch's compiler is imported to mark what it should leave alone, or to wrap what
    # bitsandbytes might compile; and with it, sympy.
    torch.compile = _as_it_is  # type: ignore[assignment]
    marks = dict.fromkeys(("disable", "allow_in_graph", "assume_constant_result"), _as_it_is)
    _defer("torch._dynamo", "_trace_wrapped_higher_order_op", **marks)


def _as_it_is(function: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Any:
    """Decorates nothing, as `@mark` or as `@mark()`."""
    return function or _as_it_is


def _defer(name: str, part: str, **ready: object) -> None:
    """Puts off running a package, but for one module of it, until something is asked of it that is not `ready`."""
    if name in sys.modules or (spec := find_spec(name)) is None:
        return
    module = sys.modules[name] = module_from_spec(spec)
    vars(module).update(ready)
    try:
        import_module(f"{name}.{part}")
    except ImportError:  # another torch, of which nothing is left out
        del sys.modules[name]
        return
    del module.__path__  # which importing another of its modules asks for
    module.__class__ = _Deferred


class _Deferred(ModuleType):
    """A package that is run when an attribute is asked for that it has not."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec and spec.loader
        assert spec.submodule_search_locations is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__path__ = spec.submodule_search_locations
        spec.loader.exec_module(self)
        return getattr(self, name)
