"""A sandbox job that decodes pictures, and misbehaves for data that begins with SEGV, SPIN, HOLD or EATS."""

from __future__ import annotations

import ctypes
import time

from llava_cli.images import job as sandbox
from llava_cli.images.job import prepare

__all__ = ["answer", "prepare"]
HEADER = sandbox.REQUEST.size


def answer(request: bytes) -> tuple[bytes, ...]:
    data = request[HEADER:]
    if data.startswith(b"SEGV"):
        ctypes.string_at(0)
    while data.startswith(b"SPIN"):
        pass
    if data.startswith(b"HOLD"):
        time.sleep(3600)  # until the parent kills this process
    if data.startswith(b"EATS"):
        try:
            bytearray(5 << 30)
        except MemoryError:
            return sandbox.refusal("takes too much memory to decode")
    return sandbox.answer(request)
