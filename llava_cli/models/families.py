"""Model families, and what each was trained with. Data; nothing here loads a model.

Prompt formats and padding are from the authors' repositories (haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT and
WisconsinAIVision/ViP-LLaVA), the rest from the model cards and configs on the Hub.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple


class PictureCost(NamedTuple):
    """What a photo of 1024 x 768 is for a model."""

    crops: int
    """Images of the vision tower's size that it becomes."""
    tokens: int
    """In the prompt."""
    patches: int = 0
    """Of the vision tower, where they do not follow from the two; else 0."""


@dataclass(frozen=True)
class Family:
    """Models with one architecture and one prompt format.

    A checkpoint's family is recognized by `model_type`, `backbone`, `template` and `token`.
    """

    name: str
    model_type: str
    """Of the config."""
    backbone: str
    """`model_type` of the config's `text_config`."""
    template: str | None
    """The prompt format of training, a file in `templates/`; None if the checkpoint's own template is that format."""
    context: int | None = None
    """The most tokens of prompt and answer together; None if its checkpoints differ in that."""
    token: str = ""
    """A token in its vocabulary that other families of the same architecture lack."""
    fit: Literal["pad"] | None = None
    """How pictures are made square before the processor sees them; None leaves that to the processor."""
    image_layout: str = ""
    """What the model sees of a picture, in words."""
    pictures: Literal["one", "several", ""] = "one"
    """The number of pictures in a prompt in training; empty if that is not known."""
    turns: Literal["one", "several"] = "several"
    """How many questions a prompt may have."""

    @property
    def picture(self) -> PictureCost | None:
        """None where it is not known."""
        return _PICTURE_COSTS.get(self.name)

    def warning(self, pictures: int) -> str | None:
        """What to tell somebody who asks about this many pictures in one prompt."""
        if pictures < 2 or self.pictures != "one":
            return None
        return f"llava: {self.name} models were trained with one picture; about several they may be wrong"


_PADDED, _TILES = "padded to a square with the mean color", "whole, and in tiles of its own shape"
_SQUARE, _OWN_SHAPE = "resized to a square", "in their own shape"

FAMILIES = (
    Family("builtin", "", "", None, 1024, image_layout="padded to a square with grey", pictures="several"),
    Family(
        "llava-llama3", "llava", "llama", "llama3", 8192, token="<|start_header_id|>", fit="pad", image_layout=_PADDED
    ),
    Family("llava-1.5", "llava", "llama", "llava-1.5", 4096, fit="pad", image_layout=_PADDED),
    Family("pixtral", "llava", "mistral", None, token="[IMG_BREAK]", image_layout=_OWN_SHAPE, pictures="several"),
    Family("bakllava", "llava", "mistral", "llava-1.5", 32768, fit="pad", image_layout=_PADDED),
    Family("llava-interleave", "llava", "qwen2", "qwen", 32768, image_layout=_SQUARE, pictures="several"),
    Family("vip-llava", "vipllava", "llama", "vip-llava", 4096, fit="pad", image_layout=_PADDED),
    Family("llava-1.6-34b", "llava_next", "llama", "llava-1.6-34b", 4096, token="<|im_start|>", image_layout=_TILES),
    Family(
        "llava-next-llama3", "llava_next", "llama", "llama3", 8192, token="<|start_header_id|>", image_layout=_TILES
    ),
    Family("llava-1.6-vicuna", "llava_next", "llama", "llava-1.5", 4096, image_layout=_TILES),
    Family("llava-1.6-mistral", "llava_next", "mistral", "mistral", 32768, image_layout=_TILES),
    Family("llava-next-qwen", "llava_next", "qwen2", "qwen", 32768, image_layout=_TILES),
    Family("llava-onevision", "llava_onevision", "qwen2", "qwen", 32768, image_layout=_TILES, pictures="several"),
    Family("smolvlm", "idefics3", "llama", None, 8192, image_layout=_TILES, pictures="several"),
    Family("smolvlm2", "smolvlm", "llama", None, 8192, image_layout=_TILES, pictures="several"),
    Family("qwen2-vl", "qwen2_vl", "qwen2_vl_text", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("qwen2.5-vl", "qwen2_5_vl", "qwen2_5_vl_text", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("qwen3-vl", "qwen3_vl", "qwen3_vl_text", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("gemma-3", "gemma3", "gemma3_text", None, image_layout=_SQUARE, pictures="several"),
    Family("internvl3", "internvl", "qwen2", None, image_layout=_TILES, pictures="several"),
    Family("internvl3.5", "internvl", "qwen3", None, image_layout=_TILES, pictures="several"),
    Family(
        "paligemma", "paligemma", "gemma", "paligemma", token="<image>", image_layout=_SQUARE, pictures="", turns="one"
    ),
    Family(
        "paligemma2",
        "paligemma",
        "gemma2",
        "paligemma",
        token="<image>",
        image_layout=_SQUARE,
        pictures="",
        turns="one",
    ),
    Family("mistral-3", "mistral3", "mistral", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("aya-vision", "aya_vision", "cohere2", None, image_layout=_TILES, pictures="several"),
    Family("llama-3.2-vision", "mllama", "mllama_text_model", None, image_layout="in tiles", pictures=""),
    Family("idefics2", "idefics2", "mistral", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("glm-4v", "glm4v", "glm4v_text", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("glm-4.6v", "glm46v", "glm4v_text", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("glm-4.5v", "glm4v_moe", "glm4v_moe_text", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("glm-ocr", "glm_ocr", "glm_ocr_text", None, image_layout=_OWN_SHAPE, pictures=""),
    Family("qwen3-vl-moe", "qwen3_vl_moe", "qwen3_vl_moe_text", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("qwen3.5", "qwen3_5", "qwen3_5_text", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("qwen3.5-moe", "qwen3_5_moe", "qwen3_5_moe_text", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("exaone-4.5", "exaone4_5", "exaone4", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("gemma-4", "gemma4", "gemma4_text", None, image_layout=_OWN_SHAPE, pictures="several"),
    Family("ovis2", "ovis2", "qwen2", None, image_layout=_TILES, pictures="several"),
    Family("lighton-ocr", "lighton_ocr", "qwen3", None, image_layout=_OWN_SHAPE, pictures=""),
    Family("qianfan-ocr", "qianfan_ocr", "qwen3", None, image_layout=_TILES, pictures=""),
    Family("paddleocr-vl", "paddleocr_vl", "paddleocr_vl_text", None, image_layout=_OWN_SHAPE, pictures=""),
    Family("hunyuan-vl", "hunyuan_vl", "hunyuan_vl_text", None, image_layout=_OWN_SHAPE, pictures=""),
    Family("deepseek-vl", "deepseek_vl", "llama", None, image_layout=_PADDED, pictures="several"),
    Family("janus", "janus", "llama", None, image_layout=_PADDED, pictures=""),
    Family("llava-next-video", "llava_next_video", "llama", None, image_layout=_TILES, pictures=""),
)

_PICTURE_COSTS = {
    "builtin": PictureCost(1, 64),
    **dict.fromkeys(("llava-1.5", "llava-llama3", "bakllava", "vip-llava"), PictureCost(1, 576)),
    "llava-interleave": PictureCost(1, 729),
    **{family.name: PictureCost(5, 2340) for family in FAMILIES if family.model_type == "llava_next"},
    "llava-onevision": PictureCost(7, 4725),
    "smolvlm": PictureCost(13, 863),
    "smolvlm2": PictureCost(13, 1084),
    **dict.fromkeys(("qwen2-vl", "qwen2.5-vl", "glm-4v"), PictureCost(1, 999, 3996)),
    "qwen3-vl": PictureCost(1, 768, 3072),
    "gemma-3": PictureCost(1, 256, 4096),
    **dict.fromkeys(("internvl3", "internvl3.5"), PictureCost(13, 3328)),
}
READS_PARTS = frozenset(
    {
        "aya_vision",
        "deepseek_vl",
        "gemma3",
        "glm46v",
        "glm4v",
        "glm4v_moe",
        "glm_ocr",
        "hunyuan_vl",
        "idefics2",
        "idefics3",
        "internvl",
        "janus",
        "lighton_ocr",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "mistral3",
        "ovis2",
        "paddleocr_vl",
        "qianfan_ocr",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
        "vipllava",
    }
)
"""Model types whose prompts were found to be read right in parts and beside others, with padding on their left."""
READS_WHOLE = frozenset({"paligemma"})
"""Model types whose prompts are read right beside others, but whole: each of its tokens sees those behind it, too."""


TESTED = frozenset(family.model_type for family in FAMILIES if family.model_type)
"""Model types whose answers were compared with those of transformers."""
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        ("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"),
        "are encoder-decoders, which are not supported",
    ),
    **dict.fromkeys(
        (
            "cohere2_vision",
            "gemma4_unified",
            "inkling2",
            "inkling_mm_model",
            "kimi_k25",
            "lfm2_vl",
            "llama4",
            "minicpm_ocr",
            "minimax_m3_vl",
            "molmo2",
            "muse_glimmer",
            "muse_spark",
            "nemotron_h_omni",
            "perception_lm",
            "step3p7",
            "unlimited_ocr",
        ),
        "need torchvision for their pictures, which is not used here: pixels must not depend on what is installed",
    ),
    **dict.fromkeys(
        ("fast_vlm", "gemma3n"),
        "need timm for their pictures, and that needs torchvision: pixels must not depend on what is installed",
    ),
    **dict.fromkeys(
        ("blip", "blip-2", "fuyu", "git", "instructblip", "kosmos-2", "kosmos-2.5"),
        "have no chat format: they caption pictures, or continue a text beside one",
    ),
    "mistral4": "read text alone",
    "diffusion_gemma": "write by diffusion, which is not supported",
    "evolla": "read proteins, not pictures",
    "instructblipvideo": "read videos, which are not supported",
    "pi0": "move robots, and write no text",
    "shieldgemma2": "judge pictures, and write no text",
}
"""Model types that transformers counts among those of pictures and text, and why they are refused."""


_TEMPLATE_TOKENS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("[INST]", "[/INST]"),
}
"""Tokens that a vocabulary for the template has. Vicuna's and the older LLaVA's templates are plain words."""
_END_OF_SEQUENCE = "</s>"
"""The end of an answer in templates that are otherwise plain words."""


def template_for(vocabulary: Collection[str]) -> str | None:
    """The template that a vocabulary was made for; None if it may be any."""
    for template, tokens in _TEMPLATE_TOKENS.items():
        if all(token in vocabulary for token in tokens):
            return template
    return None


def recognize(model_type: str, backbone: str, vocabulary: Collection[str]) -> Family | None:
    """The family with these model types and this tokenizer's vocabulary; None if there is none."""
    return next(
        (
            family
            for family in FAMILIES
            if (family.model_type, family.backbone) == (model_type, backbone) and _fits(family, vocabulary)
        ),
        None,
    )


def _fits(family: Family, vocabulary: Collection[str]) -> bool:
    """Whether a family may have this vocabulary: language models of one architecture have several."""
    if family.token or family.template is None:
        return family.token in vocabulary or not family.token
    template = template_for(vocabulary)
    return template == family.template or (template is None and _END_OF_SEQUENCE in vocabulary)


def picture_cost(model_type: str, backbone: str) -> PictureCost | None:
    """What a photo is for a model of these types; families of one architecture do not differ in it."""
    kinds = [family for family in FAMILIES if (family.model_type, family.backbone) == (model_type, backbone)]
    return kinds[0].picture if kinds else None


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)
