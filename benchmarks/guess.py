"""What `llava models` guesses beside what comes: `python benchmarks/guess.py`, with `--avx2` as a CPU without bf16.

Random weights with LLaVA-1.5's geometry, the decoder scaled to 1B, in each precision: seconds to the first token of an
answer about a photo, tokens per second, and memory: the most that the process has held (mapped files included) until
that answer ended, and after a talk of three turns with a second photo, which is what the guess has to hold. Each is a
process of its own; in 8 and 4 bits the first start quantizes, and the later one finds the copy. It runs on one thread
and counts CPU time, so that other work on the machine hardly matters.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_cli import Answer
    from llava_cli.engine.local import LocalEngine
    from llava_cli.settings import Precision

PRECISIONS = "fp32", "bf16", "8bit", "4bit"
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avx2", action="store_true", help="use no instructions beyond AVX2")
    parser.add_argument("--folder", help="a checkpoint instead of one with random weights")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="only this one; repeatable")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        measure(Path(args.folder), args.precision[0], args.avx2)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if not args.folder:
            subprocess.run([sys.executable, Path(__file__).with_name("geometry.py"), "1B", scratch], check=True)
        variables = {"OMP_NUM_THREADS": "1", "LLAVA_CACHE": f"{scratch}/cache", **(AVX2 if args.avx2 else {})}
        columns = "precision", "first token, s: guess", "truth", "tokens/s: guess", "truth", "memory, GB: guess"
        print("| " + " | ".join((*columns, "truth: an answer", "a talk", "guess / truth")) + " |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for precision in args.precision or PRECISIONS:
            words = ["--here", "--folder", args.folder or scratch, "--precision", precision]
            words += ["--avx2"] * args.avx2
            command, environment = [sys.executable, __file__, *words], {**os.environ, **variables}
            for _ in range(2 if precision in ("8bit", "4bit") else 1):  # the first start quantizes
                row = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                print(row, end="", flush=True)


def measure(folder: Path, precision: Precision, avx2: bool) -> None:
    """Prints a row of the table."""
    time.perf_counter = time.process_time
    from llava_cli import load, speed
    from llava_cli.catalog import sizes_on_disk
    from llava_cli.hardware import cpu
    from llava_cli.hardware.device import Plan
    from llava_cli.models.footprint import footprint
    from llava_cli.models.precision import with_kept_copies
    from llava_cli.models.registry import Checkpoint
    from llava_cli.settings import LoadOptions

    if avx2:
        features = frozenset(name for name in cpu.cpu_features() if not name.startswith(("avx512", "avx_vnni", "amx")))
        cpu.cpu_features = lambda: features
    checkpoint, plan = Checkpoint(str(folder), folder), Plan("cpu", precision, attention="sdpa", why="")
    found = sizes_on_disk(checkpoint)
    assert found is not None
    sizes = with_kept_copies(found, checkpoint, plan, LoadOptions())
    start = f"{precision}, {'first' if sizes.quantizes(plan) else 'later'} start" if "bit" in precision else precision
    memory = footprint(sizes, plan).total
    answer, peak, most = talk(load(str(folder), precision=precision, device="cpu"))
    seconds, rate = speed.wait(sizes, plan, speed.measure(plan))
    assert seconds is not None and rate is not None
    decoding = answer.total_seconds - answer.first_token_seconds
    print(
        f"| {start} | {seconds:.1f} | {answer.first_token_seconds:.1f} | {rate:.1f}"
        f" | {(answer.answer_tokens - 1) / decoding:.1f} | {memory / 1e9:.2f} | {peak / 1e9:.2f} | {most / 1e9:.2f}"
        f" | {memory / most:.2f} |",
        flush=True,
    )


def talk(engine: LocalEngine) -> tuple[Answer, int, int]:
    """An answer about a photo, and the bytes that the process has held until then and after two turns more."""
    from PIL import Image

    from llava_cli import Conversation, Sampling
    from llava_cli.conversation import Picture
    from llava_cli.hardware.memory import peak_memory

    photos = [
        Picture(f"noise {i}", Image.effect_noise((1024, 768), 80).convert("RGB"), sha256=str(i)) for i in range(2)
    ]
    asked = Conversation().ask("what is this?", photos[:1])
    first, peak = engine.answer(asked, Sampling(max_tokens=24)), peak_memory()
    asked = asked.answered(first.text).ask("and this?", photos[1:])
    asked = asked.answered(engine.answer(asked, Sampling(max_tokens=8)).text).ask("which is larger?")
    engine.answer(asked, Sampling(max_tokens=8))
    return first, peak, peak_memory()


if __name__ == "__main__":
    main()
