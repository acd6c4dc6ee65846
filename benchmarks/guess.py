"""What `llava models` guesses beside what comes: `python benchmarks/guess.py`, with `--avx2` as a CPU without bf16.

Random weights with LLaVA-1.5's geometry, the decoder scaled to 1B, in each precision: seconds to the first token of an
answer about a photo, tokens per second, and memory. It runs on one thread and counts CPU time, so that other work on
the machine hardly matters.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
        print("| precision | first token, s: guess | truth | tokens/s: guess | truth | memory, GB: guess | truth |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for precision in args.precision or PRECISIONS:
            words = ["--here", "--folder", args.folder or scratch, "--precision", precision]
            words += ["--avx2"] * args.avx2
            command, environment = [sys.executable, __file__, *words], {**os.environ, **variables}
            for _ in range(2 if precision in ("8bit", "4bit") else 1):  # the first start quantizes
                row = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(row, end="", flush=True)


def measure(folder: Path, precision: str, avx2: bool) -> None:
    """Prints a row of the table."""
    time.perf_counter = time.process_time
    from PIL import Image

    from llava_cli import Conversation, Sampling, load, speed
    from llava_cli.catalog import sizes_on_disk
    from llava_cli.conversation import Picture
    from llava_cli.hardware import cpu
    from llava_cli.hardware.device import Plan
    from llava_cli.hardware.memory import peak_memory
    from llava_cli.models.footprint import footprint
    from llava_cli.models.registry import Checkpoint

    if avx2:
        features = frozenset(name for name in cpu.cpu_features() if not name.startswith(("avx512", "amx")))
        cpu.cpu_features = lambda: features
    engine, sizes = load(str(folder), precision=precision, device="cpu"), sizes_on_disk(Checkpoint("", folder))
    plan = Plan("cpu", precision, attention="sdpa", why="")
    assert sizes is not None
    photo = Image.effect_noise((1024, 768), 80).convert("RGB")
    talk = Conversation().ask("what is this?", [Picture("noise", photo, sha256="")])
    answer, peak = engine.answer(talk, Sampling(max_tokens=24)), peak_memory()
    seconds, rate = speed.wait(sizes, plan, speed.measure(plan))
    assert seconds is not None and rate is not None
    decoding = answer.total_seconds - answer.first_token_seconds
    memory = footprint(sizes, plan).total
    print(
        f"| {precision} | {seconds:.1f} | {answer.first_token_seconds:.1f} | {rate:.1f}"
        f" | {(answer.answer_tokens - 1) / decoding:.1f} | {memory / 1e9:.1f} | {peak / 1e9:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
