"""Reads a PEFT adapter's config, as far as it changes answers, and refuses what cannot be merged exactly.

The config comes from a stranger: its regular expressions are not run, and the names of the adapter's tensors alone
decide which modules it changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava_cli.errors import ModelUnusable
from llava_cli.models.checkpoint_files import ADAPTER_CONFIG, read_json
from llava_cli.models.registry import Checkpoint
from llava_cli.untrusted_text import one_line


class Method(NamedTuple):
    """A kind of adapter that can be merged exactly."""

    prefix: str
    """The part of a tensor's name after its module's begins with this."""
    options: tuple[str, ...] = ()
    """Keys of the config that change an answer."""


_METHODS = {
    "LORA": Method("lora_", ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias")),
    "LOHA": Method("hada_", ("r", "alpha", "use_effective_conv2d")),
    "LOKR": Method("lokr_", ("r", "alpha", "use_effective_conv2d", "decompose_both", "decompose_factor")),
    "IA3": Method("ia3_"),
}
_IGNORED = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "megatron_core", "ensure_weight_tying", "fan_in_fan_out"),
    *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "init_ia3_weights", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # initializations: checked by their names
    # Which modules it changes: its tensors say so.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "feedforward_modules"),
    *("modules_to_save", "bias"),
}
"""Keys of a config that change no answer."""
_INITIALIZATIONS = ("init_lora_weights", "init_weights")
_HARMLESS_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to initialize an adapter that leave the base's own weights alone."""
PATTERNS = ("rank_pattern", "alpha_pattern")


class AdapterConfig(NamedTuple):
    """What an adapter's config says, as far as it matters."""

    method: Method
    peft_type: str
    options: dict[str, Any]
    patterns: dict[str, dict[str, float]]
    """Ranks and alphas of modules that differ from the others, by endings of their names."""

    def pattern_by_module(self, pattern: str, stored_names: Mapping[str, str]) -> dict[str, float]:
        """A pattern for the model's own module names; `stored_names` maps these to the adapter's."""
        by_module = {}
        for module, stored in stored_names.items():
            for ending, value in self.patterns[pattern].items():
                if stored == ending.removeprefix("^") or (not ending.startswith("^") and stored.endswith("." + ending)):
                    by_module[rf"^{re.escape(module)}"] = value
                    break
        return by_module


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config of the adapter in a folder. Raises `ModelUnusable` if it cannot be merged, or not exactly."""
    name = str(folder)
    config = read_json(Checkpoint(name, folder), ADAPTER_CONFIG)

    def refuse(words: str) -> ModelUnusable:
        return ModelUnusable(name, f"{ADAPTER_CONFIG} {words}", "merge it with PEFT, and give the folder as -m")

    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or not (method := _METHODS.get(peft_type)):
        raise refuse(f"has the type {one_line(str(peft_type))}; supported are {', '.join(_METHODS)}")
    for key in _INITIALIZATIONS:
        if (value := config.get(key)) not in _HARMLESS_INITIALIZATIONS:
            raise refuse(f"has {key} {one_line(str(value))}, which changes the base's weights too")
    known = {*_IGNORED, *PATTERNS, *method.options, *_INITIALIZATIONS}
    if unknown := next((key for key in config if key not in known and config[key] not in (None, False, [], {})), None):
        raise refuse(f"sets {one_line(unknown)}, which is not merged")
    options = {key: config[key] for key in method.options if config.get(key) is not None}
    if wrong := next((key for key, value in options.items() if not _is_number(value)), None):
        raise refuse(f"has a {wrong} that is not a number")
    patterns = {key: config.get(key) or {} for key in PATTERNS}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
            raise refuse(f"has a {key} that does not map names to numbers")
        if expression := next((ending for ending in pattern if not re.fullmatch(r"\^?[\w.]+", ending)), None):
            raise refuse(f"has a regular expression in its {key}, which is not run ({one_line(expression)})")
    return AdapterConfig(method, peft_type, options, patterns)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and math.isfinite(value) and abs(value) < 1e6
