"""What answering many at once brings: `python benchmarks/batch.py`. Pictures a second, against a loop.

Two loops ask one at a time in one process: over transformers' `generate`, as its documentation has it
(`LLAVA_FAST=0`: the model is untouched), and over `engine.ask(picture, question)`, which has all of this tool's own
speed. The batch is what `llava batch` does once its model is loaded: pictures opened by processes of their own,
prompts prepared ahead, many answered at once. Each has a process, that waits while another one has its turn; all of
them in one run, median of `--runs`, ratios turn by turn.

- builtin: drawings on disk, "what is this?" (an answer has a dozen tokens).
- easy-VQA: pictures of its test half, each with all of its questions (about ten; an answer is a word).
- 1B, 4-bit: random weights with LLaVA-1.5's geometry, the decoder scaled to 1B, answers of 32 tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from geometry import loaded
from PIL import Image

from llava_cli import load
from llava_cli.batch.picture_loader import PictureLoader
from llava_cli.batch.runner import answer_tasks
from llava_cli.batch.tasks import Task
from llava_cli.conversation import Conversation
from llava_cli.engine.local import LocalEngine
from llava_cli.hardware.allocator import limit_caches
from llava_cli.images.reader import open_picture
from llava_cli.settings import Sampling, Settings

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "builtin"))
import samples
from batches import easy_vqa

ENVIRONMENT = {
    "loop": {"LLAVA_FAST": "1"},
    "generate": {"LLAVA_FAST": "0"},
    "batch": {
        "LLAVA_FAST": "1",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
        "LRU_CACHE_CAPACITY": "16",
    },
}
"""What each way's process is started with. All say whether the fast ways are on, for one is started after the other in
the same environment; the rest of the last is what `llava batch` sets for itself, in time: here torch comes first."""

Way = Callable[[list[Task]], list[str]]


def ways(engine: LocalEngine, max_tokens: int) -> dict[str, Way]:
    """How the same tasks are done."""
    settings = Settings(sampling=Sampling(max_tokens=max_tokens))

    def loop(tasks: list[Task]) -> list[str]:
        return [engine.ask(task.image, task.question, max_tokens=max_tokens) for task in tasks]

    def generate(tasks: list[Task]) -> list[str]:
        """As the documentation of transformers has it."""
        texts, processor, model = [], engine.prompter.processor, engine.network
        for task in tasks:
            picture = open_picture(task.image)
            prompt = engine.prompter.render(Conversation().ask(task.question, [picture]))
            inputs = processor(text=prompt, images=[picture.image], return_tensors="pt").to(model.device, model.dtype)
            tokens = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
            length = inputs["input_ids"].shape[1]
            texts.append(processor.decode(tokens[0, length:], skip_special_tokens=True).strip())
        return texts

    def batch(tasks: list[Task]) -> list[str]:
        opener = PictureLoader()
        try:
            return [row["answer"] for _, row in answer_tasks(engine, tasks, opener, settings, None, lambda: True)]
        finally:
            opener.close()

    return {"loop": loop, "generate": generate, "batch": batch}


def work(way: str, model: str, tasks: list[Task], few: list[Task], max_tokens: int, turns: Connection) -> None:
    """One way in a process of its own: does its tasks at each turn, and sends the seconds and the answers."""
    if way == "batch":
        limit_caches(primitives=32)
    engine = loaded("1B", "4bit") if model == "1B" else load(model)
    do = ways(engine, max_tokens)[way]
    do(few[:2])  # the first pass is slow
    turns.send(engine.precision)
    while turns.recv():
        begin = time.perf_counter()
        said = do(tasks)
        turns.send((time.perf_counter() - begin, said))


def compare(name: str, model: str, tasks: list[Task], few: list[Task], max_tokens: int, runs: int) -> None:
    """Prints a line for each way. The slow ones do only the first `few` of the tasks; a rate is a rate."""
    todo = {"loop": few, "generate": few, "batch": tasks}
    turns: dict[str, Connection] = {}
    spawn = get_context("spawn")
    for way, its in todo.items():
        turns[way], theirs = spawn.Pipe()
        os.environ |= ENVIRONMENT[way]
        spawn.Process(target=work, args=(way, model, its, few, max_tokens, theirs), daemon=True).start()
    precision = [pipe.recv() for pipe in turns.values()]
    seconds: dict[str, list[float]] = {way: [] for way in todo}
    said: dict[str, list[str]] = {}
    for _ in range(runs):
        for way, pipe in turns.items():
            pipe.send(True)
            took, said[way] = pipe.recv()
            seconds[way].append(took / len({task.image for task in todo[way]}))
    for pipe in turns.values():
        pipe.send(False)
    rates = {way: 1 / statistics.median(times) for way, times in seconds.items()}
    same = sum(a == b for a, b in zip(said["loop"], said["batch"], strict=False))
    print(f"{name}, {len(tasks) / len({t.image for t in tasks}):.1f} questions a picture, {precision[0]}:")
    print(f"  a loop over llava's own ask    {rates['loop']:8.2f} pictures/s")
    print(f"  a loop over generate           {rates['generate']:8.2f} pictures/s")
    print(f"  llava batch                    {rates['batch']:8.2f} pictures/s")
    ratios = [
        statistics.median(a / b for a, b in zip(seconds[way], seconds["batch"], strict=True))
        for way in ("loop", "generate")
    ]
    print(f"  ratio {ratios[0]:.2f} to ask, {ratios[1]:.2f} to generate;", end=" ")
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
        if args.only in (None, "builtin"):
            tasks = drawings(Path(folder), 2048, "what is this?")
            compare("builtin", "builtin", tasks, tasks[:64], 64, args.runs)
        if args.only in (None, "easy-vqa"):
            pictures = easy_vqa("test")[:100]
            tasks = [Task(str(path), question) for path, turns in pictures for _, question, _ in turns]
            compare("easy-VQA", "builtin", tasks, tasks[:100], 16, args.runs)
        if args.only in (None, "1B"):
            noise = Image.effect_noise((640, 480), 90).convert("RGB")
            tasks = []
            for number in range(8):
                noise.rotate(number * 7).save(path := Path(folder) / f"photo-{number}.png")
                tasks.append(Task(str(path), "what is in this picture?"))
            compare("1B", "1B", tasks, tasks[:4], 32, args.runs)


if __name__ == "__main__":
    main()
