"""What goes through a sandbox's pipes: 8 bytes of length, little-endian, and so many bytes."""

from __future__ import annotations

from typing import BinaryIO

_LENGTH = 8


def send(pipe: BinaryIO, *parts: bytes) -> None:
    """One message, of the bytes of several parts."""
    pipe.write(sum(len(part) for part in parts).to_bytes(_LENGTH, "little"))
    for part in parts:
        pipe.write(part)
    pipe.flush()


def receive(pipe: BinaryIO, most: int) -> bytearray:
    """One message. Raises `EOFError` where it breaks off, there is none, or it is longer than `most`."""
    head = pipe.read(_LENGTH)
    length = int.from_bytes(head, "little")
    if len(head) < _LENGTH or length > most:
        raise EOFError
    data = bytearray(length)
    view = memoryview(data)
    while view:
        if not (count := pipe.readinto(view)):  # type: ignore[attr-defined]  # of a buffered reader's
            raise EOFError
        view = view[count:]
    return data
