"""Leaves out imports of transformers that the command line never needs, a fifth of the CPU time of a short answer.

Only the command line and the workers of a cluster do this, whose process is their own; for programs that import
`llava_cli`, nothing is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

from llava_cli.settings import is_fast

UNUSED = ("scipy", "sklearn")
"""Packages that transformers imports if they are installed, for training losses and one way of decoding."""


def start() -> None:
    """Has transformers imported without them from now on, unless `LLAVA_FAST=0`."""
    if is_fast():
        sys.meta_path.insert(0, _BeforeTransformers())


class _BeforeTransformers(MetaPathFinder):
    """Finds no module; it notices when transformers is about to be imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "transformers":
            sys.meta_path.remove(self)
            _leave_out()


def _leave_out() -> None:
    import torch

    for name in UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # which `import` reports as not installed
    # As in a torch built without it: no tensors are distributed over several processes.
    torch.distributed.is_available = lambda: False
    # Nothing is compiled, but torch's compiler (and sympy with it) is imported for decorators that mark what it should
    # skip, and for what bitsandbytes might compile.
    torch.compile = _unchanged  # type: ignore[assignment]
    marks = dict.fromkeys(("disable", "allow_in_graph", "assume_constant_result"), _unchanged)
    _defer("torch._dynamo", "_trace_wrapped_higher_order_op", **marks)


def _unchanged(function: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Any:
    """A decorator that changes nothing, as `@mark` or as `@mark()`."""
    return function or _unchanged


def _defer(name: str, part: str, **ready: object) -> None:
    """Imports only one module of a package, and runs the package when an attribute that is not `ready` is asked for."""
    if name in sys.modules or (spec := find_spec(name)) is None:
        return
    module = sys.modules[name] = module_from_spec(spec)
    vars(module).update(ready)
    try:
        import_module(f"{name}.{part}")
    except ImportError:  # another version of torch: nothing is left out
        del sys.modules[name]
        return
    del module.__path__  # an attribute that importing its other modules asks for
    module.__class__ = _Deferred


class _Deferred(ModuleType):
    """A package that runs when an attribute is asked for that it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec and spec.loader
        assert spec.submodule_search_locations is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__path__ = spec.submodule_search_locations
        spec.loader.exec_module(self)
        return getattr(self, name)
