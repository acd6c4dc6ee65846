"""Short names of models on the Hub. Data; nothing here loads a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """A model with a short name."""

    repo: str
    parameters: float
    """In billions, vision tower included."""
    family: str
    """Its name in `families`."""
    language_model: str
    """The language model that it was made from."""
    note: str = ""

    @property
    def bytes(self) -> int:
        """The size of its download: these repos hold 16-bit weights."""
        return round(self.parameters * 2e9)


ALIASES: dict[str, Alias] = {
    "llava-1.5-7b": Alias("llava-hf/llava-1.5-7b-hf", 7.06, "llava-1.5", "Vicuna 1.5", "the classic"),
    "llava-1.5-13b": Alias("llava-hf/llava-1.5-13b-hf", 13.35, "llava-1.5", "Vicuna 1.5"),
    "llava-1.6-mistral-7b": Alias(
        "llava-hf/llava-v1.6-mistral-7b-hf",
        7.57,
        "llava-1.6-mistral",
        "Mistral 0.2",
        "tiles: small text, wide pictures",
    ),
    "llava-1.6-vicuna-7b": Alias("llava-hf/llava-v1.6-vicuna-7b-hf", 7.06, "llava-1.6-vicuna", "Vicuna 1.5"),
    "llava-1.6-vicuna-13b": Alias("llava-hf/llava-v1.6-vicuna-13b-hf", 13.35, "llava-1.6-vicuna", "Vicuna 1.5"),
    "llava-1.6-34b": Alias("llava-hf/llava-v1.6-34b-hf", 34.75, "llava-1.6-34b", "Nous Hermes 2 Yi"),
    "llava-next-llama3-8b": Alias("llava-hf/llama3-llava-next-8b-hf", 8.36, "llava-next-llama3", "Llama 3"),
    "llava-next-72b": Alias("llava-hf/llava-next-72b-hf", 72.67, "llava-next-qwen", "Qwen 1.5"),
    "llava-next-110b": Alias("llava-hf/llava-next-110b-hf", 111.6, "llava-next-qwen", "Qwen 1.5"),
    "llava-onevision-0.5b": Alias(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 0.89, "llava-onevision", "Qwen 2", "small, several pictures"
    ),
    "llava-onevision-7b": Alias(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf", 8.03, "llava-onevision", "Qwen 2", "several pictures"
    ),
    "llava-onevision-72b": Alias("llava-hf/llava-onevision-qwen2-72b-ov-hf", 73.2, "llava-onevision", "Qwen 2"),
    "llava-interleave-0.5b": Alias(
        "llava-hf/llava-interleave-qwen-0.5b-hf", 0.86, "llava-interleave", "Qwen 1.5", "several pictures"
    ),
    "llava-interleave-7b": Alias(
        "llava-hf/llava-interleave-qwen-7b-hf", 8.17, "llava-interleave", "Qwen 1.5", "several pictures"
    ),
    "vip-llava-7b": Alias(
        "llava-hf/vip-llava-7b-hf", 7.06, "vip-llava", "Vicuna 1.5", "arrows and circles drawn on pictures"
    ),
    "vip-llava-13b": Alias("llava-hf/vip-llava-13b-hf", 13.35, "vip-llava", "Vicuna 1.5"),
    "bakllava": Alias("llava-hf/bakLlava-v1-hf", 7.57, "bakllava", "Mistral 0.1"),
    "smolvlm-256m": Alias("HuggingFaceTB/SmolVLM-256M-Instruct", 0.26, "smolvlm", "SmolLM2", "the smallest"),
    "smolvlm-500m": Alias("HuggingFaceTB/SmolVLM-500M-Instruct", 0.51, "smolvlm", "SmolLM2", "small, quick on a CPU"),
    "smolvlm2-2.2b": Alias(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct", 2.25, "smolvlm2", "SmolLM2", "several pictures, quick on a CPU"
    ),
    "qwen2-vl-2b": Alias("Qwen/Qwen2-VL-2B-Instruct", 2.21, "qwen2-vl", "Qwen 2", "pictures in their own shape"),
    "qwen2-vl-7b": Alias("Qwen/Qwen2-VL-7B-Instruct", 8.29, "qwen2-vl", "Qwen 2", "pictures in their own shape"),
    "qwen2.5-vl-3b": Alias(
        "Qwen/Qwen2.5-VL-3B-Instruct", 3.75, "qwen2.5-vl", "Qwen 2.5", "pictures in their own shape"
    ),
    "qwen2.5-vl-7b": Alias(
        "Qwen/Qwen2.5-VL-7B-Instruct", 8.29, "qwen2.5-vl", "Qwen 2.5", "pictures in their own shape"
    ),
    "gemma-3-4b": Alias("google/gemma-3-4b-it", 4.30, "gemma-3", "Gemma 3", "several pictures, 256 tokens each"),
}


def repo_of(name: str) -> str:
    """The Hub repo that an alias stands for; any other name as it is."""
    return ALIASES[name].repo if name in ALIASES else name
