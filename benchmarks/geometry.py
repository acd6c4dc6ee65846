"""LLaVA models of real sizes with random weights: as slow as the real ones, and as large, without a download."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_cli import load
from llava_cli.engine.local import LocalEngine
from llava_cli.models.registry import builtin_folder
from llava_cli.settings import Precision

DECODERS: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2},
    "1B": {"num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32},
    "7B": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "13B": {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40},
}
SIDE, PATCH = 336, 14


def make_processor() -> LlavaProcessor:
    """The tokenizer is the built-in model's: its tokens are shorter than real ones, its prompts are real text."""
    processor = AutoProcessor.from_pretrained(builtin_folder())
    tokenizer = processor.tokenizer
    tokenizer.model_max_length = 4096
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    )


def random_llava(size: str, dtype: torch.dtype) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """CLIP-L/336 (576 image tokens) before a decoder of LLaVA-1.5's kind, vocabulary 32064, that never ends."""
    processor = make_processor()
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2 if size == "tiny" else 24,
        num_attention_heads=16,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=768,
    )
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, **DECODERS[size])
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = []
    return model, processor


def write(size: str, folder: str | Path) -> None:
    """A checkpoint in bf16, in shards: at 7B, 14 GB in memory and one shard more."""
    model, processor = random_llava(size, torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")
    processor.save_pretrained(folder)


def loaded(size: str, precision: Precision) -> LocalEngine:
    """The engine that `llava` would use for such a checkpoint; it is written to a folder and loaded from there."""
    with tempfile.TemporaryDirectory() as folder:
        write(size, folder)
        os.environ["LLAVA_CACHE"] = folder  # no copy of a model that nobody has is left behind
        return load(folder, precision=precision, device="cpu")


if __name__ == "__main__":
    write(*sys.argv[1:])
