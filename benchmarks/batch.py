"""What answering many at once brings: `python benchmarks/batch.py`. Pictures a second, against a loop.

The loop asks one at a time in one process, `engine.ask(picture, question)`, and so does its model's own
`generate`; the batch is what `llava batch` does once its model is loaded: pictures opened by processes of their
own, prompts prepared ahead, many answered at once. All of them in one run, in turn, median of `--runs`.

- builtin: drawings on disk, "what is this?" (an answer has a dozen tokens).
- easy-VQA: pictures of its test half, each with all of its questions (about ten; an answer is a word).
- 1B, 4-bit: random weights with LLaVA-1.5's geometry, the decoder scaled to 1B, answers of 32 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from geometry import loaded
from PIL import Image

from llava_cli import load
from llava_cli.batch.opener import Opener
from llava_cli.batch.runner import answered
from llava_cli.batch.tasks import Task
from llava_cli.conversation import Conversation
from llava_cli.engine.local import LocalEngine
from llava_cli.images import open_picture
from llava_cli.settings import Settings

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "builtin"))
import samples
from batches import easy_vqa

Way = Callable[[list[Task]], list[str]]


def ways(engine: LocalEngine, max_tokens: int) -> dict[str, Way]:
    """How the same tasks are done, each way once before it is timed: the first pass is slow."""
    settings = Settings(max_tokens=max_tokens)

    def loop(tasks: list[Task]) -> list[str]:
        return [engine.ask(task.image, task.question, max_tokens=max_tokens) for task in tasks]

    def generate(tasks: list[Task]) -> list[str]:
        """As the documentation of transformers has it."""
        texts, processor, model = [], engine.prompter.processor, engine._model
        for task in tasks:
            picture = open_picture(task.image)
            prompt = engine.prompter.render(Conversation().ask(task.question, [picture]))
            inputs = processor(text=prompt, images=[picture.image], return_tensors="pt").to(model.device, model.dtype)
            tokens = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
            length = inputs["input_ids"].shape[1]
            texts.append(processor.decode(tokens[0, length:], skip_special_tokens=True).strip())
        return texts

    def batch(tasks: list[Task]) -> list[str]:
        opener = Opener()
        try:
            return [row["answer"] for _, row in answered(engine, tasks, opener, settings, None, lambda: True)]
        finally:
            opener.close()

    return {"loop": loop, "generate": generate, "batch": batch}


def compare(name: str, engine: LocalEngine, tasks: list[Task], few: list[Task], max_tokens: int, runs: int) -> None:
    """Prints a line for each way. The slow ones do only the first `few` of the tasks; a rate is a rate."""
    seconds: dict[str, list[float]] = {}
    said: dict[str, list[str]] = {}
    table = ways(engine, max_tokens)
    for way in table.values():
        way(few[:2])
    for _ in range(runs):
        for way, do in table.items():
            work = tasks if way == "batch" else few
            begin = time.perf_counter()
            said[way] = do(work)
            pictures = len({task.image for task in work})
            seconds.setdefault(way, []).append((time.perf_counter() - begin) / pictures)
    rates = {way: 1 / statistics.median(times) for way, times in seconds.items()}
    same = sum(a == b for a, b in zip(said["loop"], said["batch"], strict=False))
    print(f"{name}, {len(tasks) / len({t.image for t in tasks}):.1f} questions a picture, {engine.precision}:")
    print(f"  a loop over llava's own ask    {rates['loop']:8.2f} pictures/s")
    print(f"  a loop over generate           {rates['generate']:8.2f} pictures/s")
    print(f"  llava batch                    {rates['batch']:8.2f} pictures/s")
    print(
        f"  ratio {rates['batch'] / rates['loop']:.2f} to ask, {rates['batch'] / rates['generate']:.2f} to generate;",
        end=" ",
    )
    print(f"{same} of {len(few)} answers are those of ask", flush=True)


def drawings(folder: Path, count: int, question: str) -> list[Task]:
    tasks = []
    for number in range(count):
        picture = samples.drawing(Random(f"speed/{number}"), 0, most=4, crowded=0, numbers=0)
        picture.image.save(path := folder / f"{number}.png")
        tasks.append(Task(str(path), question))
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["builtin", "easy-vqa", "1B"])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.only in (None, "builtin", "easy-vqa"):
            engine = load("builtin")
            if args.only != "easy-vqa":
                tasks = drawings(Path(folder), 512, "what is this?")
                compare("builtin", engine, tasks, tasks[:64], 64, args.runs)
            if args.only != "builtin":
                pictures = easy_vqa("test")[:100]
                tasks = [Task(str(path), question) for path, turns in pictures for _, question, _ in turns]
                compare("easy-VQA", engine, tasks, tasks[:100], 16, args.runs)
        if args.only in (None, "1B"):
            engine = loaded("1B", "4bit")
            noise = Image.effect_noise((640, 480), 90).convert("RGB")
            tasks = []
            for number in range(8):
                noise.rotate(number * 7).save(path := Path(folder) / f"photo-{number}.png")
                tasks.append(Task(str(path), "what is in this picture?"))
            compare("1B", engine, tasks, tasks[:4], 32, args.runs)


if __name__ == "__main__":
    main()
