"""The families of models: what each was trained with. Data; nothing here loads a model.

Formats and padding are those of the authors' repositories, haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT and
WisconsinAIVision/ViP-LLaVA; the rest is from the model cards and configs on the Hub.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Models with one architecture and one format; a checkpoint is known by the first four fields."""

    name: str
    kind: str
    """`model_type` of the config."""
    backbone: str
    """`model_type` of the config's `text_config`."""
    template: str | None
    """The format of training, a file of `templates/`; None where the checkpoint's own is that format."""
    context: int
    """Tokens that prompt and answer may have in all."""
    token: str = ""
    """A token of its vocabulary that those of families with the same architecture lack."""
    fit: Literal["pad"] | None = None
    """How pictures that are not square are made so before the processor sees them; None: the processor's own way."""
    view: str = ""
    """What becomes of a picture, in words."""
    pictures: Literal["one", "several"] = "one"
    """How many a prompt had in training."""

    def doubt(self, pictures: int) -> str | None:
        """What somebody should know who shows it so many pictures in one prompt."""
        if pictures < 2 or self.pictures == "several":
            return None
        return f"llava: {self.name} models were trained with one picture; about several they may be wrong"


_PADDED, _TILES = "padded to a square with the mean color", "whole, and in tiles of its own shape"

FAMILIES = (
    Family("builtin", "", "", None, 1024, view="padded to a square with grey", pictures="several"),
    Family("llava-llama3", "llava", "llama", "llama3", 8192, token="<|start_header_id|>", fit="pad", view=_PADDED),
    Family("llava-1.5", "llava", "llama", "llava-1.5", 4096, fit="pad", view=_PADDED),
    Family("bakllava", "llava", "mistral", "llava-1.5", 32768, fit="pad", view=_PADDED),
    Family("llava-interleave", "llava", "qwen2", "qwen", 32768, view="resized to a square", pictures="several"),
    Family("vip-llava", "vipllava", "llama", "vip-llava", 4096, fit="pad", view=_PADDED),
    Family("llava-1.6-34b", "llava_next", "llama", "llava-1.6-34b", 4096, token="<|im_start|>", view=_TILES),
    Family("llava-next-llama3", "llava_next", "llama", "llama3", 8192, token="<|start_header_id|>", view=_TILES),
    Family("llava-1.6-vicuna", "llava_next", "llama", "llava-1.5", 4096, view=_TILES),
    Family("llava-1.6-mistral", "llava_next", "mistral", "mistral", 32768, view=_TILES),
    Family("llava-next-qwen", "llava_next", "qwen2", "qwen", 32768, view=_TILES),
    Family("llava-onevision", "llava_onevision", "qwen2", "qwen", 32768, view=_TILES, pictures="several"),
    Family("smolvlm", "idefics3", "llama", None, 8192, view=_TILES, pictures="several"),
    Family("smolvlm2", "smolvlm", "llama", None, 8192, view=_TILES, pictures="several"),
)


FORMATS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("[INST]", "[/INST]"),
}
"""Templates by the tokens of a vocabulary that was made for them. Those of Vicuna's and the older LLaVA's are words."""


def format_of(vocabulary: Collection[str]) -> str | None:
    """The template that a vocabulary was made for; None where it may be any."""
    return next((name for name, words in FORMATS.items() if all(word in vocabulary for word in words)), None)


def recognise(kind: str, backbone: str, vocabulary: Collection[str]) -> Family | None:
    """The family that a config's model types and a tokenizer's vocabulary belong to; None for others."""
    return next(
        (
            family
            for family in FAMILIES
            if (family.kind, family.backbone) == (kind, backbone) and _has_words_of(family, vocabulary)
        ),
        None,
    )


def _has_words_of(family: Family, vocabulary: Collection[str]) -> bool:
    """Whether a vocabulary is one of a family's: language models of one architecture have several."""
    if family.token or family.template is None:
        return family.token in vocabulary or not family.token
    made_for = format_of(vocabulary)
    return made_for == family.template or (made_for is None and _END in vocabulary)


_END = "</s>"
"""Of an answer, in the formats whose other words are plain text."""


def named(name: str) -> Family:
    """The family of that name."""
    return next(family for family in FAMILIES if family.name == name)
