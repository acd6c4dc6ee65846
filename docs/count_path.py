"""Counts what one question goes through: `LLAVA_FAST=0 python docs/count_path.py`.

Runs `llava ask examples/shapes.png "what is this?"` and lists the files of the package in which a function ran in this
process, each with its lines and how many of them are in functions that ran. Imports and declarations do not count, nor
does what runs because of them.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType

import llava_cli
from llava_cli.cli import app, register

PACKAGE = Path(llava_cli.__file__).parent
PICTURE = PACKAGE.parent / "examples" / "shapes.png"

called: dict[Path, set[CodeType]] = defaultdict(set)
known: set[CodeType] = set()


def note_call(frame: FrameType, event: str, _: object) -> None:
    """Notes each function of the package that runs; the body of a module or class is no function."""
    code = frame.f_code
    if event != "call" or code in known or not code.co_flags & inspect.CO_OPTIMIZED:
        return
    if code.co_filename.startswith(str(PACKAGE)) and not is_importing(frame.f_back):
        known.add(code)
        called[Path(code.co_filename)].add(code)


def is_importing(frame: FrameType | None) -> bool:
    """Whether a frame is part of an `import`: of a module's declarations, or the import system's look for a name."""
    while frame and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def lines_of(code: CodeType) -> range:
    return range(code.co_firstlineno, 1 + max((line for *_, line in code.co_lines() if line), default=0))


def main() -> None:
    register("ask")
    sys.argv = ["llava", "ask", "-q", str(PICTURE), "what is this?"]
    threading.setprofile(note_call)
    sys.setprofile(note_call)
    try:
        app(prog_name="llava")
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    total = ran = 0
    for file in sorted(called):
        lines = len(file.read_text("utf-8").splitlines())
        in_functions = len({line for code in called[file] for line in lines_of(code)})
        total, ran = total + lines, ran + in_functions
        print(f"{lines:6} {in_functions:6}  {file.relative_to(PACKAGE)}")
    print(f"{total:6} {ran:6}  lines in {len(called)} files")


if __name__ == "__main__":
    main()
