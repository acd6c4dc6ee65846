"""Cold starts with the built-in model: `python benchmarks/cold.py`. Prints Markdown.

From the start of a process to its first word, of `llava ask` and of the script in transformers' documentation, on the
same checkpoint, one after the other in turn; medians, and the median of what ours took of the other's in the same turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from llava_cli.models.registry import builtin_folder

HERE = Path(__file__).parent
PICTURE, QUESTION = str(HERE.parent / "examples" / "triangle.png"), "what shape is it?"


def first_word(command: list[str]) -> float:
    """Seconds until a process has begun to print. Raises `CalledProcessError` where it fails."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()  # with modules compiled by an earlier run, as installed ones are
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as process:
        assert process.stdout
        process.stdout.read(1)
        seconds = time.perf_counter() - begin
        process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    print("| | llava ask, s | transformers, s | ratio |\n|---|---|---|---|")
    for precision, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        ask = ["-m", "llava_cli", "ask", "-q", "-p", precision, "--max-tokens", "1", PICTURE, QUESTION]
        script = [str(HERE / "workers" / "script.py"), str(builtin_folder()), PICTURE, QUESTION, dtype]
        turns = [[first_word([sys.executable, *command]) for command in (ask, script)] for _ in range(runs + 1)]
        own, other = zip(*turns[1:], strict=True)  # the first ones find nothing in the system's cache
        ratio = statistics.median(a / b for a, b in turns[1:])
        print(
            f"| {precision} | {statistics.median(own):.2f} | {statistics.median(other):.2f} | {ratio:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
