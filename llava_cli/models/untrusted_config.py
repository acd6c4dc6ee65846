"""A checkpoint's JSON files may describe a model; they must not make transformers fetch, open or run anything.

At any depth, transformers takes from them repos of kernels, backbones and tokenizers to fetch, files to read instead of
those that were checked, and attributes that replace its own methods. Mere preferences are removed from the config that
a model is made of; what cannot be removed is refused.
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
"""Keys that make transformers load something else, and what."""
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
"""Keys that choose how, or by whose code, a model runs: that is our choice."""
_AREA_PROCESSORS = ("Qwen2VLImageProcessor", "Glm4vImageProcessor")
"""Image processors whose smallest and largest sizes are in pixels of area."""
_MODULE = re.compile(r"[\w.-]*")


def refusal(content: dict[str, Any]) -> str | None:
    """What a JSON file asks for that we refuse, in words that follow the file's name; None if there is nothing."""
    areas = [part.get("size") for part in _objects(content) if _counts_pixels(part)]
    for part in _objects(content):
        for key, what in REFUSED.items():
            if part.get(key) is not None:
                return f"asks for {what} ({key})"
        if reserved := _config_class_attributes() & part.keys():
            return f"sets {min(reserved)}, which is transformers' own"
        if str(part.get("model_type")).startswith("timm_"):
            return "asks for a model of timm's, which may be anything"
        if reason := _too_large(part, is_area=any(part is area for area in areas)):
            return reason
    return quantization_refusal(content)


def quantization_refusal(content: dict[str, Any]) -> str | None:
    """The part of `refusal` about quantized weights."""
    for part in _objects(content):
        if isinstance(part.get("quantization"), dict):
            return "says that MLX has quantized it (quantization); only bitsandbytes' quantization is supported"
        if (quantization := part.get("quantization_config")) and (reason := _quantization_config_refusal(quantization)):
            return reason
    return None


def _counts_pixels(part: dict[str, Any]) -> bool:
    """Whether an image processor's `size` is of areas, whatever its keys say, as Qwen2-VL's and GLM-4V's."""
    return str(part.get("image_processor_type")).startswith(_AREA_PROCESSORS)


def _too_large(part: dict[str, Any], is_area: bool) -> str | None:
    """A number with which transformers would compute for long, or take much memory, before it looks at weights."""
    limits_by_key = {**({"shortest_edge": limits.PICTURE_PIXELS} if is_area else {}), **_maxima()}
    for key, value in part.items():
        maxima = (most for pattern, most in limits_by_key.items() if re.fullmatch(pattern, key))
        if (most := next(maxima, None)) is not None and any(number > most for number in _numbers(value)):
            return f"has a {one_line(key)} of more than {most:,}"
    return None


def _maxima() -> dict[str, int]:
    """The largest numbers allowed, by patterns of their keys."""
    return {
        r"(num_|n_)?(\w+_)?layers|depth": limits.CONFIG_LAYERS,
        r"height|width|shortest_edge|patch_size|image_size|image_grid_pinpoints": limits.CONFIG_SIDE,
        r"longest_edge|max_pixels|min_pixels": limits.PICTURE_PIXELS,
        r"image_seq_len(gth)?|num_additional_image_tokens|num_image_tokens": limits.CONFIG_IMAGE_TOKENS,
    }


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value, which may be nested lists."""
    stack = [value]
    while stack:
        part = stack.pop()
        if isinstance(part, list):
            stack.extend(part)
        elif isinstance(part, (int, float)):
            yield part


def _quantization_config_refusal(quantization: Any) -> str | None:
    """Only bitsandbytes' two methods are allowed: others bring code of their own, some of it from the Hub."""
    if not isinstance(quantization, dict):
        return "does not say how it is quantized"
    if (method := quantization.get("quant_method")) not in (None, "bitsandbytes"):
        return f"asks for quantization by {one_line(str(method))}; only bitsandbytes' is supported"
    bits = [bool(quantization.get(name)) for name in ("load_in_4bit", "load_in_8bit")]
    if sum(bits) != 1:
        return "does not say whether bitsandbytes has it in 4 or in 8 bits"
    skipped = quantization.get("llm_int8_skip_modules") or []
    # They are matched as regular expressions, some of which take forever.
    is_names = isinstance(skipped, list) and all(isinstance(name, str) and _MODULE.fullmatch(name) for name in skipped)
    return None if is_names else "does not list names of modules as llm_int8_skip_modules"


def _objects(content: Any) -> Iterator[dict[str, Any]]:
    """All objects in a document, at any depth."""
    stack = [content]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            yield part
            stack.extend(part.values())
        elif isinstance(part, list):
            stack.extend(part)


def without_preferences(content: Any) -> Any:
    """A config without preferences, and without keys that transformers reserves for itself."""
    if isinstance(content, list):
        return [without_preferences(part) for part in content]
    if not isinstance(content, dict):
        return content
    if content.keys() == {"__float__"} and content["__float__"] in _FLOATS:  # how transformers writes what JSON lacks
        return float(content["__float__"])
    kept = {key: part for key, part in content.items() if not key.startswith("_") and key not in _PREFERENCES}
    return {key: without_preferences(part) for key, part in kept.items()}


_FLOATS = ("NaN", "Infinity", "-Infinity")


@cache
def _config_class_attributes() -> frozenset[str]:
    """Methods and tables of transformers' config class, which a key would shadow, and its read-only properties.

    An `attribute_map` alone would give any key the meaning of another.
    """
    from dataclasses import fields
    from inspect import getattr_static

    from transformers import PreTrainedConfig

    values = {field.name for field in fields(PreTrainedConfig)} | {"model_type"}
    names = {name for name in dir(PreTrainedConfig) if not name.startswith("_") or name.startswith("__")} - values
    members = {name: getattr_static(PreTrainedConfig, name) for name in names}
    return frozenset(
        name for name, member in members.items() if not isinstance(member, property) or member.fset is None
    )
