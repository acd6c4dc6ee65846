"""What `llava batch --dry-run` foretells, beside what the run takes: `python benchmarks/dry_run.py`.

Makes files of many kinds: drawings and photos' noise, 64 to 1,200 pixels wide, JPEG, PNG, WebP, GIF, BMP and
TIFF. Of a hundred, three are cut off, two are no pictures, and four have the bytes of another one. Then a dry run and
the run itself, in turn, each a process: the seconds from start to end, and the most bytes that the process and those
that it has started have had resident. `--model FOLDER --precision 4bit --files 150` asks another model, with questions
of three lengths and answers of 4 to 48 tokens.

Beside other work, a run gets less of the processors than its dry run did, or more. What each got is known from its CPU
time, and the ratio is also told as if both had got the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "builtin"))
from scenes import draw, random_scene

FORMATS = {"jpg": 50, "png": 25, "webp": 10, "gif": 5, "bmp": 5, "tif": 5}
"""How many of a hundred files are of each."""
QUESTIONS = (
    "what is this?",
    "how many shapes are in the picture?",
    "describe what you see, shape by shape, and say where",
)


def picture(rng: Random) -> Image.Image:
    """A drawing, or noise on a coarse pattern as of a photo; sizes are spread evenly by their logarithm."""
    width = round(math.exp(rng.uniform(math.log(64), math.log(1200))))
    height = max(48, round(width * rng.uniform(0.6, 1.0)))
    if rng.random() < 0.7:
        return draw(random_scene(rng), rng).convert("RGB").resize((width, height))
    noise = np.random.default_rng(rng.randrange(2**32))
    coarse = Image.fromarray(noise.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((width, height))
    grain = noise.integers(-12, 12, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def make(folder: Path, count: int, seed: int = 1) -> None:
    """Writes the files; which are of which kind is by chance, so that neighbors differ."""
    rng, kinds = Random(seed), list(FORMATS)
    names: list[Path] = []
    for number in range(count):
        kind = rng.choices(kinds, list(FORMATS.values()))[0]
        name = folder / f"{number % 7}" / f"{number:05d}.{kind}"
        name.parent.mkdir(parents=True, exist_ok=True)
        chance = rng.random()
        if chance < 0.04 and names:
            shutil.copy(rng.choice(names), name.with_suffix(names[-1].suffix))
        elif chance < 0.06:
            name.write_bytes(rng.randbytes(rng.randrange(1, 5000)))
        else:
            picture(rng).save(name, quality=85, compress_level=1, method=0)
            if chance < 0.09:
                name.write_bytes(name.read_bytes()[: name.stat().st_size // 2])
            else:
                names.append(name)


def questions(folder: Path, count: int, seed: int = 2) -> Path:
    """A file of questions of three lengths, with answers of several."""
    rng, path = Random(seed), folder / "questions.jsonl"
    names = sorted(str(name.relative_to(folder)) for name in folder.rglob("*.*") if name.suffix != ".jsonl")
    with path.open("w") as file:
        for name in names[:: max(1, len(names) // count)][:count]:
            row = {"image": name, "question": rng.choice(QUESTIONS), "max_tokens": rng.choice((4, 12, 48))}
            file.write(json.dumps(row) + "\n")
    return path


def peaks(process: psutil.Popen) -> tuple[int, int]:
    """The peaks of a process and, in sum, of those that it has started and that still run."""
    ours, children = 0, 0
    try:
        for one in (process, *process.children()):
            status = Path(f"/proc/{one.pid}/status").read_text()
            peak = sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))
            ours, children = (peak, children) if one is process else (ours, children + peak)
    except (OSError, psutil.Error):
        pass  # it has just ended
    return ours, children


@dataclass
class Ran:
    """A process that has ended."""

    seconds: float
    cpu_seconds: float
    """Its own and of those that it has started."""
    peak: int
    peak_of_children: int
    printed: str


def run(words: list[str]) -> Ran:
    begin, before = time.monotonic(), os.times()
    command = [sys.executable, "-m", "llava_cli", "batch", *words]
    with tempfile.TemporaryFile("w+") as printed:
        process = psutil.Popen(command, stdout=printed)
        ours = children = 0
        while process.poll() is None:
            one, others = peaks(process)
            ours, children = max(ours, one), max(children, others)
            time.sleep(0.05)
        seconds, after = time.monotonic() - begin, os.times()
        printed.seek(0)
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return Ran(seconds, cpu, ours, children, printed.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="of files that were made before, or where to keep them")
    parser.add_argument("--model")
    parser.add_argument("--precision")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = args.folder or folder / "files"
        if not files.is_dir():
            make(files, args.files)
        if args.model:
            source = [str(questions(files, args.files)), "-m", args.model, "--precision", args.precision]
        else:
            source = [str(files), QUESTIONS[0], "-m", "builtin"]
        if args.model:  # makes the quantized copy
            run([*source, "-q", "--dry-run"])
        for number in range(args.runs):
            dry = run([*source, "-q", "--dry-run", "--json"])
            real = run([*source, "-q", "-o", str(folder / f"{number}.jsonl")])
            show(dry, real)


def show(dry: Ran, real: Ran) -> None:
    told = json.loads(dry.printed)
    seconds, sample, size = told["seconds"]["total"], told["sample"], told["bytes"]
    shares = [ran.cpu_seconds / ran.seconds for ran in (dry, real)]
    told_bytes, real_bytes = size["process"] + size["picture_processes"], real.peak + real.peak_of_children
    print(f"{told['rows']} rows, {told['answerable']} of them answerable; {told['doubles']['pictures']} doubles")
    print(f"  dry run: {dry.seconds:.1f} s; {sample['rows']} rows answered in {sample['seconds']:.1f} s")
    print(f"  seconds: told {seconds:.1f} {told['seconds']}, was {real.seconds:.1f}: {seconds / real.seconds:.2f}")
    print(f"  processors: {shares[0]:.2f}, {shares[1]:.2f}: {seconds / real.seconds * shares[0] / shares[1]:.2f}")
    print(f"  MB: told {told_bytes >> 20} ({size['process'] >> 20} + {size['picture_processes'] >> 20})", end="")
    print(f", was {real_bytes >> 20} ({real.peak >> 20} + {real.peak_of_children >> 20})", end="")
    print(f": {told_bytes / real_bytes:.2f}", flush=True)


if __name__ == "__main__":
    main()
