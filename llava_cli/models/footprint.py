"""How much memory a model takes in a precision: the only estimate, for lists, for `auto` and for errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_cli.hardware import cpu
from llava_cli.models.families import PictureCost, picture_cost
from llava_cli.models.geometry import Geometry
from llava_cli.models.quantized_cache import SHARD
from llava_cli.settings import QUANTIZED

if TYPE_CHECKING:
    from llava_cli.hardware.device import Plan
    from llava_cli.models.registry import Checkpoint
    from llava_cli.models.weight_files import Weights

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "8bit": 1.0, "4bit": 0.5625}
"""Memory per weight; nf4 has a scale for every 64 of them."""
_PROCESS = 620_000_000
"""What Python, torch and transformers take themselves, and compiling kernels at a first start."""
_TEXT_TOKENS = 600
"""A question, and an answer of the default length."""
_DEFAULT_PICTURE_TOKENS = 1000
"""For a picture of which it is not known."""
_ACTIVATIONS = 48
"""Numbers for each token and each dimension of hidden_size while a prompt goes through the model."""
_CACHE_HOLES = 1.45
"""How much the KV cache takes for each byte in use: it grows by moving, which leaves holes in the heap."""
_SHARD_COPIES, _LEFT_OF_SHARDS = 2.6, 0.6
"""How often a file of a quantized copy is in memory while it is written, once in more bits; and how much of it the heap
keeps in holes."""
_FILES_HELD = 0.1
"""Share of a checkpoint's files whose pages are in memory while it is quantized from them; the others have left it."""
_PACKED_TOWERS = frozenset(
    {
        "aya_vision",
        "gemma3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral3",
        "paligemma",
        "vipllava",
    }
)
"""Model types whose vision tower is read in 8 bits from packed weights where the model is quantized: those that
transformers calls `vision_tower`."""


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
    model_type: str = ""
    """Of the config."""
    kept: frozenset[str] = frozenset()
    """The precisions of which a quantized copy is kept, so that it need not be made."""

    def quantizes(self, plan: Plan) -> bool:
        """Whether the next start as `plan` says has to make a quantized copy."""
        return plan.precision in QUANTIZED and plan.precision not in self.kept and not self.stored

    def packs_vision(self, plan: Plan) -> bool:
        """Whether the vision tower is computed in 8 bits, by packed weights."""
        return _has_packed_weights(plan) and self.model_type in _PACKED_TOWERS


def _has_packed_weights(plan: Plan) -> bool:
    return plan.precision in QUANTIZED and plan.device == "cpu" and cpu.may_have_kernels()


def sizes_of(checkpoint: Checkpoint, weights: Weights, config: dict[str, Any]) -> Sizes:
    """The sizes of a checkpoint with these weights and this config.json."""
    text, geometry = config.get("text_config"), weights.geometry
    picture = picture_cost(str(config.get("model_type")), str(text.get("model_type") if isinstance(text, dict) else ""))
    # A family that sees one image has as many tokens as its tower has patches, which tuned checkpoints may change.
    if picture and picture.crops == 1 and not picture.patches:
        picture = picture._replace(tokens=geometry.patches)
    return Sizes(
        geometry,
        picture,
        weights.stored_precision,
        weights.bytes_per_weight,
        has_adapter=bool(checkpoint.adapter),
        model_type=str(config.get("model_type")),
    )


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

    In 8 and 4 bits, all but the decoder's inner layers stays in the precision that is computed in. Where our kernels
    run, the head has 8 bits, embeddings are read from a file row by row, and packed weights of a vision tower leave
    memory as soon as a picture is read.
    """
    geometry, computed = sizes.geometry, BYTES[plan.compute_precision]
    weights = geometry.inner * BYTES[plan.precision]
    if _has_packed_weights(plan) and geometry.head:  # of a name alone, its parts may not be known
        weights += geometry.head * BYTES["8bit"] + geometry.vision * (0 if sizes.packs_vision(plan) else computed)
    else:
        weights += geometry.unquantized * computed
    tokens = (sizes.picture.tokens if sizes.picture else _DEFAULT_PICTURE_TOKENS) + _TEXT_TOKENS
    workspace = tokens * geometry.hidden_size * _ACTIVATIONS * computed
    left, start = _of_start(sizes, plan) if plan.device == "cpu" else (0.0, 0.0)
    return Footprint(
        round(weights),
        round(tokens * geometry.cache * computed * _CACHE_HOLES),
        round(_PROCESS + workspace + left),
        round(_PROCESS + start),
    )


def _of_start(sizes: Sizes, plan: Plan) -> tuple[float, float]:
    """What the next start on a CPU leaves in memory, and the weights that it has there at most, in bytes."""
    geometry, computed = sizes.geometry, BYTES[plan.compute_precision]
    quantized = shard = 0.0
    if plan.precision in QUANTIZED:
        if not sizes.quantizes(plan):
            return 0.0, 0.0
        quantized = geometry.inner * BYTES[plan.precision]
        shard = min(SHARD, quantized + geometry.unquantized * sizes.file_bytes)
    if sizes.has_adapter:  # merged in the precision that is computed in, beside the weights as they were
        read = geometry.total * computed + geometry.inner * computed
    else:
        read = geometry.total * sizes.file_bytes * _FILES_HELD
    return shard * _LEFT_OF_SHARDS, read + quantized + shard * _SHARD_COPIES
