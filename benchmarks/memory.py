"""Memory beside OpenVINO and llama.cpp: `python benchmarks/memory.py`. Prints Markdown; 15 minutes on two cores.

The work: LLaVA-1.5's geometry with random weights (CLIP-L/336, a decoder of 1B), and a talk of five turns, of which
the first and the third bring a picture, 1,300 tokens in the end. Each contender is a process of its own with two
threads, one after another. Figures are the most that a process has held, mapped files that it has read included
(VmHWM), until its first token and after the talk, in brackets as a share of OpenVINO's.

Ours is measured with each instruction set that kernels are compiled for and this CPU has; where that has no bf16,
computing is in fp32, as on a CPU that has no other. "first start" quantizes the checkpoint and packs its weights, and
"later start" maps what that has left.

llama.cpp is PyPI's `xllamacpp`. It has the decoder alone: to it a picture's tokens are tokens like others.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from peers import checkpoint, exported, gguf_here, here, openvino_python, picture
from platformdirs import user_cache_path
from speed import Worker, processor

from llava_cli.engine.cpu.jit.compiler import supported_isas

SIZE, OPENVINO = "1B", "OpenVINO int4"


@dataclass(frozen=True)
class Peak:
    """GB that a process has held at most."""

    first_token: float
    talk: float
    tokens: int


def measure(python: Path, script: str, model: Path, asked: Path, isa: str = "") -> Peak:
    worker = Worker(python, script, model=str(model), precision="4bit", picture=str(asked), isa=isa)
    try:
        figures = worker.do("talk")
    finally:
        began = worker.end()
    return Peak(began["memory"], figures["memory"], int(figures["talk tokens"]))


def measure_ours(model: Path, asked: Path) -> dict[str, Peak]:
    """A first and a later start with each instruction set, from a cache of its own."""
    peaks = {}
    for isa in supported_isas():
        with tempfile.TemporaryDirectory(dir=model.parent) as folder:
            os.environ["LLAVA_CACHE"] = folder
            for start in ("first", "later"):
                peak = measure(here(model), "ours.py", model, asked, isa.name)
                peaks[f"llava 4bit, {isa.name}, {start} start"] = peak
                print(isa.name, start, peak, file=sys.stderr, flush=True)
    return peaks


def table(peaks: dict[str, Peak]) -> str:
    lines = ["| | until the first token, GB | after the talk, GB | tokens |", "|---|---|---|---|"]
    for name, peak in peaks.items():
        first, talk = (
            f"{own:.2f} ({own / base:.2f})"
            for own, base in (
                (peak.first_token, peaks[OPENVINO].first_token),
                (peak.talk, peaks[OPENVINO].talk),
            )
        )
        lines.append(f"| {name} | {first} | {talk} | {peak.tokens} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=user_cache_path("llava-benchmarks"))
    cache = parser.parse_args().cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    model, asked = checkpoint(cache, SIZE), picture(cache)
    peaks = measure_ours(model, asked)
    peaks[OPENVINO] = measure(openvino_python(cache), "ov_run.py", exported(cache, SIZE), asked)
    peaks["llama.cpp Q4_0"] = measure(here(cache), "xllama_run.py", gguf_here(cache, SIZE), asked)
    print(f"{processor()}\n\n{table(peaks)}")


if __name__ == "__main__":
    main()
