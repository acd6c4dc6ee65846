"""Messages through a sandbox's pipes: 8 bytes of length, little-endian, then the content."""

from __future__ import annotations

from typing import BinaryIO

_LENGTH_BYTES = 8


def send(pipe: BinaryIO, *parts: bytes) -> None:
    """Sends one message with the bytes of all parts."""
    pipe.write(sum(len(part) for part in parts).to_bytes(_LENGTH_BYTES, "little"))
    for part in parts:
        pipe.write(part)
    pipe.flush()


def receive(pipe: BinaryIO, most: int) -> bytearray:
    """Receives one message. Raises `EOFError` if there is none, it is incomplete, or longer than `most` bytes."""
    prefix = pipe.read(_LENGTH_BYTES)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _LENGTH_BYTES or length > most:
        raise EOFError
    data = bytearray(length)
    view = memoryview(data)
    while view:
        if not (count := pipe.readinto(view)):  # type: ignore[attr-defined]  # of a buffered reader
            raise EOFError
        view = view[count:]
    return data
