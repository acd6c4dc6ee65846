"""Everything that can go wrong for a user, with the words and the exit code it gets.

    LlavaError               1   the root; never raised itself
    ├── UsageError           2   the command line, an environment variable or the config file
    ├── BadImage            65   bytes that are no picture we take
    ├── PromptTooLong       65   the prompt does not fit the model's context
    ├── BadData             65   a file of questions or of answers that is not what it should be
    │   └── NoAnswer        65   a server's model that says nothing, refuses, or is cut off by a filter
    ├── InputMissing        66   a file or URL that is not there, or cannot be read
    ├── ModelUnusable       69   unknown, absent, damaged or unsuitable checkpoint
    ├── ServerFailed        69   a server that gave no answer, however often it was asked
    ├── OutOfMemory         71   this machine has too little memory for what was asked
    ├── OutputTaken         73   the output is another run's, or cannot be written
    └── OutputError         74   writing an answer or a download failed

Each has the `thing` it is about, the `reason` in a few words, and a `hint`: the next command to
type. Errors of other libraries are translated where they are called; none travels further.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from llava_cli.untrusted_text import one_line
from llava_cli.untrusted_text import printable as printable  # errors are where most of the package needs it


class LlavaError(Exception):
    """An error that is the user's to mend: `llava: THING: REASON`, then a hint."""

    exit_code = 1

    def __init__(self, thing: str, reason: str, hint: str = "") -> None:
        super().__init__(f"{thing}: {reason}")
        self.thing, self.reason, self.hint = thing, reason, hint


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


class ModelUnusable(LlavaError):
    exit_code = 69


class ServerFailed(LlavaError):
    exit_code = 69


class OutOfMemory(LlavaError):
    exit_code = 71


class OutputTaken(LlavaError):
    exit_code = 73


class OutputError(LlavaError):
    exit_code = 74


def brief(error: BaseException) -> str:
    """The first line of another library's message, or what it calls the error."""
    return one_line(str(error)) or type(error).__name__


def plainly(error: BaseException) -> str:
    """Another library's message in our style: one line, no error number, no capital, nothing unprintable."""
    words = re.sub(r"^\[[^]]*\] ", "", one_line(str(error))) or type(error).__name__
    return words[:1].lower() + words[1:]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch says so with a bare RuntimeError on a CPU, a file with ENOMEM."""
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one too
        return "out of memory" in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


@contextmanager
def model_errors(model: str, what: str, hint: str = "") -> Iterator[None]:
    """Translates whatever torch, transformers and their Rust parts raise over a model: `llava: MODEL: WHAT (words)`."""
    try:
        yield
    except LlavaError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_rust_panic(error):
            raise
        if is_out_of_memory(error):
            raise OutOfMemory(model, "not enough memory", "llava models lists what fits this machine") from error
        raise ModelUnusable(model, f"{what} ({brief(error)})", hint) from error


def _is_rust_panic(error: BaseException) -> bool:
    """Whether tokenizers or safetensors came upon a bug of theirs. The class is no `Exception`, and of no module."""
    return type(error).__name__ == "PanicException" and type(error).__module__ == "pyo3_runtime"
