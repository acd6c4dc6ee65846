"""What every contender does, and how it is told to: shared by workers in different environments, so it imports little.

A worker is a process with one loaded model. It says, as one line of JSON on its standard output, when its model was
loaded and had given a first token, and then does the work that each line of its standard input names: a method of
its contender, that returns figures. Between lines it sleeps.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

IMAGE_TOKENS, TEXT_TOKENS, ANSWER_TOKENS = 576, 44, 64
PROMPT_TOKENS = IMAGE_TOKENS + TEXT_TOKENS
QUESTION = (
    "what is in this picture? and what color is the largest of all the things in it? and what is above it, or below it?"
)
"""With its format as many tokens as said above, in the built-in model's tokenizer."""
LATER = ("what color is the largest of them?", "and what is above it, or below it?")
CHAT_TOKENS = 24
"""How long a chat's answers are."""
BATCH, BATCH_TOKENS = 4, 32
"""How many pictures a batch has, and how long its answers are."""
TALK_PICTURES = (True, False, True, False, False)
"""Which turns of the talk whose memory is measured bring a picture."""
THREADS = 2

Figures = dict[str, float]


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
    """Makes the contender from the options on the command line, and lets it work until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not for the pipe
    options = json.loads(sys.argv[1])

    def say(figures: Figures) -> None:
        print(json.dumps(figures), file=answers, flush=True)

    contender = make(options)
    loaded = time.time()
    contender.first()
    say({"load": loaded - options["started"], "cold": time.time() - options["started"], "memory": peak_memory()})
    for line in sys.stdin:
        do = getattr(contender, line.strip(), None)
        say({**(do() if do else {}), "memory": peak_memory()})


def peak_memory() -> float:
    """The most GB that this process has held, read files that it has mapped included."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e6


def timed(tokens: Iterable[object], most: int, begin: float) -> tuple[float, float]:
    """Seconds from `begin` to the first token, and tokens a second after it, of which there must be `most` in all."""
    first, count = 0.0, 0
    for _ in tokens:
        count += 1
        first = first or time.perf_counter() - begin
        if count == most:
            break
    if count != most:
        raise RuntimeError(f"{count} tokens instead of {most}")
    return first, (most - 1) / (time.perf_counter() - begin - first)


def batch_of(path: str, answer: Callable[[list[str]], None]) -> Figures:
    """What `answer` makes of a batch: files of one picture, with a corner in each that nobody has seen before."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{number}.png") for number in range(BATCH)]
        for file in paths:
            picture = Image.open(path).convert("RGB")
            picture.paste(Image.effect_noise((32, 32), 90))
            picture.save(file)
        begin = time.perf_counter()
        answer(paths)
        return {"batch": BATCH / (time.perf_counter() - begin)}


def some_tokens(count: int, numbers: random.Random) -> list[int]:
    """A text that nobody has seen before, so that no cache can know it."""
    return [numbers.randrange(1000, 32000) for _ in range(count)]
