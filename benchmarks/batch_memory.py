"""Memory and restarts of a long run: `python benchmarks/batch_memory.py`. Ten to 40 minutes on two cores.

Makes tiny pictures and runs `llava batch` over the first 1,000 and over all 100,000, as processes: the peak memory
of each; then cuts the output to 99,000 rows and starts it again: the time until the first new row is written, beside
that of a fresh start.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

QUESTION = "what color is the background?"


def make(folder: Path, count: int) -> None:
    for number in range(count):
        inside = folder / f"{number // 1000:03d}"
        inside.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number % 256, number // 256 % 256, 90)).save(inside / f"{number:06d}.png")


def run(folder: Path, output: Path) -> tuple[float, float, float]:
    """Seconds until the first new row, seconds in all, and the most MB of memory held."""
    rows = output.stat().st_size if output.exists() else 0
    command = [sys.executable, "-m", "llava_cli", "batch", str(folder), QUESTION, "-o", str(output), "-q"]
    begin, first = time.monotonic(), 0.0
    process = subprocess.Popen(command)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if not first and output.exists() and output.stat().st_size > rows:
            first = time.monotonic() - begin
        if pid:
            break
        time.sleep(0.02)
    if status:
        raise SystemExit(f"llava batch failed: {status}")
    return first, time.monotonic() - begin, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=1_000)
    parser.add_argument("--many", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "few", args.few)
        make(folder / "many", args.many)
        fresh, seconds, memory = run(folder / "few", folder / "few.jsonl")
        print(f"{args.few:,} pictures: first row after {fresh:.1f} s, all after {seconds:.1f} s, peak {memory:.0f} MB")
        first, seconds, most = run(folder / "many", output := folder / "many.jsonl")
        print(f"{args.many:,} pictures: first row after {first:.1f} s, all after {seconds:.1f} s, peak {most:.0f} MB")
        print(f"  {most - memory:+.0f} MB; {args.many / seconds:.0f} pictures/s, start included", flush=True)
        lines = output.read_bytes().splitlines(keepends=True)
        output.write_bytes(b"".join(lines[: args.many * 99 // 100]))
        again, seconds, most = run(folder / "many", output)
        print(f"resumed after {args.many * 99 // 100:,} rows: first new row after {again:.1f} s, peak {most:.0f} MB")
        print(
            f"  {again - first:+.1f} s against the fresh start over as many, {again - fresh:+.1f} s over {args.few:,}"
        )
        print(f"  the file is that of the undisturbed run: {output.read_bytes().splitlines(keepends=True) == lines}")


if __name__ == "__main__":
    main()
