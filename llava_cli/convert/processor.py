"""The config files of a converted checkpoint's processor."""

from __future__ import annotations

from typing import Any

from llava_cli.convert.configs import MEAN_AND_STD, Original, Tower

_PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
}
_BICUBIC = 3
"""Pillow's `Image.Resampling.BICUBIC`."""


def processor_files(original: Original, config: Any, tower: Tower) -> dict[str, dict[str, Any]]:
    """The contents of `processor_config.json` and `preprocessor_config.json`, by file name."""
    processor: dict[str, Any] = {
        "processor_class": _PROCESSORS[original.model_type],
        "image_token": "<image>",
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    if original.model_type == "llava_onevision":
        processor |= {"num_image_tokens": tower.patches, "video_token": "<video>"}
        processor["vision_aspect_ratio"] = config.vision_aspect_ratio
    else:
        processor |= {"patch_size": tower.config["patch_size"], "num_additional_image_tokens": int(tower.is_clip)}
    mean, std = MEAN_AND_STD[tower.config["model_type"]]
    image_processor = {
        "image_processor_type": _image_processor_type(original, tower),
        "processor_class": _PROCESSORS[original.model_type],
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "image_mean": mean,
        "image_std": std,
        **tower.preprocessing,
    }
    square = {"height": tower.side, "width": tower.side}
    if original.model_type == "llava_onevision" or image_processor["image_processor_type"] == "SiglipImageProcessor":
        image_processor["size"] = square
    else:
        image_processor |= {"size": {"shortest_edge": tower.side}, "do_center_crop": True, "crop_size": square}
    if original.model_type != "llava":
        image_processor |= {"do_pad": True, "image_grid_pinpoints": config.image_grid_pinpoints}
    return {"processor_config.json": processor, "preprocessor_config.json": image_processor}


def _image_processor_type(original: Original, tower: Tower) -> str:
    if original.model_type == "llava":
        return "CLIPImageProcessor" if tower.is_clip else "SiglipImageProcessor"
    return "LlavaNextImageProcessor" if original.model_type == "llava_next" else "LlavaOnevisionImageProcessor"
