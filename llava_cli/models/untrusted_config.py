"""A checkpoint's JSON files may describe a model. They may not fetch, open or run anything.

transformers takes from them, at any depth, repos of kernels, backbones and tokenizers to fetch, files to read in place
of those that were judged, and attributes in place of its own methods. What is only a preference is left out of the
config that a model is made of; what cannot be honored is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from llava_cli import limits
from llava_cli.untrusted_text import one_line

REFUSED = {
    "backbone": "a backbone from the Hub",
    "transformers_weights": "weights of another name",
    "configuration_files": "another config",
    "audio_tokenizer": "an audio tokenizer from the Hub",
    "gguf_file": "a GGUF file",
}
"""Keys that would have something else loaded, and what."""
_PREFERENCES = (
    "attn_implementation",
    "experts_implementation",
    "use_kernels",
    "kernel_config",
    "fusion_config",
    "distributed_config",
    "auto_map",
    "name_or_path",
)
"""Keys of how, or by whose code, a model is run: that is ours to choose."""
_MODULE = re.compile(r"[\w.-]*")


def refusal(content: dict[str, Any]) -> str | None:
    """What a JSON file asks for that is not done, in words that follow the file's name; None where there is nothing."""
    for part in _objects(content):
        for key, what in REFUSED.items():
            if part.get(key) is not None:
                return f"asks for {what} ({key})"
        if foreign := _parts_of_the_class() & part.keys():
            return f"sets {min(foreign)}, which is transformers' own"
        if str(part.get("model_type")).startswith("timm_"):
            return "asks for a model of timm's, which may be anything"
        if reason := _too_large(part):
            return reason
    return unknown_quantization(content)


def unknown_quantization(content: dict[str, Any]) -> str | None:
    """The part of `refusal` that is about quantized weights."""
    for part in _objects(content):
        if isinstance(part.get("quantization"), dict):
            return "says that MLX has quantized it (quantization); only bitsandbytes' way is known"
        if (quantization := part.get("quantization_config")) and (reason := _unknown_quantization(quantization)):
            return reason
    return None


def _too_large(part: dict[str, Any]) -> str | None:
    """Which number of an object would have transformers loop or take memory for long, before weights are looked at."""
    for key, value in part.items():
        bounds = (most for pattern, most in _bounds().items() if re.fullmatch(pattern, key))
        if (most := next(bounds, None)) is not None and any(number > most for number in _numbers(value)):
            return f"has a {one_line(key)} of more than {most:,}"
    return None


def _bounds() -> dict[str, int]:
    """The most that numbers may be, by a pattern of their keys."""
    return {
        r"(num_|n_)?(\w+_)?layers|depth": limits.CONFIG_LAYERS,
        r"height|width|shortest_edge|patch_size|image_size|image_grid_pinpoints": limits.CONFIG_SIDE,
        r"longest_edge|max_pixels|min_pixels": limits.PICTURE_PIXELS,
        r"image_seq_len(gth)?|num_additional_image_tokens|num_image_tokens": limits.CONFIG_IMAGE_TOKENS,
    }


def _numbers(value: Any) -> Iterator[float]:
    """Those of a value, and of lists in it."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting.extend(part)
        elif isinstance(part, (int, float)):
            yield part


def _unknown_quantization(quantization: Any) -> str | None:
    """Only bitsandbytes' two are known: others bring code of their own, some of it from the Hub."""
    if not isinstance(quantization, dict):
        return "does not say how it is quantized"
    if (method := quantization.get("quant_method")) not in (None, "bitsandbytes"):
        return f"asks for quantization by {one_line(str(method))}; only bitsandbytes' is known"
    bits = [bool(quantization.get(name)) for name in ("load_in_4bit", "load_in_8bit")]
    if sum(bits) != 1:
        return "does not say whether bitsandbytes has it in 4 or in 8 bits"
    skipped = quantization.get("llm_int8_skip_modules") or []
    # They are matched as regular expressions, and there are some that take forever.
    names = isinstance(skipped, list) and all(isinstance(name, str) and _MODULE.fullmatch(name) for name in skipped)
    return None if names else "does not list names of modules as llm_int8_skip_modules"


def _objects(content: Any) -> Iterator[dict[str, Any]]:
    """All objects of a document."""
    waiting = [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)


def description(content: Any) -> Any:
    """A config without what is not the model's: preferences, and keys that transformers keeps for itself."""
    if isinstance(content, list):
        return [description(part) for part in content]
    if not isinstance(content, dict):
        return content
    if content.keys() == {"__float__"} and content["__float__"] in _FLOATS:  # transformers' spelling of what JSON lacks
        return float(content["__float__"])
    kept = {key: part for key, part in content.items() if not key.startswith("_") and key not in _PREFERENCES}
    return {key: description(part) for key, part in kept.items()}


_FLOATS = ("NaN", "Infinity", "-Infinity")


@cache
def _parts_of_the_class() -> frozenset[str]:
    """Methods and tables of config classes, which a config's own would come before; and what cannot be set at all.

    `attribute_map` alone would give any key the meaning of another.
    """
    from dataclasses import fields
    from inspect import getattr_static

    from transformers import PreTrainedConfig

    values = {field.name for field in fields(PreTrainedConfig)} | {"model_type"}
    names = {name for name in dir(PreTrainedConfig) if not name.startswith("_") or name.startswith("__")} - values
    parts = {name: getattr_static(PreTrainedConfig, name) for name in names}
    return frozenset(name for name, part in parts.items() if not isinstance(part, property) or part.fset is None)
