"""How much memory a model takes in a precision: the only estimate, for lists, for `auto` and for errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_cli.settings import QUANTIZED

if TYPE_CHECKING:
    from llava_cli.hardware.device import Plan
    from llava_cli.models.families import PictureCost
    from llava_cli.models.geometry import Geometry

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "8bit": 1.0, "4bit": 0.5625}
"""Memory per weight; nf4 has a scale for every 64 of them."""
_PROCESS = 500_000_000
"""What Python, torch and transformers take themselves."""
_TEXT_TOKENS = 600
"""A question, and an answer of the default length."""
_DEFAULT_PICTURE_TOKENS = 1000
"""For a picture of which it is not known."""
_ACTIVATIONS = 24
"""Numbers of 32 bits for each token and each dimension of hidden_size while a prompt goes through a layer."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes, beside a conversation about one photo."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def footprint(geometry: Geometry, plan: Plan, picture: PictureCost | None) -> Footprint:
    """What a model takes as `plan` says. Raises no error: whether it fits is for the caller to say.

    In 8 and 4 bits, all but the decoder's inner layers stays in the precision that is computed in; on a CPU the vision
    tower and the head have copies in 8 bits or fewer beside that.
    """
    computed = BYTES[plan.compute_precision]
    weights = geometry.inner * BYTES[plan.precision] + geometry.unquantized * computed
    if plan.precision in QUANTIZED and plan.device == "cpu":
        weights += geometry.vision * BYTES["8bit"] + geometry.head * BYTES[plan.precision]
    tokens = (picture.tokens if picture else _DEFAULT_PICTURE_TOKENS) + _TEXT_TOKENS
    return Footprint(
        round(weights),
        round(tokens * geometry.cache * computed),
        _PROCESS + tokens * geometry.hidden_size * _ACTIVATIONS * 4,
    )
