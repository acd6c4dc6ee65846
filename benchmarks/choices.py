"""What choosing costs, and how often it is right: `python benchmarks/choices.py`. Prints Markdown.

Cost: five choices beside a free answer of one word, which is two tokens with its end, each about a picture and with a
prompt of its own that nothing was read of before; in turn, in one process. The ratio is of the medians and, because
other processes only ever add, of the least times.

- builtin: alone, and in batches of 64.
- 1B: random weights with LLaVA-1.5's geometry, the decoder scaled to 1B.

Accuracy, with the built-in model: easy-VQA's questions with yes or no, and about colors, as `--choices` and as free
answers; an answer is right when it is the expected one to the letter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

from geometry import loaded
from PIL import Image

from llava_cli import Answer, Conversation, Sampling, load, open_picture
from llava_cli.conversation import Picture
from llava_cli.engine import Request
from llava_cli.engine.local import LocalEngine
from llava_cli.hardware.cpu import cpu_model

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "builtin"))
from batches import easy_vqa

CHOICES = ("sunny", "cloudy", "rain", "snow", "night")
CHOOSING, FREE = Sampling(choices=CHOICES), Sampling(max_tokens=2)
YES_NO = ("yes", "no")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def pictures(seed: int) -> Iterator[Picture]:
    """Noise, another one each time."""
    random = Random(seed)
    while True:
        image = Image.frombytes("RGB", (64, 64), random.randbytes(64 * 64 * 3))
        yield Picture("noise", image.resize((336, 336)), sha256=f"{random.random()}")


def cost(name: str, engine: LocalEngine, runs: int, together: int = 1) -> None:
    times: dict[Sampling, list[float]] = {CHOOSING: [], FREE: []}
    source = pictures(0)
    for run in range(runs + 2):
        order = list(times) if run % 2 else list(times)[::-1]
        for sampling in order:
            talks = [Conversation().ask("what is the weather like?", [next(source)]) for _ in range(together)]
            begin = time.perf_counter()
            if together == 1:
                engine.answer(talks[0], sampling)
            else:
                list(engine.answer_many([Request(talk, sampling) for talk in talks]))
            if run > 1:  # the first ones warm up
                times[sampling].append(time.perf_counter() - begin)
    chosen, free = times[CHOOSING], times[FREE]
    ratios = sorted(one / other for one, other in zip(chosen, free, strict=True))
    middle = statistics.median(chosen), statistics.median(free)
    print(
        f"| {name} | {middle[1] * 1e3:.1f} ms | {middle[0] * 1e3:.1f} ms | {middle[0] / middle[1]:.2f} "
        f"| {min(chosen) / min(free):.2f} | {ratios[len(ratios) // 4]:.2f} to {ratios[-len(ratios) // 4 - 1]:.2f} |",
        flush=True,
    )


def accuracy(engine: LocalEngine, most: int) -> None:
    asked: dict[str, list[tuple[Conversation, str, tuple[str, ...]]]] = defaultdict(list)
    for path, turns in easy_vqa("test"):
        picture = open_picture(str(path))
        for _, question, answer in turns:
            kind = "yes or no" if answer in YES_NO else "colors" if answer in COLORS else ""
            if kind and len(asked[kind]) < most:
                choices = YES_NO if answer in YES_NO else COLORS
                asked[kind].append((Conversation().ask(question, [picture]), answer, choices))
    for kind, tasks in asked.items():
        right = {}
        for way in ("free", "chosen"):
            requests = [Request(t, Sampling(choices=c) if way == "chosen" else Sampling()) for t, _, c in tasks]
            found = dict(engine.answer_many(iter(requests)))
            texts = [answer.text if isinstance(answer, Answer) else "" for _, answer in sorted(found.items())]
            right[way] = sum(text == expected for text, (_, expected, _) in zip(texts, tasks, strict=True))
        free, chosen = (f"{right[way]} ({right[way] / len(tasks):.2%})" for way in ("free", "chosen"))
        print(f"| {kind} | {len(tasks)} | {free} | {chosen} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--most", type=int, default=10_000, help="questions of a kind")
    parser.add_argument("--only", choices=["builtin", "1B", "accuracy"])
    parser.add_argument("--model", help="a checkpoint of 1B geometry that is there already")
    args = parser.parse_args()
    print(f"{cpu_model()}\n")
    if args.only in (None, "builtin", "1B"):
        print("| model | a free word | five choices | ratio of medians | of the least times | middle half of ratios |")
        print("|---|---|---|---|---|---|")
    if args.only in (None, "builtin"):
        cost("builtin", load(), 10 * args.runs)
        cost("builtin, 64 together", load(), args.runs // 2, 64)
    if args.only in (None, "1B"):
        for precision in ("4bit", "bf16"):
            engine = load(args.model, precision=precision) if args.model else loaded("1B", precision)
            assert isinstance(engine, LocalEngine)
            vars(engine)["end_tokens"] = frozenset({engine.prompter.tokenizer.eos_token_id})  # random weights have none
            cost(f"1B, {precision}", engine, args.runs)
            del engine
    if args.only in (None, "accuracy"):
        print("\n| questions | of them | free answers right | choices right |\n|---|---|---|---|")
        accuracy(load(), args.most)


if __name__ == "__main__":
    main()
