"""Hostile input at every boundary: `python benchmarks/fuzz.py`. 20,000 inputs, a quarter of an hour on two cores.

Each boundary of `tests/fuzzing.py` has a process of its own with limited memory, which is ended where one input takes
too long; two run at a time, but those with a server alone, for it is measured how fast that answers meanwhile. Prints
what came of the inputs, and ends with 1 where anything came that must not: an exception that is none of the product's,
a process that died or hung, or one that grew. Such an input is kept in a file.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers import fuzzing
from helpers.fuzzing import BOUNDARIES, Boundary, Footprint, Served, attempt, inputs

SHARES: dict[type[Boundary], float] = {
    fuzzing.Requests: 0.1,
    fuzzing.Heads: 0.075,
    fuzzing.Pictures: 0.15,
    fuzzing.Films: 0.05,
    fuzzing.Headers: 0.125,
    fuzzing.Checkpoints: 0.05,
    fuzzing.Tokenizers: 0.075,
    fuzzing.Templates: 0.125,
    fuzzing.Answers: 0.1,
    fuzzing.OtherServers: 0.05,
    fuzzing.Rows: 0.05,
    fuzzing.Texts: 0.05,
}
"""Of all inputs: more where one costs little."""
MEMORY = 12 << 30
"""Bytes of address space of a boundary's process: what would take more is an error there, and no end of the machine."""
HEALTH_SECONDS = 0.3
"""In which a server answers /health, whatever it is asked; plus what the machine keeps the watcher itself waiting."""
TIMES = 10
"""It is looked at so often whether a process grows, and ended if it does."""
DEATHS = 5
"""After so many a boundary is given up."""
SHOWN = 5
"""Violations of a boundary that are printed."""


@dataclass
class Tally:
    """What came of a boundary's inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, int] = 0.0, -1
    """Its seconds and its number."""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


def fuzz(kind: type[Boundary], seed: int, count: int, kept: Path) -> Tally:
    """Tries all inputs of a boundary; a process that died is followed by another one, from the next input on."""
    tally, begin, first, deaths = Tally(), time.perf_counter(), 0, 0
    while first < count and deaths < DEATHS:
        receiving, sending = get_context("spawn").Pipe(duplex=False)
        numbers = range(first, count)
        process = get_context("spawn").Process(target=work, args=(kind, seed, numbers, kept, sending))
        process.start()
        sending.close()
        first = collect(receiving, tally, first)
        process.join()
        if process.exitcode == 0:
            break
        tally.violations.append(f"{kept_file(kept, kind, first)}: its process ended with {process.exitcode}")
        first, deaths = first + 1, deaths + 1
    tally.seconds = time.perf_counter() - begin
    return tally


def collect(receiving: Connection, tally: Tally, first: int) -> int:
    """Takes in what a process tells until it ends; the number of the input that it did not get done."""
    while True:
        try:
            name, value = receiving.recv()
        except EOFError:
            return first
        if name == "outcome":
            word, seconds = value
            tally.outcomes[word] += 1
            tally.slowest = max(tally.slowest, (seconds, first))
            first += 1
        else:
            getattr(tally, name).append(value)


def kept_file(kept: Path, kind: type[Boundary], number: int) -> Path:
    return kept / f"{kind.__name__}-{number}"


def work(kind: type[Boundary], seed: int, numbers: range, kept: Path, told: Connection) -> None:
    """Tries inputs in this process, and tells of each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(dir=kept) as folder:
        boundary = kind(Path(folder))
        try:
            before: list[Footprint] = []
            looked_at = set(numbers[len(numbers) // TIMES :: len(numbers) // TIMES + 1])
            for number, data in inputs(boundary, seed, numbers):
                if number in looked_at:
                    before = before or footprints(boundary)  # what is loaded once is there by now
                    if grown(before, footprints(boundary)):
                        break
                (file := kept_file(kept, kind, number)).write_bytes(data)
                faulthandler.dump_traceback_later(kind.seconds + 1, exit=True)
                begin, word = time.perf_counter(), "violation"
                try:
                    word = attempt(boundary, data)
                    file.unlink()
                except AssertionError as error:
                    told.send(("violations", f"{file}: {error}\n{where(error)}"))
                told.send(("outcome", (word, time.perf_counter() - begin)))
            faulthandler.cancel_dump_traceback_later()
            finish(boundary, before, told)
        finally:
            boundary.close()


def footprints(boundary: Boundary) -> list[Footprint]:
    return [Footprint.of(pid) for pid in boundary.processes()]


def grown(before: list[Footprint], now: list[Footprint]) -> list[str]:
    return [words for old, new in zip(before, now, strict=True) for words in old.growth(new)]


def finish(boundary: Boundary, before: list[Footprint], told: Connection) -> None:
    """Tells what grew, and what else was measured."""
    now = footprints(boundary)
    for words in grown(before, now):
        told.send(("violations", words))
    for old, new in zip(before, now, strict=True):
        told.send(("notes", f"{old.memory / 1e6:.0f} MB, in the end {new.memory / 1e6:.0f}"))
    for note in boundary.notes():
        told.send(("notes", note))
    if isinstance(boundary, Served) and boundary.slowest > HEALTH_SECONDS + boundary.late:
        told.send(("violations", f"/health took {boundary.slowest:.3f} s"))


def where(error: BaseException) -> str:
    """The last steps to what was raised first."""
    return "".join(traceback.format_exception(error.__cause__ or error, limit=-4))[:3000]


def show(kind: type[Boundary], tally: Tally) -> None:
    seconds, number = tally.slowest
    speed = f"{seconds:.2f} (input {number}) | {tally.seconds:.0f}"
    print(f"| {kind.name} | {sum(tally.outcomes.values())} | {speed} | {len(tally.violations)} |", flush=True)


def show_all(kind: type[Boundary], tally: Tally) -> None:
    outcomes = ", ".join(f"{number} {word}" for word, number in tally.outcomes.most_common(8))
    print(f"\n{kind.name}: {outcomes}", *tally.notes, *tally.violations[:SHOWN], sep="\n  ")


def live_in(folder: Path) -> None:
    """Makes sure that nothing of this user's is read or changed, and nothing fetched."""
    for name in [name for name in os.environ if name.startswith(("LLAVA_", "HF_"))]:
        del os.environ[name]
    os.environ |= {"HOME": str(folder), "HF_HOME": str(folder / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    os.environ |= {f"LLAVA_{name}": str(folder / name.lower()) for name in ("CONFIG", "DATA", "CACHE", "SOCKET")}


def main() -> None:
    names = [kind.name for kind in BOUNDARIES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=names, metavar="BOUNDARY", help=f"one of them: {', '.join(names)}")
    args = parser.parse_args()
    kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
    live_in(kept)
    kinds = [kind for kind in BOUNDARIES if args.only in (None, kind.name)]
    tallies: dict[type[Boundary], Tally] = {}

    def run(kind: type[Boundary]) -> None:
        count = args.inputs if args.only else round(args.inputs * SHARES[kind])
        tallies[kind] = fuzz(kind, args.seed, count, kept)
        show(kind, tallies[kind])

    print("| boundary | inputs | slowest, s | all, s | violations |\n|---|---|---|---|---|", flush=True)
    for kind in kinds:
        if issubclass(kind, Served):
            run(kind)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, (kind for kind in kinds if not issubclass(kind, Served))))
    for kind in kinds:
        show_all(kind, tallies[kind])
    if any(tally.violations for tally in tallies.values()):
        sys.exit(1)
    shutil.rmtree(kept)


if __name__ == "__main__":
    main()
