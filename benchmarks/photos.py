"""What a photo costs before a model sees it: `python benchmarks/photos.py`. From JPEG files to pixel values.

transformers' processor gets what Pillow opens, in as many threads as there are cores. Here, as in `llava batch`,
processes without rights decode and resize, and a thread prepares the prompts. Both do the same: a square of 336 pixels,
padded with the mean color, as LLaVA-1.5 sees it; the pixel values are compared. Each way and each size, one after the
other, `--runs` times; medians, and CPU time with that of the processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import torch
from geometry import SIDE, make_processor
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_cli.batch.picture_loader import PictureLoader
from llava_cli.batch.tasks import Task
from llava_cli.conversation import Conversation, Picture
from llava_cli.engine.generate.prefetch import Prefetcher
from llava_cli.prompts.prompter import Prompter

SIZES = ((640, 480), (1600, 1200), (4032, 3024), (6016, 4016))
Way = Callable[[list[Path]], Iterator[torch.Tensor]]


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Soft shapes and some noise, which compress as a photo does."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (height // 48, width // 48, 3), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-8, 9, (height, width, 3), generator=generator, dtype=torch.int16)
    soft = Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(soft.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return Image.fromarray((pixels + noise).clamp(0, 255).to(torch.uint8).numpy())


def transformers_way() -> Way:
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_pad=True
    )

    def pixels(file: Path) -> torch.Tensor:
        with Image.open(file) as image:
            return torch.as_tensor(processor(image.convert("RGB"), return_tensors="pt")["pixel_values"])

    def way(files: list[Path]) -> Iterator[torch.Tensor]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            yield from threads.map(pixels, files)

    return way


def our_way(loader: PictureLoader) -> Way:
    prompter = Prompter(make_processor(), fit="pad")

    def prepared(files: list[Path]) -> Iterator[torch.Tensor]:
        tasks = [Task(str(file), "what is this?") for file in files]
        for _, picture in loader.load_all(tasks, prompter.image_processor.picture_resize):
            assert isinstance(picture, Picture), picture
            yield prompter.encode(Conversation().ask("what is this?", [picture]))["pixel_values"]

    def way(files: list[Path]) -> Iterator[torch.Tensor]:
        ahead = Prefetcher(prepared(files), 8)
        while not ahead.is_exhausted:
            if (pixels := ahead.get(1)) is not None:
                yield pixels

    return way


def cpu_seconds() -> float:
    """Of this process and those that it has."""
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [this, *this.children(recursive=True)])


def measured(way: Way, files: list[Path]) -> tuple[float, float]:
    """Seconds and CPU seconds a photo."""
    begin, cpu = time.perf_counter(), cpu_seconds()
    for _ in way(files):
        pass
    return (time.perf_counter() - begin) / len(files), (cpu_seconds() - cpu) / len(files)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, closing(PictureLoader()) as loader:
        ways = {"transformers": transformers_way(), "llava": our_way(loader)}
        for width, height in SIZES:
            files = [Path(folder, f"{width}-{number}.jpg") for number in range(args.photos)]
            for number, file in enumerate(files):
                photo(width, height, number % 4).save(file, quality=90)
            theirs, ours = (list(way(files[:4])) for way in ways.values())
            assert all(map(torch.equal, theirs, ours)), "the pixel values differ"
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(args.runs):
                for name, way in ways.items():
                    found[name].append(measured(way, files))
            for index, unit in enumerate(("s", "CPU s")):
                middle = {name: statistics.median(one[index] for one in results) for name, results in found.items()}
                ratios = sorted(
                    theirs[index] / ours[index]
                    for theirs, ours in zip(found["transformers"], found["llava"], strict=True)
                )
                words = ", ".join(f"{name} {seconds:.3f}" for name, seconds in middle.items())
                print(
                    f"{width}x{height}: {words} {unit} a photo; "
                    f"{statistics.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
