"""How far the workers of a cluster are, and how fast its nodes are now."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

from llava_cli.render import NodeProgress, Progress

WINDOW_SECONDS = 30.0
"""Over which a rate is taken, or longer, until there are `_LEAST_COUNT` in it."""
_LEAST_COUNT = 10
_SAMPLE_SECONDS = 1.0
_MOST_SAMPLES = 600


class Counts(NamedTuple):
    """What a worker has done since it started."""

    rows: int = 0
    failed: int = 0
    pictures: int = 0
    tokens: int = 0


class ClusterProgress:
    """Sums up what workers report. Another thread may read it meanwhile."""

    def __init__(self, before: int, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`before` of the `total` rows were answered before."""
        self._before, self._total, self._clock = before, total, clock
        self._lock = threading.Lock()
        self._begin = clock()
        self._sums = Counts()
        """Of all workers, also of those that are gone: what they have answered stays."""
        self._node_of: dict[object, str] = {}
        self._counts: dict[object, Counts] = {}
        self._pictures = Counter[str]()
        self._rates: dict[str, _Rate] = {}
        self._tokens = _Rate(self._begin, 0)

    def joined(self, worker: object, node: str) -> None:
        """A worker is ready."""
        with self._lock:
            if not self._rates:
                self._tokens = _Rate(self._clock(), self._sums.tokens)
            self._node_of[worker], self._counts[worker] = node, Counts()
            self._rates.setdefault(node, _Rate(self._clock(), self._pictures[node]))

    def report(self, worker: object, counts: Counts) -> None:
        """What a worker has done so far; nothing is heard of those that have left."""
        with self._lock:
            if worker not in self._counts:
                return
            before = self._counts[worker]
            counts = self._counts[worker] = Counts(*map(max, counts, before))  # reports may come out of order
            self._sums = Counts(*(old + new - was for old, new, was in zip(self._sums, counts, before, strict=True)))
            self._pictures[self._node_of[worker]] += counts.pictures - before.pictures

    def left(self, worker: object) -> None:
        """A worker is gone, whether it had joined or not."""
        with self._lock:
            self._counts.pop(worker, None)
            node = self._node_of.pop(worker, None)
            if node is not None and node not in self._node_of.values():
                del self._rates[node]

    def end(self) -> None:
        """All rows are there, also those that dead workers have left and not told."""
        with self._lock:
            self._before = self._total

    def read(self) -> Progress:
        """The progress, with the rates of now."""
        with self._lock:
            now, workers = self._clock(), Counter(self._node_of.values())
            nodes = tuple(
                NodeProgress(name, workers[name], rate.at(now, self._pictures[name]))
                for name, rate in sorted(self._rates.items())
            )
            rows = min(self._before + self._sums.rows, self._total)  # those of a worker that lost them count twice
            pictures_rate = sum(node.pictures_per_second for node in nodes)
            tokens_rate = self._tokens.at(now, self._sums.tokens)
            return Progress(rows, *self._sums[1:], pictures_rate, tokens_rate, now - self._begin, nodes)

    def speed(self) -> str:
        """A line about the whole run."""
        seconds = max(self._clock() - self._begin, 1e-6)
        rates = f"{self._sums.pictures / seconds:.1f} pictures/s · {self._sums.tokens / seconds:.1f} tokens/s"
        return f"{rates} · {seconds:.1f} s"


class _Rate:
    """How fast a count grows, from samples of it."""

    def __init__(self, now: float, count: int) -> None:
        self._samples = deque([(now, count)], maxlen=_MOST_SAMPLES)

    def at(self, now: float, count: int) -> float:
        """By how much it has grown lately, a second."""
        samples = self._samples
        if now - samples[-1][0] >= _SAMPLE_SECONDS:
            samples.append((now, count))
        while len(samples) > 1 and now - samples[1][0] >= WINDOW_SECONDS and count - samples[1][1] >= _LEAST_COUNT:
            samples.popleft()
        begin, before = samples[0]
        return (count - before) / max(now - begin, _SAMPLE_SECONDS)
