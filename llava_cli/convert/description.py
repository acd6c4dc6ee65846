"""The config of LLaVA's original code -> transformers' config and processor: what each of its options means there."""

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
from llava_cli.models.registry import Checkpoint
from llava_cli.models.untrusted_config import description, refusal
from llava_cli.models.validate import read_json
from llava_cli.untrusted_text import one_line

_DECODERS = {
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}
"""By `model_type`, or by class where that is only "llava"."""
_CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_CLIP |= {"num_attention_heads": 16, "patch_size": 14, "projection_dim": 768}
_SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
_SIGLIP |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}
_TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {**_CLIP, "image_size": 336},
    "clip-vit-large-patch14": {**_CLIP, "image_size": 224},
    "siglip-so400m-patch14-384": {**_SIGLIP, "image_size": 384},
}
"""Configs of the towers that LLaVAs are made of, for where a tower's tensors are there without its config."""
_MEAN_AND_STD = {
    "clip_vision_model": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip_vision_model": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}
_PIXELS = ("image_mean", "image_std", "resample", "rescale_factor", "do_normalize", "do_rescale")
"""What is taken from a tower's own processor."""
_BICUBIC = 3
_PATCHES = re.compile(r"\((\d{1,2})x(\d{1,2})\)")


@dataclass(frozen=True)
class Original:
    """What the original config says, in transformers' terms."""

    decoder: str
    """`model_type` of the language model."""
    kind: str
    """`model_type` of the whole."""
    tower: str
    """What it calls its vision tower."""
    projector: str
    layer: int
    """Of the vision tower's hidden states, the one that the language model sees."""
    with_class_token: bool
    pads: bool
    """Whether pictures were padded to squares in training."""
    content: dict[str, Any]


def read_original(checkpoint: Checkpoint) -> Original:
    """Raises `ModelUnusable` where the config asks for what transformers' models do not have."""
    name, content = checkpoint.name, read_json(checkpoint, "config.json")

    def refuse(words: str) -> ModelUnusable:
        return ModelUnusable(name, words, "llava models lists what needs no conversion")

    if reason := refusal({key: value for key, value in content.items() if key != "auto_map"}):
        raise refuse(f"its config.json {reason}")
    model_type = content.get("model_type")
    classes = content.get("architectures")
    names = [model_type, *(classes if isinstance(classes, list) else [])]
    decoder = next((_DECODERS[one] for one in names if isinstance(one, str) and one in _DECODERS), None)
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
    kind, pads = _kind(refuse, content), content.get("image_aspect_ratio") == "pad"
    return Original(decoder, kind, tower, projector, layer, feature == "cls_patch", pads, content)


def _kind(refuse: Callable[[str], ModelUnusable], content: dict[str, Any]) -> str:
    """The model type that treats pictures as an aspect ratio's name says."""
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


def decoder_config(checkpoint: Checkpoint, original: Original, vocabulary: int, tied: bool) -> dict[str, Any]:
    """transformers' config of the language model, of what the original says of it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[original.decoder]
    known = {one.name for one in fields(made)} | {"head_dim", "rope_theta", "rope_scaling", "torch_dtype"}
    kept = {key: value for key, value in description(original.content).items() if key in known}
    kept |= {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    for key in ("architectures", "model_type"):
        kept.pop(key, None)
    with model_errors(checkpoint.name, "its config.json does not describe a language model"):
        return dict(made.from_dict(kept).to_dict())


@dataclass(frozen=True)
class Tower:
    """A vision tower's config and what it does to pixels."""

    config: dict[str, Any]
    pixels: dict[str, Any]

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
    """A tower's own config, or the one that goes with its name. Raises `ModelUnusable` where it is not known."""
    if folder is None:
        config = _TOWERS.get(original.tower.rstrip("/").split("/")[-1])
        if config is None:
            words = f"its vision tower {one_line(original.tower)} is not known here"
            hint = f"llava models convert {quoted(checkpoint.name)} --vision-tower FOLDER -o OUT"
            raise ModelUnusable(checkpoint.name, words, hint)
        return Tower(config, {})
    its = Checkpoint(str(folder), folder)
    content = read_json(its, "config.json")
    if reason := refusal(content):
        raise ModelUnusable(its.name, f"its config.json {reason}")
    if isinstance(vision := content.get("vision_config"), dict):  # of a model that reads text, too
        content = {**vision, "model_type": f"{content.get('model_type')}_vision_model"}
    if content.get("model_type") not in _MEAN_AND_STD:
        raise ModelUnusable(its.name, f"{one_line(str(content.get('model_type')))} is no tower of CLIP or SigLIP")
    pixels = read_json(its, "preprocessor_config.json") if (folder / "preprocessor_config.json").exists() else {}
    return Tower(_vision_config(its, content), {key: pixels[key] for key in _PIXELS if key in pixels})


def _vision_config(tower: Checkpoint, content: dict[str, Any]) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[content["model_type"]]
    known = {one.name for one in fields(made)} - {"architectures"}
    with model_errors(tower.name, "its config.json does not describe a vision tower"):
        return dict(
            made.from_dict({key: value for key, value in description(content).items() if key in known}).to_dict()
        )


def whole_config(
    checkpoint: Checkpoint,
    original: Original,
    decoder: dict[str, Any],
    tower: Tower,
    tokens: dict[str, int],
    bias: bool,
) -> Any:
    """transformers' config of the whole model; `tokens` has the ids of those that stand for pictures."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    full = original.with_class_token or not tower.is_clip  # SigLIP has no class token to leave out
    options: dict[str, Any] = {
        "text_config": decoder,
        "vision_config": tower.config,
        "image_token_index": tokens["<image>"],
        "projector_hidden_act": "linear" if original.projector == "linear" else "gelu",
        "vision_feature_select_strategy": "full" if full else "default",
        "vision_feature_layer": original.layer if tower.is_clip else -1,
        "multimodal_projector_bias": bias,
        "tie_word_embeddings": decoder["tie_word_embeddings"],
    }
    if original.kind != "llava_onevision":
        options["image_seq_length"] = tower.patches + (full and tower.is_clip)
    if original.kind == "llava_onevision":
        options |= {
            "video_token_index": tokens["<video>"],
            "vision_aspect_ratio": original.content["image_aspect_ratio"],
        }
    if original.kind != "llava":
        options["image_grid_pinpoints"] = _grid(checkpoint, original.content.get("image_grid_pinpoints"), tower.side)
    with model_errors(checkpoint.name, "its config.json does not describe a LLaVA"):
        return CONFIG_MAPPING[original.kind](**options)


def _grid(checkpoint: Checkpoint, value: Any, side: int) -> list[list[int]]:
    """Resolutions that tiles make up, as (height, width); the original has them as (width, height)."""
    if isinstance(value, str) and (ends := _PATCHES.findall(value)) and "..." in value:
        (least_wide, least_high), (most_wide, most_high) = ends[0], ends[-1]
        wide, high = range(int(least_wide), int(most_wide) + 1), range(int(least_high), int(most_high) + 1)
        return [[j * side, i * side] for i in wide for j in high]
    try:
        found = json.loads(value.replace("(", "[").replace(")", "]")) if isinstance(value, str) else value
        sizes = [[int(height), int(width)] for width, height in found]
        if sizes and all(0 < size <= limits.CONFIG_SIDE for pair in sizes for size in pair):
            return sizes
    except (TypeError, ValueError):
        pass
    raise ModelUnusable(checkpoint.name, f"its image_grid_pinpoints are no resolutions ({one_line(str(value))})")


_PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
}


def processor_files(original: Original, config: Any, tower: Tower) -> dict[str, dict[str, Any]]:
    """What `processor_config.json` and `preprocessor_config.json` say."""
    processor: dict[str, Any] = {
        "processor_class": _PROCESSORS[original.kind],
        "image_token": "<image>",
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    if original.kind == "llava_onevision":
        processor |= {"num_image_tokens": tower.patches, "video_token": "<video>"}
        processor["vision_aspect_ratio"] = config.vision_aspect_ratio
    else:
        processor |= {"patch_size": tower.config["patch_size"], "num_additional_image_tokens": int(tower.is_clip)}
    mean, std = _MEAN_AND_STD[tower.config["model_type"]]
    pixels = {
        "image_processor_type": _image_processor(original.kind, tower),
        "processor_class": _PROCESSORS[original.kind],
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "image_mean": mean,
        "image_std": std,
        **tower.pixels,
    }
    square = {"height": tower.side, "width": tower.side}
    if original.kind == "llava_onevision" or pixels["image_processor_type"] == "SiglipImageProcessor":
        pixels["size"] = square
    else:
        pixels |= {"size": {"shortest_edge": tower.side}, "do_center_crop": True, "crop_size": square}
    if original.kind != "llava":
        pixels |= {"do_pad": True, "image_grid_pinpoints": config.image_grid_pinpoints}
    return {"processor_config.json": processor, "preprocessor_config.json": pixels}


def _image_processor(kind: str, tower: Tower) -> str:
    if kind == "llava":
        return "CLIPImageProcessor" if tower.is_clip else "SiglipImageProcessor"
    return "LlavaNextImageProcessor" if kind == "llava_next" else "LlavaOnevisionImageProcessor"
