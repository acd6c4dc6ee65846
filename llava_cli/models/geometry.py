"""The sizes of a model that its memory and its speed follow from: of weights on disk, or of a model that has a name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_cli.safetensors_header import StoredTensor

_VISION = re.compile(r"(^|\.)(vision|visual)")
"""What the names of a vision tower's tensors have in them."""
_BLOCK = re.compile(r"\.\d+\.")
"""What those of a decoder's layers have: a number."""
_EXPERTS = re.compile(r"\.experts\.")
"""What those of experts have, which share one tensor in memory and stay as they are beside quantized layers."""
QUANTIZATION = re.compile(r"\.weight\.|\.(SCB|weight_format)$")
"""What those have that bitsandbytes stores beside quantized weights."""
_HEAD, _EMBEDDINGS = "lm_head.weight", "embed_tokens.weight"
_POSITIONS, _NORM = "position_embedding.weight", "input_layernorm.weight"
_KEYS_AND_VALUES = (".k_proj.weight", ".v_proj.weight")


@dataclass(frozen=True)
class Geometry:
    """Weights are counted, not bytes."""

    inner: int
    """Weights of the language model's linear layers, which are quantized in 8 and 4 bits."""
    head: int = 0
    """Weights of the output head; of one that is the embeddings, too, those are not counted again."""
    vision: int = 0
    """Weights of the vision tower."""
    other: int = 0
    """All the rest: embeddings, projector, norms."""
    cache: int = 0
    """Numbers that the KV cache holds for a token."""
    hidden_size: int = 0
    patches: int = 0
    """Tokens of the vision tower for one image of its size."""

    @property
    def unquantized(self) -> int:
        """Weights that stay in 16 or 32 bits in every precision."""
        return self.head + self.vision + self.other

    @property
    def total(self) -> int:
        return self.inner + self.unquantized


@dataclass(frozen=True)
class Decoder:
    """A language model of Llama's kind, as its config has it."""

    hidden_size: int
    layers: int
    intermediate_size: int
    query_size: int
    """Query heads times head_dim."""
    key_size: int
    """Key heads times head_dim."""
    vocab_size: int
    is_tied: bool = False
    """Whether the embeddings are the output head, too."""


@dataclass(frozen=True)
class VisionTower:
    """A vision transformer of CLIP's kind, as its config has it."""

    hidden_size: int
    layers: int
    intermediate_size: int
    patches: int
    """Its tokens for one image, that of the class included; for a photo, if it sees pictures in their own shape."""
    merger: int = 0
    """Weights of what makes tokens of its patches, where they are 1 % of a model or more."""
    is_gated: bool = False
    """Whether the MLPs of its layers have a gate."""


def geometry_of(decoder: Decoder, tower: VisionTower) -> Geometry:
    """The geometry of a model that need not be on this machine, without what is below 1 % of it."""
    hidden, embeddings = decoder.hidden_size, decoder.vocab_size * decoder.hidden_size
    attention = 2 * hidden * (decoder.query_size + decoder.key_size)
    mlp = (3 if tower.is_gated else 2) * tower.hidden_size * tower.intermediate_size
    return Geometry(
        inner=decoder.layers * (attention + 3 * hidden * decoder.intermediate_size),
        head=embeddings,
        vision=tower.layers * (4 * tower.hidden_size**2 + mlp) + tower.merger,
        other=0 if decoder.is_tied else embeddings,
        cache=2 * decoder.layers * decoder.key_size,
        hidden_size=hidden,
        patches=tower.patches,
    )


def geometry_of_tensors(tensors: Mapping[str, StoredTensor], counts: Mapping[str, int]) -> Geometry:
    """The geometry of a checkpoint's tensors. `counts` has the number of weights of each, which its bytes may pack."""
    sizes = dict.fromkeys(("inner", "head", "vision", "other"), 0)
    for name, tensor in tensors.items():
        if QUANTIZATION.search(name):
            continue
        is_matrix = name.endswith(".weight") and len(tensor.shape) == 2
        in_decoder = not _VISION.search(name)
        kind = "other" if in_decoder else "vision"
        if in_decoder and name.endswith(_HEAD):
            kind = "head"
        elif in_decoder and is_matrix and _BLOCK.search(name) and not _EXPERTS.search(name):
            kind = "inner"
        sizes[kind] += counts[name]
    if not sizes["head"]:  # the embeddings are the head
        sizes["head"] = sum(count for name, count in counts.items() if name.endswith(_EMBEDDINGS))
        sizes["other"] -= sizes["head"]
    norms = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith(_NORM) and not _VISION.search(name)]
    hidden_size = norms[0] if norms and norms[0] else 0
    cached = [name for name in tensors if name.endswith(_KEYS_AND_VALUES) and not _VISION.search(name)]
    positions = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith(_POSITIONS)]
    return Geometry(
        **sizes,
        cache=sum(counts[name] for name in cached) // hidden_size if hidden_size else 0,
        hidden_size=hidden_size,
        patches=max(positions, default=0),
    )
