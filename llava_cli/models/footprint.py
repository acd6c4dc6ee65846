"""How much memory a model takes in a precision: the only estimate, for lists, for `auto` and for errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_cli.models.families import PictureCost, picture_cost
from llava_cli.models.geometry import Geometry
from llava_cli.settings import QUANTIZED

if TYPE_CHECKING:
    from llava_cli.hardware.device import Plan
    from llava_cli.models.weight_files import Weights

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
class Sizes:
    """What memory and speed of a model follow from."""

    geometry: Geometry
    picture: PictureCost | None = None
    """What a photo is for it; None where it is of no known family."""
    stored: str | None = None
    """The precision of weights that are stored quantized, and have no other."""


def sizes_of(weights: Weights, config: dict[str, Any]) -> Sizes:
    """The sizes of a checkpoint with these weights and this config.json."""
    text, geometry = config.get("text_config"), weights.geometry
    picture = picture_cost(str(config.get("model_type")), str(text.get("model_type") if isinstance(text, dict) else ""))
    # A family that sees one image has as many tokens as its tower has patches, which tuned checkpoints may change.
    if picture and picture.crops == 1:
        picture = picture._replace(tokens=geometry.patches)
    return Sizes(geometry, picture, weights.stored_precision)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes, beside a conversation about one photo."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def footprint(sizes: Sizes, plan: Plan) -> Footprint:
    """What a model takes as `plan` says. Raises no error: whether it fits is for the caller to say.

    In 8 and 4 bits, all but the decoder's inner layers stays in the precision that is computed in; on a CPU the vision
    tower and the head have copies in 8 bits or fewer beside that.
    """
    geometry, computed = sizes.geometry, BYTES[plan.compute_precision]
    weights = geometry.inner * BYTES[plan.precision] + geometry.unquantized * computed
    if plan.precision in QUANTIZED and plan.device == "cpu":
        weights += geometry.vision * BYTES["8bit"] + geometry.head * BYTES[plan.precision]
    tokens = (sizes.picture.tokens if sizes.picture else _DEFAULT_PICTURE_TOKENS) + _TEXT_TOKENS
    return Footprint(
        round(weights),
        round(tokens * geometry.cache * computed),
        _PROCESS + tokens * geometry.hidden_size * _ACTIVATIONS * 4,
    )
