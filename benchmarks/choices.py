"""What choosing costs: `python benchmarks/choices.py`. Prints a table.

One question about a picture is answered freely, with one word and the end of the turn, and with `--choices` of five,
each in up to four spellings; in turns, about another picture each time, so that nothing is read before. Told are the
medians and the median of the turns' ratios. With the built-in model, and with random weights in LLaVA-1.5's geometry,
the decoder scaled to 1B, in 4 bits and in bf16; and the built-in model in a batch of 64 pictures.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from random import Random

from geometry import loaded
from PIL import Image

from llava_cli import Conversation, Sampling, load
from llava_cli.conversation import Picture
from llava_cli.engine import Request
from llava_cli.engine.local import LocalEngine
from llava_cli.hardware.cpu import cpu_model
from llava_cli.settings import Precision

QUESTION = "what color is the circle?"
FREE = Sampling(max_tokens=2)
CHOOSING = Sampling(choices=("red", "blue", "green", "yellow", "black"))


def pictures(seed: int = 0) -> Iterator[Picture]:
    """Pictures of noise, each another one."""
    rng = Random(seed)
    while True:
        image = Image.frombytes("RGB", (96, 96), rng.randbytes(96 * 96 * 3)).resize((336, 336))
        yield Picture("noise", image, sha256="")


def asked(picture: Picture) -> Conversation:
    return Conversation().ask(QUESTION, [picture])


def compare(name: str, runs: int, measure: Callable[[Sampling, Iterator[Picture]], float]) -> None:
    """Prints how long both ways take, and how many times as long choosing takes."""
    shown = pictures()
    for sampling in (FREE, CHOOSING):
        measure(sampling, shown)
    pairs = [(measure(FREE, shown), measure(CHOOSING, shown)) for _ in range(runs)]
    free, choosing = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(second / first for first, second in pairs)
    print(
        f"| {name} | {free * 1000:,.0f} ms | {choosing * 1000:,.0f} ms | {statistics.median(ratios):.2f} "
        f"| {ratios[0]:.2f} to {ratios[-1]:.2f} |",
        flush=True,
    )


def alone(engine: LocalEngine) -> Callable[[Sampling, Iterator[Picture]], float]:
    def measure(sampling: Sampling, shown: Iterator[Picture]) -> float:
        conversation, begin = asked(next(shown)), time.perf_counter()
        engine.answer(conversation, sampling)
        return time.perf_counter() - begin

    return measure


def together(engine: LocalEngine, count: int) -> Callable[[Sampling, Iterator[Picture]], float]:
    def measure(sampling: Sampling, shown: Iterator[Picture]) -> float:
        requests = [Request(asked(next(shown)), sampling) for _ in range(count)]
        begin = time.perf_counter()
        list(engine.answer_many(requests))
        return time.perf_counter() - begin

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    print(f"{cpu_model()}\n\n| | one word | five choices | ratio | from, to |\n|---|---|---|---|---|")
    engine = load("builtin")
    compare(f"built-in, {engine.precision}", runs, alone(engine))
    compare(f"built-in, {engine.precision}, batch of 64", max(3, runs // 3), together(engine, 64))
    precisions: tuple[Precision, ...] = ("4bit", "bf16")
    for precision in precisions:
        compare(f"1B, {precision}", runs, alone(loaded("1B", precision)))


if __name__ == "__main__":
    main()
