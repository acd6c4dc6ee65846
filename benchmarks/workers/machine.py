"""What this machine can do at most: matrix products and reading memory, to hold the figures against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from work import Figures, serve


class Machine:
    def __init__(self, options: dict[str, Any]) -> None:
        """A product of a layer of 7B geometry, 160 tokens; a GB to read."""
        self.x, self.w = torch.randn(160, 4096), torch.randn(11008, 4096)
        self.much = torch.ones(1 << 28)

    def first(self) -> None:
        self.limits()

    def limits(self) -> Figures:
        work = 2 * self.x.numel() * len(self.w) / 1e9
        x16, w16 = self.x.bfloat16(), self.w.bfloat16()
        x8, w8 = (torch.randint(-99, 99, part.shape, dtype=torch.int8) for part in (self.x, self.w))
        return {
            "fp32 GFLOP/s": work / best(lambda: torch.nn.functional.linear(self.x, self.w)),
            "bf16 GFLOP/s": work / best(lambda: torch.nn.functional.linear(x16, w16)),
            "int8 GOP/s": work / best(lambda: torch._int_mm(x8, w8.t())),
            "read GB/s": self.much.nbytes / 1e9 / best(self.much.sum),
        }


def best(do: Callable[[], object]) -> float:
    """Seconds, of five times, or of fewer where a CPU without the instructions takes longer than 2 for them."""
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < 2:
        begin = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


if __name__ == "__main__":
    serve(Machine)
