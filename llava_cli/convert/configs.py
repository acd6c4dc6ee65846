"""The config of LLaVA's original code -> transformers' configs: what each of its options means there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llava_cli import limits
from llava_cli.errors import ModelUnusable, model_errors
from llava_cli.files import quoted
from llava_cli.models.checkpoint_files import read_json
from llava_cli.models.registry import Checkpoint
from llava_cli.models.untrusted_config import refusal, without_preferences
from llava_cli.untrusted_text import one_line

_DECODERS = {
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}
"""`model_type` of the language model, by that of the whole, or by class if that is only "llava"."""
_CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_CLIP |= {"num_attention_heads": 16, "patch_size": 14, "projection_dim": 768}
_SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
_SIGLIP |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}
_TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {**_CLIP, "image_size": 336},
    "clip-vit-large-patch14": {**_CLIP, "image_size": 224},
    "siglip-so400m-patch14-384": {**_SIGLIP, "image_size": 384},
}
"""Configs of common vision towers, for folders with a tower's tensors but without its config."""
MEAN_AND_STD = {
    "clip_vision_model": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip_vision_model": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}
_PREPROCESSING = ("image_mean", "image_std", "resample", "rescale_factor", "do_normalize", "do_rescale")
"""Keys that are taken from a tower's own processor."""
_GRID_SIZE = re.compile(r"\((\d{1,2})x(\d{1,2})\)")


@dataclass(frozen=True)
class Original:
    """The original config, in transformers' terms."""

    decoder: str
    """`model_type` of the language model."""
    model_type: str
    """`model_type` of the whole model."""
    tower: str
    """The name or path of its vision tower."""
    projector: str
    feature_layer: int
    """The index of the vision tower's hidden states that the language model sees."""
    with_class_token: bool
    pads: bool
    """Whether pictures were padded to squares in training."""
    content: dict[str, Any]


def read_original(checkpoint: Checkpoint) -> Original:
    """Reads the original config. Raises `ModelUnusable` if it asks for what transformers' models do not have."""
    name, content = checkpoint.name, read_json(checkpoint, "config.json")

    def refuse(words: str) -> ModelUnusable:
        return ModelUnusable(name, words, "llava models lists what needs no conversion")

    if reason := refusal({key: value for key, value in content.items() if key != "auto_map"}):
        raise refuse(f"its config.json {reason}")
    model_type = content.get("model_type")
    classes = content.get("architectures")
    candidates = [model_type, *(classes if isinstance(classes, list) else [])]
    decoder = next((_DECODERS[key] for key in candidates if isinstance(key, str) and key in _DECODERS), None)
    if decoder is None:
        raise refuse(f"{one_line(str(model_type))} models are not converted, but llava_llama, _mistral and _qwen are")
    projector = content.get("mm_projector_type", "linear")
    if projector not in ("linear", "mlp2x_gelu"):
        raise refuse(f"transformers' LLaVA has no projector like its {one_line(str(projector))}")
    layer, feature = content.get("mm_vision_select_layer", -2), content.get("mm_vision_select_feature", "patch")
    if type(layer) is not int or feature not in ("patch", "cls_patch"):
        words = f"mm_vision_select_layer {layer}, mm_vision_select_feature {feature}"
        raise refuse(f"transformers' LLaVA does not choose features like that ({one_line(words)})")
    if content.get("mm_use_im_start_end"):
        raise refuse("it puts pictures between tokens of its own (mm_use_im_start_end), which transformers' does not")
    tower = content.get("mm_vision_tower") or content.get("vision_tower")
    if not isinstance(tower, str) or not tower:
        raise refuse("its config.json names no mm_vision_tower")
    pads = content.get("image_aspect_ratio") == "pad"
    return Original(
        decoder, _model_type(refuse, content), tower, projector, layer, feature == "cls_patch", pads, content
    )


def _model_type(refuse: Callable[[str], ModelUnusable], content: dict[str, Any]) -> str:
    """transformers' model type that lays out pictures as `image_aspect_ratio` says."""
    aspect = content.get("image_aspect_ratio")
    if aspect in (None, "square", "pad"):
        return "llava"
    if content.get("mm_patch_merge_type", "flat") != "spatial_unpad":
        raise refuse("transformers does not lay out tiles as it does (mm_patch_merge_type is not spatial_unpad)")
    if aspect == "anyres":
        return "llava_next"
    if isinstance(aspect, str) and re.fullmatch(r"anyres_max_\d{1,3}", aspect):
        return "llava_onevision"
    raise refuse(f"transformers' LLaVA has no image_aspect_ratio like its {one_line(str(aspect))}")


def decoder_config(checkpoint: Checkpoint, original: Original, vocab_size: int, is_tied: bool) -> dict[str, Any]:
    """transformers' config of the language model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[original.decoder]
    known = {field.name for field in fields(config_class)} | {"head_dim", "rope_theta", "rope_scaling", "torch_dtype"}
    kept = {key: value for key, value in without_preferences(original.content).items() if key in known}
    kept |= {"vocab_size": vocab_size, "tie_word_embeddings": is_tied}
    for key in ("architectures", "model_type"):
        kept.pop(key, None)
    with model_errors(checkpoint.name, "its config.json does not describe a language model"):
        return dict(config_class.from_dict(kept).to_dict())


@dataclass(frozen=True)
class Tower:
    """A vision tower's config, and options of its own image processor."""

    config: dict[str, Any]
    preprocessing: dict[str, Any]

    @property
    def is_clip(self) -> bool:
        return bool(self.config["model_type"] == "clip_vision_model")

    @property
    def side(self) -> int:
        return int(self.config["image_size"])

    @property
    def patches(self) -> int:
        return int((self.side // self.config["patch_size"]) ** 2)


def read_tower(checkpoint: Checkpoint, original: Original, folder: Path | None) -> Tower:
    """The tower in a folder, or the one that its name stands for. Raises `ModelUnusable` if that is unknown."""
    if folder is None:
        config = _TOWERS.get(original.tower.rstrip("/").split("/")[-1])
        if config is None:
            words = f"its vision tower {one_line(original.tower)} is not known here"
            hint = f"llava models convert {quoted(checkpoint.name)} --vision-tower FOLDER -o OUT"
            raise ModelUnusable(checkpoint.name, words, hint)
        return Tower(config, {})
    tower = Checkpoint(str(folder), folder)
    content = read_json(tower, "config.json")
    if reason := refusal(content):
        raise ModelUnusable(tower.name, f"its config.json {reason}")
    if isinstance(vision := content.get("vision_config"), dict):  # of a model that also encodes text
        content = {**vision, "model_type": f"{content.get('model_type')}_vision_model"}
    if content.get("model_type") not in MEAN_AND_STD:
        raise ModelUnusable(
            tower.name, f"{one_line(str(content.get('model_type')))} is not a vision tower of CLIP or SigLIP"
        )
    has_processor = (folder / "preprocessor_config.json").exists()
    processor = read_json(tower, "preprocessor_config.json") if has_processor else {}
    options = {key: processor[key] for key in _PREPROCESSING if key in processor}
    return Tower(_vision_config(tower, content), options)


def _vision_config(tower: Checkpoint, content: dict[str, Any]) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[content["model_type"]]
    known = {field.name for field in fields(config_class)} - {"architectures"}
    kept = {key: value for key, value in without_preferences(content).items() if key in known}
    with model_errors(tower.name, "its config.json does not describe a vision tower"):
        return dict(config_class.from_dict(kept).to_dict())


def llava_config(
    checkpoint: Checkpoint,
    original: Original,
    decoder: dict[str, Any],
    tower: Tower,
    image_tokens: dict[str, int],
    has_bias: bool,
) -> Any:
    """transformers' config of the whole model; `image_tokens` has the ids of the tokens for pictures."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    selects_all = original.with_class_token or not tower.is_clip  # SigLIP has no class token to leave out
    options: dict[str, Any] = {
        "text_config": decoder,
        "vision_config": tower.config,
        "image_token_index": image_tokens["<image>"],
        "projector_hidden_act": "linear" if original.projector == "linear" else "gelu",
        "vision_feature_select_strategy": "full" if selects_all else "default",
        "vision_feature_layer": original.feature_layer if tower.is_clip else -1,
        "multimodal_projector_bias": has_bias,
        "tie_word_embeddings": decoder["tie_word_embeddings"],
    }
    if original.model_type != "llava_onevision":
        options["image_seq_length"] = tower.patches + (selects_all and tower.is_clip)
    if original.model_type == "llava_onevision":
        options |= {
            "video_token_index": image_tokens["<video>"],
            "vision_aspect_ratio": original.content["image_aspect_ratio"],
        }
    if original.model_type != "llava":
        options["image_grid_pinpoints"] = _grid_pinpoints(
            checkpoint, original.content.get("image_grid_pinpoints"), tower.side
        )
    with model_errors(checkpoint.name, "its config.json does not describe a LLaVA"):
        return CONFIG_MAPPING[original.model_type](**options)


def _grid_pinpoints(checkpoint: Checkpoint, value: Any, side: int) -> list[list[int]]:
    """Resolutions of grids of tiles as (height, width) in pixels; the original has them as (width, height).

    Also parses the original's short form in tiles, "(1x1),...,(6x6)".
    """
    if isinstance(value, str) and (ends := _GRID_SIZE.findall(value)) and "..." in value:
        (min_columns, min_rows), (max_columns, max_rows) = ends[0], ends[-1]
        columns, rows = range(int(min_columns), int(max_columns) + 1), range(int(min_rows), int(max_rows) + 1)
        return [[row * side, column * side] for column in columns for row in rows]
    try:
        pairs = json.loads(value.replace("(", "[").replace(")", "]")) if isinstance(value, str) else value
        sizes = [[int(height), int(width)] for width, height in pairs]
        if sizes and all(0 < size <= limits.CONFIG_SIDE for pair in sizes for size in pair):
            return sizes
    except (TypeError, ValueError):
        pass
    raise ModelUnusable(checkpoint.name, f"its image_grid_pinpoints are not resolutions ({one_line(str(value))})")
