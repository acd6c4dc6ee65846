"""Everything that can go wrong for a user, with the words and the exit code it gets.

    LlavaError               1   the root; never raised itself
    ├── UsageError           2   the command line, an environment variable or the config file
    ├── BadImage            65   bytes that are no picture we take
    ├── PromptTooLong       65   the prompt does not fit the model's context
    ├── InputMissing        66   a file or URL that is not there, or cannot be read
    ├── ModelUnusable       69   unknown, absent, damaged or unsuitable checkpoint
    ├── OutOfMemory         71   this machine has too little memory for what was asked
    └── OutputError         74   writing an answer or a download failed

Each has the `thing` it is about, the `reason` in a few words, and a `hint`: the next command to
type. Errors of other libraries are translated where they are called; none travels further.
"""

from __future__ import annotations


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


class InputMissing(LlavaError):
    exit_code = 66


class ModelUnusable(LlavaError):
    exit_code = 69


class OutOfMemory(LlavaError):
    exit_code = 71


class OutputError(LlavaError):
    exit_code = 74


def printable(name: str) -> str:
    """A name from outside as it may be printed: control and undecodable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
