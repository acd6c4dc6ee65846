"""Keeps what libraries have to say of their own accord off the user's terminal."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Within, transformers and bitsandbytes show no warnings and no progress bars."""
    from transformers.utils import logging as log

    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    noisy = logging.getLogger("bitsandbytes")
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(before)
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
