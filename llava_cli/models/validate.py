"""Checks a checkpoint's config and processor files, before a weight is read.

A folder that is not a LLaVA, lacks a part, or would make transformers load something else is refused, with the reason.
"""

from __future__ import annotations

import re
from typing import Any

from llava_cli.errors import ModelUnusable, UsageError
from llava_cli.files import quoted
from llava_cli.models import incomplete
from llava_cli.models.checkpoint_files import (
    ADAPTER_CONFIG,
    CONFIG,
    Configs,
    file_sizes,
    pull_command,
    read_json,
    suffix_of,
)
from llava_cli.models.families import TESTED, UNSUPPORTED
from llava_cli.models.original_format import convert_command, is_original
from llava_cli.models.registry import Checkpoint
from llava_cli.models.untrusted_config import quantization_refusal, refusal
from llava_cli.regular_files import open_regular
from llava_cli.untrusted_text import one_line

_OTHER_CONFIGS = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
"""Other files that transformers takes options from."""
_REDIRECTING_FILES = {
    ADAPTER_CONFIG: "holds an adapter",
    "audio_tokenizer_config.json": "asks for an audio tokenizer from the Hub",
}
"""Files that make transformers load something else."""
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Files of one process of a training run: transformers prefers them to the others."""
_REPLACED_SUFFIXES = {".json", ".model", ".safetensors"}
"""Files that git-lfs or a browser may have replaced: large ones, and those that people fetch one by one."""
_MAGIC_BYTES = 64
"""The beginning of a file, which shows whether something else has replaced it."""
_REPLACEMENTS = {
    b"version https://git-lfs": ("a pointer of git-lfs, not the file itself", "git -C {folder} lfs pull"),
    b"# xet version": ("a pointer of git-xet, not the file itself", "git -C {folder} xet checkout"),
    b"<!doctype": ("a web page", "llava models pull OWNER/NAME fetches the files themselves"),
    b"<html": ("a web page", "llava models pull OWNER/NAME fetches the files themselves"),
}
"""What may replace a file, by its first bytes: its description, and the next command."""


def check_files(checkpoint: Checkpoint) -> Configs:
    """Checks config and processor, and returns what was read: config.json and the others that are there.

    Raises `ModelUnusable`.
    """
    name, folder = checkpoint.name, checkpoint.folder
    files = file_sizes(checkpoint)
    if not (folder / CONFIG).exists():
        raise incomplete.missing_config(checkpoint)
    for file in files:
        if suffix_of(file) in _REPLACED_SUFFIXES:
            _check_not_replaced(checkpoint, file)
    config = read_json(checkpoint, CONFIG)
    configs = {CONFIG: config}
    _check_model_type(checkpoint, config)
    hint = "take the model unquantized: -p 4bit quantizes it here"
    _refuse(checkpoint, CONFIG, quantization_refusal(config), hint)
    _refuse(checkpoint, CONFIG, refusal(config))
    for file in files:
        _refuse(checkpoint, file, _REDIRECTING_FILES.get(file))
        _refuse(checkpoint, file, "is part of a training run" if _DISTRIBUTED.fullmatch(file) else None)
        if file in _OTHER_CONFIGS:  # transformers ignores a damaged one, with its end tokens
            configs[file] = read_json(checkpoint, file)
            _refuse(checkpoint, file, refusal(configs[file]))
    if not any((folder / file).exists() for file in ("processor_config.json", "preprocessor_config.json")):
        words = "no processor_config.json or preprocessor_config.json"
        raise incomplete.missing_processor(checkpoint, words, pull_command(name))
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise incomplete.missing_processor(checkpoint, "no tokenizer.json", pull_command(name))
    return configs


def _check_not_replaced(checkpoint: Checkpoint, file: str) -> None:
    """Raises `ModelUnusable` if git-lfs or a browser has put something else in a file's place."""
    try:
        with open_regular(checkpoint.folder / file) as stream:
            beginning = stream.read(_MAGIC_BYTES).lstrip().lower()
    except OSError:  # reported where the file is used
        return
    for magic, (words, hint) in _REPLACEMENTS.items():
        if beginning.startswith(magic):
            hint = hint.format(folder=quoted(checkpoint.folder))
            raise ModelUnusable(checkpoint.name, f"{one_line(file)} is {words}", hint)


def _check_model_type(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Raises `ModelUnusable` if transformers has no picture-and-text class for the config's model type."""
    name, model_type, hint = checkpoint.name, config.get("model_type"), "llava models lists others"
    if is_original(config):
        raise ModelUnusable(name, "is in LLaVA's original format, not in that of transformers", convert_command(name))
    if not isinstance(model_type, str):
        raise ModelUnusable(name, "its config.json names no model type", hint)
    if model_type not in TESTED and (words := _no_such_class(model_type)):
        raise ModelUnusable(name, "needs its own code, which is never run" if "auto_map" in config else words, hint)
    if reason := UNSUPPORTED.get(model_type):
        raise ModelUnusable(name, f"{model_type} models {reason}", hint)
    if config.get("is_encoder_decoder"):
        words = f"{model_type} models are encoder-decoders, which are not supported"
        raise ModelUnusable(name, words, "llava models")


def _no_such_class(model_type: str) -> str:
    """What kind of models these are instead; empty where transformers has a picture-and-text class. Imports torch."""
    from transformers.models.auto import modeling_auto

    if model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return ""
    words = f"{one_line(model_type)} models do not load as picture-and-text models"
    if model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"{words}: they read text alone"
    if model_type in modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return f"{words}: they write no text"
    return words


def _refuse(checkpoint: Checkpoint, file: str, reason: str | None, hint: str = "llava models lists others") -> None:
    if reason:
        raise ModelUnusable(checkpoint.name, f"{file} {reason}", hint)


def check_visual_tokens(checkpoint: Checkpoint, config: dict[str, Any], count: int) -> None:
    """Raises `UsageError` where `count` tokens cannot be chosen: of pictures that are not one list, of one length."""
    kind, vision = config["model_type"], config.get("vision_config")
    if isinstance(vision, dict) and vision.get("model_type") == "pixtral":
        kind = "pixtral"  # whose pictures have as many tokens as their shape asks for
    if kind not in ("llava", "vipllava"):
        name, which = checkpoint.name, "only llava and vipllava models have one list of tokens a picture"
        raise UsageError(f"--visual-tokens {count}", f"{name} is a {kind} model; {which}", f"llava ask -m {name}")
