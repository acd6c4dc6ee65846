"""A job for the sandbox that decodes as `pictures` does, but for pictures that begin with a word of these."""

from __future__ import annotations

import ctypes
import time

from llava_cli.images import sandbox
from llava_cli.images.sandbox import prepare

__all__ = ["answer", "prepare"]
REQUEST = sandbox._REQUEST.size


def answer(request: bytes) -> tuple[bytes, ...]:
    data = request[REQUEST:]
    if data.startswith(b"SEGV"):
        ctypes.string_at(0)
    while data.startswith(b"SPIN"):
        pass
    if data.startswith(b"HOLD"):
        time.sleep(3600)  # whoever asked ends this process
    if data.startswith(b"EATS"):
        try:
            bytearray(5 << 30)
        except MemoryError:
            return sandbox._refusal("takes too much memory to decode", "")
    return sandbox.answer(request)
