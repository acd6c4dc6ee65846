"""Tiny checkpoints with random weights, one of each family, saved as the real ones are.

The geometry is small; classes, processors, special tokens and templates are the families' own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

PATCH, SIDE = 14, 56
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]

VICUNA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ ' ' + c['text'] + '</s> ' }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(bos: str | None = "<s>", eos: str = "</s>", extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level: every byte is a token, and the special ones of the family besides."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [t for t in ("<pad>", bos, eos, "<image>", *extra) if t]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def _text(words: PreTrainedTokenizerFast, kind: Callable[..., Any] = LlamaConfig, **more: Any) -> Any:
    return kind(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        initializer_range=0.3,
        **more,
    )


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
    )


def _clip_pixels() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def _llava(text: Callable[..., Any], template: str, **config: Any) -> tuple[Any, Any]:
    words = tokenizer()
    config = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **config}
    whole = config["vision_feature_select_strategy"] == "full"
    made = LlavaConfig(
        vision_config=_clip(),
        text_config=_text(words, text),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2 + whole,
        **config,
    )
    processor = LlavaProcessor(
        _clip_pixels(),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy=config["vision_feature_select_strategy"],
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return made, processor


def _vip() -> tuple[Any, Any]:
    _, processor = _llava(LlamaConfig, VICUNA)
    made = VipLlavaConfig(
        vision_config=_clip(),
        text_config=_text(processor.tokenizer),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layers=[-2, -3, 1],
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    return made, processor


def _next(text: Callable[..., Any], template: str) -> tuple[Any, Any]:
    words = tokenizer()
    made = LlavaNextConfig(
        vision_config=_clip(),
        text_config=_text(words, text),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=GRID,
    )
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=GRID
    )
    processor = LlavaNextProcessor(
        pixels,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return made, processor


class _Pictures(LlavaOnevisionProcessor):  # type: ignore[misc]
    """Its part for videos needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


_Pictures.__name__ = "LlavaOnevisionProcessor"


def _onevision() -> tuple[Any, Any]:
    words = tokenizer(bos=None, eos="<|im_end|>", extra=("<|im_start|>", "<video>"))
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    made = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=_text(words, Qwen2Config),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=GRID,
    )
    pixels = LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=GRID)
    processor = _Pictures(
        image_processor=pixels,
        tokenizer=words,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHATML,
    )
    return made, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava-llama": lambda: _llava(LlamaConfig, VICUNA),
    "llava-mistral": lambda: _llava(MistralConfig, MISTRAL),
    "llava-full": lambda: _llava(LlamaConfig, VICUNA, vision_feature_select_strategy="full", vision_feature_layer=-1),
    "llava-layers": lambda: _llava(LlamaConfig, VICUNA, vision_feature_layer=[-2, 1]),
    "vip-llava": _vip,
    "llava-next-vicuna": lambda: _next(LlamaConfig, VICUNA),
    "llava-next-mistral": lambda: _next(MistralConfig, MISTRAL),
    "llava-onevision": _onevision,
}


def save(family: str, folder: Path) -> Path:
    """Writes the family's tiny checkpoint into a folder, the same one each time."""
    torch.manual_seed(0)
    config, processor = FAMILIES[family]()
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
