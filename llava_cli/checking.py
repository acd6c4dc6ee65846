"""Is a statement about a picture true? What a model is asked, and what its answer means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llava_cli.errors import UsageError, printable
from llava_cli.models.registry import BUILTIN
from llava_cli.settings import Sampling

YES, NO, UNSURE = "yes", "no", "unsure"
SAMPLING = Sampling(choices=(YES, NO), unset=frozenset(Sampling.names()) - {"choices"})
"""How the question is answered."""


@dataclass(frozen=True)
class Check:
    """A statement and how probable it is; true in a condition if it is probable enough: `assert engine.check(…)`."""

    statement: str
    probability: float
    """That it is true, by the model."""
    at_least: float = 0.5
    """How probable it, or its contrary, has to be."""
    answer_probability: float | None = field(default=1.0, repr=False)
    """That the model says yes or no at all; None where a server does not tell."""

    @property
    def verdict(self) -> str:
        """`YES`, `NO` or, where neither is probable enough, `UNSURE`."""
        if self.probability >= self.at_least:
            return YES
        return NO if 1 - self.probability >= self.at_least else UNSURE

    def __bool__(self) -> bool:
        return self.verdict == YES

    def to_json(self) -> dict[str, Any]:
        return {
            "statement": self.statement,
            "verdict": self.verdict,
            "probability": round(self.probability, 6),
            "at_least": self.at_least,
            "answer_probability": self.answer_probability and round(self.answer_probability, 6),
        }


def question_about(statement: str, model: str) -> str:
    """What a model is asked, in the words that LLaVA-1.5 was trained with; a question stays as it is.

    The built-in model knows no such words, only plain questions about drawings.
    """
    statement = statement.strip()
    asked = statement if statement.endswith("?") else f"Is this statement about the image true? {statement}"
    return asked if model == BUILTIN else f"{asked}\nAnswer the question using a single word or phrase."


def check_threshold(at_least: float) -> None:
    """Raises `UsageError` for a probability that both a statement and its contrary could have, or none at all."""
    if not 0.5 <= at_least <= 1:
        raise UsageError("--at-least", f"{printable(str(at_least))} is not between 0.5 and 1", "--at-least 0.9")
