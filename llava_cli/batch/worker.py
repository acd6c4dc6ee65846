"""A process that opens pictures for another one: where a decoder crashes, hangs or eats memory, this one goes.

python -m llava_cli.batch.worker DESCRIPTOR
"""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from llava_cli.errors import BadImage, LlavaError, printable
from llava_cli.images import open_picture

MEMORY = 4 * 2**30
SECONDS = 60
"""Of computing that one picture may take."""


def main() -> None:
    _limit(resource.RLIMIT_AS, MEMORY)
    asked = Connection(int(sys.argv[1]))
    with suppress(EOFError, OSError):  # whoever asked is gone
        while True:
            path, options = asked.recv()
            _limit(resource.RLIMIT_CPU, int(time.process_time()) + SECONDS)
            asked.send(_opened(path, **options))


def _opened(path: str, shrink: int | None = None, **options: bool) -> tuple[Any, ...]:
    """What a picture is made of, or the class, thing, reason and hint of the error."""
    try:
        picture = open_picture(path, **options)
        if shrink:  # here, for a large picture takes long to send
            picture.image.thumbnail((shrink, shrink))
    except LlavaError as error:
        return type(error), error.thing, error.reason, error.hint
    except MemoryError:
        return BadImage, printable(path), "takes too much memory", ""
    return replace(picture, image=None), picture.image.size, picture.image.tobytes()  # type: ignore[arg-type]


def _limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
