"""Original names of tensors -> the names in transformers' checkpoints."""

from __future__ import annotations

import re

from llava_cli.convert.tensors import Tensors
from llava_cli.errors import ModelUnusable
from llava_cli.untrusted_text import one_line

EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
PROJECTOR = "multi_modal_projector.linear_1"
SECOND_PROJECTOR = "multi_modal_projector.linear_2"
_RULES = (
    (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(.+)", r"vision_tower.\1"),
    (r"(?:model\.)?mm_projector\.0\.(.+)", rf"{PROJECTOR}.\1"),
    (r"(?:model\.)?mm_projector\.2\.(.+)", rf"{SECOND_PROJECTOR}.\1"),
    (r"(?:model\.)?mm_projector\.(weight|bias)", rf"{PROJECTOR}.\1"),
    (r"(?:model\.)?image_newline", "image_newline"),
    (r"lm_head\.(.+)", r"language_model.lm_head.\1"),
    (r"model\.((?:embed_tokens|layers|norm)\..+)", r"language_model.model.\1"),
)
_NOT_STORED = re.compile(r".*\.(inv_freq|position_ids|masked_bias)")
"""Buffers that transformers computes."""
_POOLING_HEAD = "model.vision_tower.vision_tower.vision_model.head."
"""SigLIP's head, which LLaVA does not use."""


def rename_tensors(model: str, tensors: Tensors) -> Tensors:
    """The tensors of the model called `model` by transformers' names.

    Raises `ModelUnusable` for a tensor that transformers' LLaVA does not have.
    """
    by_new_name: Tensors = {}
    for name, tensor in tensors.items():
        if _NOT_STORED.fullmatch(name) or name.startswith(_POOLING_HEAD):
            continue
        new = next((re.sub(f"^{old}$", new, name) for old, new in _RULES if re.fullmatch(old, name)), None)
        if new is None:
            words = f"transformers' LLaVA has no place for its {one_line(name)}"
            raise ModelUnusable(model, words, "llava models lists what needs no conversion")
        by_new_name[new] = tensor
    return by_new_name


def rename_tower_tensors(tensors: Tensors) -> Tensors:
    """The vision tower's tensors of a model of its own, such as CLIP, by transformers' names in a LLaVA."""
    is_whole_model = any(name.startswith("vision_model.") for name in tensors)
    pattern = (
        r"vision_model\.(?!head\.).+" if is_whole_model else r"(embeddings|encoder|pre_layrnorm|post_layernorm)\..+"
    )
    return {
        f"vision_tower.{name}": tensor
        for name, tensor in tensors.items()
        if re.fullmatch(pattern, name) and not _NOT_STORED.fullmatch(name)
    }
