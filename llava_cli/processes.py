"""Starts processes of our own, with nothing of the current folder on their way, and is what they begin with.

`python -m` and `python -c` put the current folder first on `sys.path`, and an unpacked data set may hold a `queue.py`
or a `llava_cli/`. So Python starts in isolated mode, runs this very file, and finds the package by its place on disk,
and what it needs of others in the folders where this process finds them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

_HERE = os.path.dirname(os.path.abspath(__file__))


def command(*words: str) -> list[str]:
    """What runs `llava WORDS...` as a process of its own."""
    return _python((), "llava_cli.start", words)


def worker_command(module: str, *words: str) -> list[str]:
    """What runs `module.main(WORDS)`, without the `site` module: no `.pth` file or `sitecustomize` has a say."""
    return _python(("-S",), module, words)


def _python(options: tuple[str, ...], module: str, words: tuple[str, ...]) -> list[str]:
    utf8 = ("-X", "utf8") if sys.flags.utf8_mode else ()
    folders = os.pathsep.join(_folders())
    return [sys.executable, "-I", *options, *utf8, os.path.abspath(__file__), folders, module, *words]


def _folders() -> Iterator[str]:
    """Where this process finds modules, without the current folder, unless packages are installed there."""
    import site

    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it is gone
        here = ""
    installed = {os.path.realpath(folder) for folder in (*site.getsitepackages(), site.getusersitepackages())}
    for folder in sys.path:
        real = os.path.realpath(folder)
        if os.path.isabs(folder) and os.path.isdir(real) and (real != here or here in installed):
            yield folder


def _begin() -> None:
    """In the new process: imports this package from its place, then a module of it, and runs that."""
    from importlib import import_module
    from importlib.util import module_from_spec, spec_from_file_location

    _, folders, module, *words = sys.argv
    sys.path += [folder for folder in folders.split(os.pathsep) if folder and folder not in sys.path]
    init = os.path.join(_HERE, "__init__.py")
    spec = spec_from_file_location("llava_cli", init, submodule_search_locations=[_HERE])
    assert spec and spec.loader
    sys.modules["llava_cli"] = package = module_from_spec(spec)
    spec.loader.exec_module(package)
    sys.argv[1:] = words
    import_module(module).main()


if __name__ == "__main__":
    _begin()
