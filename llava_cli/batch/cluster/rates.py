"""How fast the nodes of a cluster answer."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator

from llava_cli.batch.cluster.worker import Progress

_SECONDS = 30.0
"""Over which a rate is taken."""


class Rates:
    """What the workers have done, and when; those that are gone count, too."""

    def __init__(self) -> None:
        self._progress: dict[object, Progress] = {}
        self._node_of: dict[object, str] = {}
        self._history: deque[tuple[float, Counter[str]]] = deque([(time.monotonic(), Counter())])

    def add(self, worker: object, node: str, progress: Progress) -> None:
        self._progress[worker], self._node_of[worker] = progress, node

    @property
    def total(self) -> Progress:
        return Progress(
            *(sum(getattr(one, name) for one in self._progress.values()) for name in Progress.__dataclass_fields__)
        )

    def of_nodes(self, workers: Counter[str]) -> Iterator[tuple[str, int, float]]:
        """Each node that has so many workers now: its name, their number, pictures/s."""
        now, pictures = time.monotonic(), Counter[str]()
        for worker, progress in self._progress.items():
            pictures[self._node_of[worker]] += progress.pictures
        self._history.append((now, pictures))
        while len(self._history) > 2 and now - self._history[1][0] > _SECONDS:
            self._history.popleft()
        begin, before = self._history[0]
        for node, count in sorted(workers.items()):
            yield node, count, (pictures[node] - before[node]) / max(now - begin, 1e-6)
