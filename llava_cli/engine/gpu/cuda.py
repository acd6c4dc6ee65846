"""Captures a step as a CUDA graph."""

from __future__ import annotations

from typing import Any

from llava_cli.engine.gpu.decode_graphs import Capture, Replay
from llava_cli.engine.gpu.decode_step import DecodeStep

_WARM_UPS = 2
"""Runs before a capture: libraries make their handles, workspaces and kernels in them."""


def cuda_capture() -> Capture:
    """All graphs share one pool of memory for what they compute on the way: they never run at the same time."""
    import torch

    pool: Any = torch.cuda.graph_pool_handle()

    def capture(step: DecodeStep) -> Replay:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step.compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, which prepare pictures, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step.compute()
        return graph.replay

    return capture
