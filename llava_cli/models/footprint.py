"""How much memory a model takes in a precision: the only estimate, for lists, for `auto` and for errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_cli.hardware import cpu
from llava_cli.models.families import PictureCost, picture_cost
from llava_cli.models.geometry import Geometry
from llava_cli.settings import QUANTIZED

if TYPE_CHECKING:
    from llava_cli.hardware.device import Plan
    from llava_cli.models.registry import Checkpoint
    from llava_cli.models.weight_files import Weights

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "8bit": 1.0, "4bit": 0.5625}
"""Memory per weight; nf4 has a scale for every 64 of them."""
_PROCESS = 500_000_000
"""What Python, torch and transformers take themselves."""
_TEXT_TOKENS = 600
"""A question, and an answer of the default length."""
_DEFAULT_PICTURE_TOKENS = 1000
"""For a picture of which it is not known."""
_ACTIVATIONS = 48
"""Numbers for each token and each dimension of hidden_size while a prompt goes through the model."""
_CACHE_HOLES = 1.6
"""How much the KV cache takes for each byte in use: it grows by moving, which leaves holes in the heap."""
_SHARD, _SHARD_COPIES = 250_000_000, 2.6
"""Bytes of a file of a quantized copy, and how often they are in memory while it is written: once in more bits."""
_FILES_HELD = 0.1
"""Share of a checkpoint's files whose pages are in memory while it is quantized from them; the others have left it."""


@dataclass(frozen=True)
class Sizes:
    """What memory and speed of a model follow from."""

    geometry: Geometry
    picture: PictureCost | None = None
    """What a photo is for it; None where it is of no known family."""
    stored: str | None = None
    """The precision of weights that are stored quantized, and have no other."""
    file_bytes: float = 2.0
    """Of a weight, in the checkpoint's files."""
    has_adapter: bool = False
    """Whether an adapter is merged into the weights before anything else is done with them."""
    kept: frozenset[str] = frozenset()
    """The precisions of which a quantized copy is kept, so that it need not be made."""


def sizes_of(checkpoint: Checkpoint, weights: Weights, config: dict[str, Any]) -> Sizes:
    """The sizes of a checkpoint with these weights and this config.json."""
    text, geometry = config.get("text_config"), weights.geometry
    picture = picture_cost(str(config.get("model_type")), str(text.get("model_type") if isinstance(text, dict) else ""))
    # A family that sees one image has as many tokens as its tower has patches, which tuned checkpoints may change.
    if picture and picture.crops == 1:
        picture = picture._replace(tokens=geometry.patches)
    return Sizes(geometry, picture, weights.stored_precision, weights.bytes_per_weight, bool(checkpoint.adapter))


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes, beside a conversation about one photo."""

    weights: int
    cache: int
    workspace: int
    """Of the process, and of activations."""
    start: int = 0
    """All that is in memory at most before it can answer, where that is more than answering takes."""

    @property
    def total(self) -> int:
        return max(self.weights + self.cache + self.workspace, self.start)


def footprint(sizes: Sizes, plan: Plan) -> Footprint:
    """What a model takes as `plan` says, from its next start on. Raises no error: whether it fits is for the caller.

    In 8 and 4 bits, all but the decoder's inner layers stays in the precision that is computed in. Our kernels map
    packed weights instead: those of the decoder and, in 8 bits, of the output head; the vision tower's leave memory as
    soon as a picture is read.
    """
    geometry, computed = sizes.geometry, BYTES[plan.compute_precision]
    weights = geometry.inner * BYTES[plan.precision]
    if plan.precision in QUANTIZED and plan.device == "cpu" and cpu.may_have_kernels():
        weights += geometry.head * BYTES["8bit"]
    else:
        weights += geometry.unquantized * computed
    tokens = (sizes.picture.tokens if sizes.picture else _DEFAULT_PICTURE_TOKENS) + _TEXT_TOKENS
    return Footprint(
        round(weights),
        round(tokens * geometry.cache * computed * _CACHE_HOLES),
        round(_PROCESS + tokens * geometry.hidden_size * _ACTIVATIONS * computed),
        round(_PROCESS + _start(sizes, plan)) if plan.device == "cpu" else 0,
    )


def _start(sizes: Sizes, plan: Plan) -> float:
    """Bytes of weights in memory at most until a model can answer, on a CPU."""
    geometry, computed = sizes.geometry, BYTES[plan.compute_precision]
    is_quantized = plan.precision in QUANTIZED
    if sizes.stored or plan.precision in sizes.kept:
        return 0
    quantized = geometry.inner * BYTES[plan.precision] if is_quantized else 0.0
    if sizes.has_adapter:  # merged in the precision that is computed in, beside the files that it is read from
        return geometry.total * computed + geometry.inner * computed + quantized
    if not is_quantized:
        return 0
    shard = min(_SHARD, quantized + geometry.unquantized * sizes.file_bytes)
    return quantized + shard * _SHARD_COPIES + geometry.total * sizes.file_bytes * _FILES_HELD
