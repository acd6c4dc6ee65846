"""This tool beside its peers, on the same work in the same run: `python benchmarks/speed.py`. Prints Markdown.

The work: LLaVA-1.5's geometry with random weights (CLIP-L/336, a decoder of 1B or 7B), one picture, 576 image and 44
text tokens, 64 answer tokens, greedy, no end token. Each contender is a process with two threads that loads once and
does each piece of work once to warm up; then, run by run, a piece of work is done by all of them in turn before the
next piece comes; those whose turn it is not sleep. Figures are medians, in brackets the median of what a run's figure
is to the first contender's in the same run. A cold start is a process started for it, before the others are there:
from its start to the first token of an answer about the picture.

llama.cpp has the decoder alone, and a prompt of 620 tokens: to a decoder a picture's tokens are tokens like others.
Of OpenVINO's time to the first token, what it calls preparing embeddings is the vision tower's. "chat" is the time to
the first token of a conversation's third turn. "batch" is four pictures with answers of 32 tokens, at once where a
contender can do that, else one after another.

At 7B what is larger than 4 bits a weight is left out, and so is transformers, which takes 19 GB for its 4: the others
fit at once, and alternate. `--only` names who else should be there.

Times say little while other processes are busy. Work during which they took more than a tenth of the machine is done
again, for up to `--patience` seconds; what they took all the same is said below the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil
from peers import CONTENDERS, WORKERS, Contender, picture
from platformdirs import user_cache_path

sys.path.insert(0, str(WORKERS))
from work import THREADS, Figures

WORK = ("vision", "prefill", "answer", "chat", "batch")
COLUMNS = {
    "cold": ("cold start, s", 1),
    "load": ("of it until loaded, s", 1),
    "first": ("first token, s", 2),
    "vision": ("of it vision, s", 2),
    "chat": ("chat, turn 3, s", 2),
    "prefill": ("prefill, tokens/s", 0),
    "decode": ("decode, tokens/s", 1),
    "batch": ("batch, pictures/s", 2),
    "memory": ("peak memory, GB", 1),
}
BUSY = 0.1
"""The share of the machine that others may take while something is measured."""

Results = dict[str, dict[str, list[float]]]
"""Contender -> figure -> its value in each run."""


class Worker:
    """A contender's process."""

    def __init__(self, python: Path, script: str, **options: str) -> None:
        told = json.dumps({**options, "started": time.time()})
        self.process = subprocess.Popen(
            [python, WORKERS / script, told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("LLAVA_DEBUG") else subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
        )
        self.began = self._hear()

    def do(self, work: str) -> Figures:
        assert self.process.stdin
        print(work, file=self.process.stdin, flush=True)
        return self._hear()

    def end(self) -> Figures:
        """Ends it: what it said when it began."""
        self.process.kill()
        self.process.communicate()
        return self.began

    def _hear(self) -> Figures:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise RuntimeError("a worker ended by itself; LLAVA_DEBUG=1 shows why")
        figures: Figures = json.loads(line)
        return figures


def quietly(do: Callable[[], Figures], patience: float) -> Figures:
    """The figures of work that others did not disturb, or of the last attempt; "others" is what they took."""
    until = time.monotonic() + patience
    while True:
        begin, before = time.monotonic(), _others()
        figures = do()
        taken = (_others() - before) / (time.monotonic() - begin) / (psutil.cpu_count() or 1)
        if taken <= BUSY or time.monotonic() > until:
            return {**figures, "others": max(0.0, taken)}


def _others() -> float:
    """Seconds that all processors have worked for others than this process and its children, dead or alive."""
    times, me = psutil.cpu_times(), psutil.Process()
    busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
    living = sum(sum(child.cpu_times()[:2]) for child in me.children())
    return float(busy - sum(me.cpu_times()[:4]) - living)


def ready(contenders: list[Contender], cache: Path, size: str) -> dict[str, Callable[[], Worker]]:
    """How to start each contender that can be had here."""
    found: dict[str, Callable[[], Worker]] = {}
    asked = str(picture(cache))

    def starter(script: str, python: Path, model: Path, precision: str) -> Callable[[], Worker]:
        return lambda: Worker(python, script, model=str(model), precision=precision, picture=asked)

    for one in contenders:
        try:
            found[one.name] = starter(one.script, one.python(cache), one.model(cache, size), one.precision)
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{one.name} is left out: {error}", file=sys.stderr)
    return found


def measure(
    starts: Mapping[str, Callable[[], Worker]], pieces: Sequence[str], runs: int, cold: int, patience: float
) -> Results:
    results: Results = defaultdict(lambda: defaultdict(list))

    def keep(name: str, figures: Figures) -> None:
        for figure, value in figures.items():
            results[name][figure].append(value)
        print(name, {figure: round(value, 3) for figure, value in figures.items()}, file=sys.stderr, flush=True)

    for _ in range(cold):
        for name, start in starts.items():
            keep(name, quietly(partial(_once, start), patience))
    workers = {name: start() for name, start in starts.items()}
    # The first pass is slow, and shows who does what.
    able = {work: [name for name, worker in workers.items() if len(worker.do(work)) > 1] for work in pieces}
    for _ in range(runs):
        for work in pieces:
            for name in able[work]:
                keep(name, quietly(partial(workers[name].do, work), patience))
    for worker in workers.values():
        worker.end()
    return results


def _once(start: Callable[[], Worker]) -> Figures:
    return start().end()


def table(results: Results) -> str:
    """A line a contender, a column a figure."""
    lines = [f"| | {' | '.join(title for title, _ in COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    first = next(iter(results.values()))
    for name, its in results.items():
        cells = [_cell(figure, its.get(figure), first.get(figure), its is first) for figure in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    taken = [share for its in results.values() for share in its["others"]]
    lines.append(
        f"\nOther processes took {statistics.median(taken):.0%} of the machine (median), at most {max(taken):.0%}."
    )
    return "\n".join(lines)


def _cell(figure: str, its: list[float] | None, first: list[float] | None, alone: bool) -> str:
    if not its:
        return "-"
    if figure == "memory":
        its, first = [max(its)], [max(first or its)]
    value = f"{statistics.median(its):.{COLUMNS[figure][1]}f}"
    if alone or not first:
        return value
    return f"{value} ({statistics.median(a / b for a, b in zip(its, first, strict=True)):.2f})"


def machine() -> Figures:
    worker = Worker(Path(sys.executable), "machine.py")
    limits = worker.do("limits")
    worker.end()
    return limits


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")


def about(limits: list[Figures], contenders: list[Contender], cache: Path) -> str:
    """What it ran on, and what of."""
    packages = {package: one.python(cache) for one in contenders for package in one.packages}
    ask = "import sys, importlib.metadata as m; print(m.version(sys.argv[1]))"
    versions = [
        f"{package} {subprocess.check_output([python, '-c', ask, package], text=True).strip()}"
        for package, python in packages.items()
    ]
    most = [f"{' to '.join(f'{one[name]:.0f}' for one in limits)} {name}" for name in limits[0] if name != "memory"]
    return (
        f"{processor()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"Python {platform.python_version()}, {', '.join(versions)}. At most {', '.join(most)} (before to after)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1B", choices=["1B", "7B"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", type=int, help="cold starts of each; as many as runs at 1B, else 1")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(one.name for one in CONTENDERS))
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK, help="only these pieces of work")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--cache", type=Path, default=user_cache_path("llava-benchmarks"))
    parser.add_argument("--out", type=Path, help="a file to append the section to")
    args = parser.parse_args()
    cache = args.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    wanted = [one for one in CONTENDERS if (one.name in args.only if args.only else args.size in one.sizes)]
    starts = ready(wanted, cache, args.size)
    cold = args.cold if args.cold is not None else args.runs if args.size == "1B" else 1
    before = machine()
    results = measure(starts, args.work, args.runs, cold, args.patience)
    own = [one for one in wanted if one.name in starts]
    head = f"## {args.size}, {time.strftime('%Y-%m-%d')}: {args.runs} runs, {cold} cold starts"
    text = f"{head}\n\n{about([before, machine()], own, cache)}\n\n{table(results)}\n"
    print(text)
    if args.out:
        with args.out.open("a") as file:
            file.write(f"\n{text}")


if __name__ == "__main__":
    main()
