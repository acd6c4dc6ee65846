"""The sandboxed job for the forms of answers that a stranger asks for: compiling a schema, regex or grammar.

Some take the compiler minutes, or all of its stack. Each is compiled here first, within limits, and if that succeeds in
the process that answers; the same work takes hardly more there. A request is an option's key, a space and its text; a
reply is empty, or the reason for a refusal as UTF-8.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import lru_cache
from importlib import import_module

from llava_cli import limits
from llava_cli.engine.generate import constraint
from llava_cli.engine.generate.constraint import COMPILED, HINTS, check_text
from llava_cli.errors import SandboxUnavailable, UsageError
from llava_cli.sandbox.process import Worker, WorkerDied, WorkerLate
from llava_cli.settings import Option, Sampling

_REASON_BYTES = 100_000


class FormSandbox:
    """A process that compiles forms; threads take turns. It starts with the first form."""

    def __init__(self) -> None:
        self._worker = Worker(__name__, limits.FORM_MEMORY)
        self._lock = threading.Lock()
        self._compile_once = lru_cache(COMPILED)(self._compile)

    def check(self, option: Option, text: str) -> None:
        """Compiles the text of an option.

        Raises `UsageError` if it cannot be kept, or not within the limits, and `SandboxUnavailable`.
        """
        try:
            with self._lock:
                reason = self._compile_once(option.key, text)
        except WorkerLate as error:
            reason = f"takes longer than {error} s to compile"
        except WorkerDied as error:
            if problem := str(error):
                raise SandboxUnavailable(
                    "the sandbox for forms", problem, "the same command may succeed later"
                ) from None
            reason = "too large or too deep to compile"
        if reason:
            raise UsageError(option.flag, reason, HINTS[option.key])

    def fits(self, sampling: Sampling, text: str) -> bool:
        """Whether a text has the form that its answers must have. Raises as `check` does."""
        if option := sampling.grammar_option:
            self.check(option, getattr(sampling, option.key))
        return constraint.fits(sampling, text)

    def close(self) -> None:
        """Kills the process."""
        self._worker.end()

    def _compile(self, key: str, text: str) -> str:
        """The compiler's reason to refuse it; empty if it does not.

        Raises `WorkerLate` or `WorkerDied`, which are not remembered: they may be due to what else the machine does.
        """
        reason = self._worker.ask((f"{key} {text}".encode(),), _REASON_BYTES, limits.FORM_SECONDS)
        return reason.decode("utf-8", "replace")


# Below: inside the sandbox.


def prepare() -> None:
    """Imports everything that may be needed, and leaves the threads that answer more stack than this process has."""
    import_module("llguidance")
    with suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        resource.setrlimit(resource.RLIMIT_STACK, (limits.FORM_STACK_BYTES, hard))
    check_text("regex", "a")


def answer(request: bytes) -> tuple[bytes, ...]:
    """The parts of a reply."""
    key, _, text = request.decode().partition(" ")
    try:
        check_text(key, text)
    except UsageError as error:
        return (error.reason.encode(errors="replace")[:_REASON_BYTES],)
    except MemoryError:
        return (b"takes too much memory",)
    except BaseException as error:  # Rust panics are not Exceptions
        return ((str(error) or type(error).__name__).encode(errors="replace")[:1000],)
    return (b"",)
