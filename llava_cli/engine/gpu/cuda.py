"""Captures a step as a CUDA graph."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from llava_cli.engine.gpu.decode_graphs import Capture, Replay
from llava_cli.engine.gpu.decode_step import DecodeStep

_WARM_UPS = 2
"""Runs before a capture: libraries make their handles, workspaces and kernels in them."""


def cuda_capture() -> Capture:
    """All graphs share one pool of memory for what they compute on the way: they never run at the same time.

    torch reuses that memory within a stream, so all are captured on the same one. A pool ends with its last graph,
    and its handle is refused from then on.
    """
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graphs: WeakSet[Any] = WeakSet()
    pool: Any = None
    failed: list[Any] = []

    def capture(step: DecodeStep) -> Replay:
        nonlocal pool
        usual = torch.cuda.current_stream()
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step.compute()
        usual.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if not graphs:
            pool = torch.cuda.graph_pool_handle()
        try:
            # Other threads, which prepare pictures, may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                step.compute()
        except BaseException:
            failed.append(graph)  # torch's allocator keeps a reference to one whose capture it could not end
            raise
        finally:
            torch.cuda.set_stream(usual)  # which torch itself does not where it cannot end a capture
        graphs.add(graph)
        return graph.replay

    return capture
