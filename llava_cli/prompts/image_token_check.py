"""Compares the number of image tokens in a prompt with the number of features that the model makes of the picture."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

from llava_cli.errors import ModelUnusable, message_line
from llava_cli.models.checkpoint_files import pull_command
from llava_cli.models.registry import Checkpoint
from llava_cli.prompts.prompter import Prompter

_RUN_WITHOUT_VALUES = ("llava", "vipllava", "llava_next", "llava_onevision")
"""Model types that run on meta tensors: a `ValueError` of theirs is about shapes."""


def check_image_tokens(checkpoint: Checkpoint, prompter: Prompter, empty_model: Any) -> None:
    """Raises `ModelUnusable` if prompts have more or fewer image tokens per picture than the model makes features.

    `empty_model` is the model on the meta device: shapes are enough. A model that does not run there, or takes no image
    token without what its chat template puts around it, is left to its own check.
    """
    try:
        inputs = prompter.encode_example()
    except (AttributeError, KeyError, TypeError, ValueError):
        return
    hint = pull_command(checkpoint.name) or f"llava doctor {checkpoint.name}"
    try:
        features = _feature_count(empty_model, inputs)
    except Exception as error:
        if isinstance(error, ValueError) and empty_model.config.model_type in _RUN_WITHOUT_VALUES:
            words = f"its processor does not fit its vision tower ({message_line(error)})"
            raise ModelUnusable(checkpoint.name, words, hint) from None
        return
    _, tokens = prompter.count(inputs)
    if tokens != features:
        words = f"a picture has {tokens} tokens in its prompts, {features} features from its vision tower"
        raise ModelUnusable(checkpoint.name, words, hint)


def _feature_count(empty_model: Any, inputs: dict[str, Any]) -> int:
    """The number of feature vectors that a model on the meta device makes. Raises whatever the model raises."""
    import torch

    with torch.inference_mode(), torch.device("meta"):
        parameters = signature(empty_model.get_image_features).parameters
        takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
        names = [name for name in inputs if name in parameters or (takes_any and name == "image_sizes")]
        output = empty_model.get_image_features(
            **{name: inputs[name].to("meta") if inputs[name].is_floating_point() else inputs[name] for name in names}
        )
        features = getattr(output, "pooler_output", output)
        parts = features if isinstance(features, (list, tuple)) else [features]
        return sum(int(part.numel()) // int(part.shape[-1]) for part in parts)
