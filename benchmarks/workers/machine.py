"""What this machine can do at most: matrix products and reading memory, to hold the figures against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from work import Figures, serve


class Machine:
    def __init__(self, options: dict[str, Any]) -> None:
        """A product of 7B geometry, 600 tokens; a GB to read."""
        self.x, self.w = torch.randn(600, 4096).bfloat16(), torch.randn(11008, 4096).bfloat16()
        self.x8, self.w8 = (torch.randint(-99, 99, t.shape, dtype=torch.int8) for t in (self.x, self.w))
        self.much = torch.ones(1 << 28)

    def first(self) -> None:
        self.limits()

    def limits(self) -> Figures:
        work = 2 * self.x.numel() * len(self.w) / 1e9
        return {
            "bf16 GFLOP/s": work / best(lambda: torch.nn.functional.linear(self.x, self.w)),
            "int8 GOP/s": work / best(lambda: torch._int_mm(self.x8, self.w8.t())),
            "read GB/s": self.much.nbytes / 1e9 / best(self.much.sum),
        }


def best(do: Callable[[], object]) -> float:
    """Seconds, of five times."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


if __name__ == "__main__":
    serve(Machine)
