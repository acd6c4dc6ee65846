"""Mutations of real clients' requests: what is not refused has all its texts in the prompt, in order, and its pictures.

python benchmarks/fuzz_requests.py [COUNT] [SEED]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.requests_of_clients import check, mutated

from llava_cli.conversation import Picture
from llava_cli.images.decode import decode
from llava_cli.loader import load_prompter
from llava_cli.server.pictures import decode_data_url
from llava_cli.settings import LoadOptions


def main(count: int = 5000, seed: int = 1) -> None:
    prompter, rng = load_prompter(LoadOptions(model="builtin")), Random(seed)
    begin, answered = time.perf_counter(), 0
    for _ in range(count):
        answered += check(
            mutated(rng), prompter.render, lambda url, name: Picture(url, decode(decode_data_url(url), "")[0], name)
        )
    seconds = time.perf_counter() - begin
    print(f"{count} requests, seed {seed}: {answered} answered, {count - answered} refused, {seconds:.1f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
