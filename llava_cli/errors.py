"""The errors that a user can meet, each with its exit code.

    LlavaError               1   the root; never raised itself
    ├── UsageError           2   the command line, an environment variable or the config file
    ├── BadImage            65   bytes that are not a picture of a known format
    ├── PromptTooLong       65   the prompt does not fit the model's context
    ├── BadData             65   a file of questions or of answers that is not what it should be
    │   └── NoAnswer        65   a server's model answered nothing, refused, or was cut off by a filter
    ├── InputMissing        66   a file or URL that is not there, or cannot be read
    │   └── SourceLost      66   nothing of a bucket can be read any more
    ├── ModelUnusable       69   unknown, absent, damaged or unsuitable checkpoint
    │   └── DeviceLost      69   a GPU that does nothing more for this process
    ├── ServerFailed        69   a server that did not answer, despite retries
    ├── WorkerLost          69   a row at which workers of a cluster end
    ├── OutOfMemory         71   this machine has too little memory for what was asked
    ├── OutputTaken         73   the output is another run's, or cannot be written
    │   └── OutputLocked    73   another run is writing it
    └── OutputError         74   writing an answer or a download failed

Each has the `thing` it is about, the `reason` in a few words, and a `hint`: the next command to type. Errors of other
libraries are translated where the library is called.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from llava_cli.untrusted_text import one_line
from llava_cli.untrusted_text import printable as printable  # most of the package needs it for its errors


class LlavaError(Exception):
    """An error that the user can do something about, shown as `llava: THING: REASON`, then the hint."""

    exit_code = 1

    def __init__(self, thing: str, reason: str, hint: str = "") -> None:
        super().__init__(f"{thing}: {reason}")
        self.thing, self.reason, self.hint = thing, reason, hint

    def __reduce__(self) -> tuple[type[LlavaError], tuple[str, str, str]]:
        """For the way from one process to another."""
        return type(self), (self.thing, self.reason, self.hint)


class UsageError(LlavaError):
    exit_code = 2


class BadImage(LlavaError):
    exit_code = 65


class PromptTooLong(LlavaError):
    exit_code = 65


class BadData(LlavaError):
    exit_code = 65


class NoAnswer(BadData):
    pass


class InputMissing(LlavaError):
    exit_code = 66


class SourceLost(InputMissing):
    """After this every further picture of the source would fail, too: the run ends, and can be resumed."""


class ModelUnusable(LlavaError):
    exit_code = 69


class DeviceLost(ModelUnusable):
    """After this every further answer of the process would fail, too."""


class ServerFailed(LlavaError):
    exit_code = 69


class WorkerLost(LlavaError):
    """A cluster's worker ended at a row, again and again."""

    exit_code = 69


class OutOfMemory(LlavaError):
    exit_code = 71


class SandboxUnavailable(LlavaError):
    """The process for a stranger's bytes cannot be started now; a later one may be."""

    exit_code = 71


class OutputTaken(LlavaError):
    exit_code = 73


class OutputLocked(OutputTaken):
    """Another run is writing an output."""


class OutputError(LlavaError):
    exit_code = 74


def message_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's class."""
    return one_line(str(error)) or type(error).__name__


def plain_message(error: BaseException) -> str:
    """Another library's message in our style: one printable line without an error number or a first capital."""
    words = re.sub(r"^\[[^]]*\] ", "", one_line(str(error))) or type(error).__name__
    return words[:1].lower() + words[1:]


def os_reason(error: BaseException) -> str:
    """The operating system's reason for a failed call, without the path; for other errors, `plain_message`."""
    words = printable(getattr(error, "strerror", None) or "")
    return words[:1].lower() + words[1:] or plain_message(error)


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


def output_failure(thing: str, error: OSError) -> LlavaError:
    """The error for an output that cannot be written: because of the disk, or because of what is in its place."""
    kind = OutputError if error.errno in _DISK_ERRORS else OutputTaken
    return kind(thing, os_reason(error), "give another file to -o")


_MEMORY_WORDS = (
    *("out of memory", "can't allocate memory", "cannot allocate memory"),
    *("cublas_status_alloc_failed", "cudnn_status_alloc_failed", "cublaslt ran into an error"),
)
"""What torch, CUDA's libraries and bitsandbytes say where memory has run out, or the system through them."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch raises a bare RuntimeError on a CPU, a file ENOMEM."""
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one too
        return any(words in str(error).lower() for words in _MEMORY_WORDS)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


_LOST_WORDS = (
    *("illegal memory access", "illegal instruction", "misaligned address", "invalid program counter"),
    *("device-side assert", "unspecified launch failure", "launch timed out", "hardware stack error"),
    *("operation not supported on global/shared address space", "uncorrectable ecc", "uncorrectable nvlink"),
)
"""CUDA's words for the errors that leave a process "in an inconsistent state", to end it (`cudaError_t`'s manual)."""


def is_device_lost(error: BaseException) -> bool:
    """Whether a GPU has met an error that it reports at each call from now on."""
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST_WORDS)


@contextmanager
def model_errors(model: str, what: str, hint: str = "") -> Iterator[None]:
    """Translates whatever torch, transformers and their Rust parts raise: `llava: MODEL: WHAT (their message)`."""
    try:
        yield
    except LlavaError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_rust_panic(error):
            raise
        if is_out_of_memory(error):
            raise OutOfMemory(model, "not enough memory", "llava models lists what fits this machine") from error
        if is_device_lost(error):
            hint = "start it again; LLAVA_FAST=0 leaves out captured steps, --device cpu the GPU"
            raise DeviceLost(model, f"the GPU has failed ({message_line(error)})", hint) from error
        raise ModelUnusable(model, f"{what} ({message_line(error)})", hint) from error


def _is_rust_panic(error: BaseException) -> bool:
    """Whether Rust code of tokenizers or safetensors panicked; that class is no `Exception` and cannot be imported."""
    return type(error).__name__ == "PanicException" and type(error).__module__ == "pyo3_runtime"
