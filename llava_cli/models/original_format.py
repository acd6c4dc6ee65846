"""Recognizes checkpoints of LLaVA's original code (haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT) by their config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_cli.files import quoted

_MODEL_TYPES = {
    *("llava_llama", "llava_mistral", "llava_mixtral", "llava_qwen", "llava_qwen_moe", "llava_gemma", "llava_mpt"),
    *("LlavaLlama", "LlavaMistral", "LlavaQwen"),
}


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config has the original format; transformers' has a part for vision tower and language model each."""
    if "vision_config" in config or "text_config" in config:
        return False
    return config.get("model_type") in _MODEL_TYPES or "mm_vision_tower" in config or "mm_projector_type" in config


def convert_command(name: str) -> str:
    """The command that converts such a folder to transformers' format."""
    return f"llava models convert {quoted(name)} -o OUT; then llava ask -m OUT …"
