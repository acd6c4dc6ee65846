"""Command lines for processes of our own, which import nothing from the current folder; also their main script.

`python -m` and `python -c` put the current folder first on `sys.path`, and an unpacked data set may contain a
`queue.py` or a `llava_cli/`. So Python runs this file in isolated mode, which loads the package from its own place on
disk, and other packages from the folders where this process finds them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def command(*arguments: str) -> list[str]:
    """The command line that runs `llava ARGUMENTS...`."""
    return _python((), "llava_cli.start", arguments)


def worker_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module's `main()` without the `site` module: no `.pth` file or `sitecustomize`."""
    return _python(("-S",), module, arguments)


def _python(options: tuple[str, ...], module: str, arguments: tuple[str, ...]) -> list[str]:
    utf8 = ("-X", "utf8") if sys.flags.utf8_mode else ()
    folders = os.pathsep.join(_module_folders())
    return [sys.executable, "-I", *options, *utf8, os.path.abspath(__file__), folders, module, *arguments]


def _module_folders() -> Iterator[str]:
    """The folders of `sys.path`, without the current one unless packages are installed there."""
    import site

    try:
        current = os.path.realpath(os.getcwd())
    except OSError:  # it has been deleted
        current = ""
    installed = {os.path.realpath(folder) for folder in (*site.getsitepackages(), site.getusersitepackages())}
    for folder in sys.path:
        real = os.path.realpath(folder)
        if os.path.isabs(folder) and os.path.isdir(real) and (real != current or current in installed):
            yield folder


def _main() -> None:
    """In the new process: imports this package from its place on disk, and runs the `main()` of a module of it."""
    from importlib import import_module
    from importlib.util import module_from_spec, spec_from_file_location

    _, folders, module, *arguments = sys.argv
    sys.path += [folder for folder in folders.split(os.pathsep) if folder and folder not in sys.path]
    init = os.path.join(_PACKAGE, "__init__.py")
    spec = spec_from_file_location("llava_cli", init, submodule_search_locations=[_PACKAGE])
    assert spec and spec.loader
    sys.modules["llava_cli"] = package = module_from_spec(spec)
    spec.loader.exec_module(package)
    sys.argv[1:] = arguments
    import_module(module).main()


if __name__ == "__main__":
    _main()
