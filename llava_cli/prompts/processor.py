"""Loads a checkpoint's processor, and makes it agree with the model's config.

A processor counts image tokens by its own copies of values of the config. Files of older transformers lack some of
these copies, and others are wrong, so the model's own values replace them; what still disagrees is refused.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from llava_cli import limits, regular_files
from llava_cli.errors import ModelUnusable, model_errors
from llava_cli.models.checkpoint_files import CONFIG, Configs, pull_command, tokenizer_hint
from llava_cli.models.registry import Checkpoint
from llava_cli.models.weights import nothing_is_fetched
from llava_cli.untrusted_text import one_line

_NAMING_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
"""Files that may name the processor's class, in transformers' order."""
_ALTERNATIVES = {"llava": ("PixtralProcessor",)}
"""Classes that a checkpoint may name besides that of its model type; all are transformers' or ours."""
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Vectors that a vision tower makes besides one per patch."""
_EXTRA_EMBEDDINGS = {"mllama_text_model": 8}
"""Tokens that a language model reads and never writes, by its model type."""


def load_processor(checkpoint: Checkpoint, configs: Configs, config: Any) -> Any:
    """The processor of a checkpoint, in agreement with its config. Raises `ModelUnusable`."""
    name = checkpoint.name
    with model_errors(name, "its processor cannot be loaded", tokenizer_hint(checkpoint)):
        processor_class = _processor_class(checkpoint, configs, config)
        with nothing_is_fetched():
            # PIL's resizing everywhere: torchvision's differs, and pixels must not depend on what is installed.
            processor = processor_class.from_pretrained(
                checkpoint.folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
        if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
            sync_processor_to_model(processor, config)
            _check_image_token(checkpoint, processor, config)
            return processor
    raise ModelUnusable(name, "its processor does not take pictures and text")


def _processor_class(checkpoint: Checkpoint, configs: Configs, config: Any) -> Any:
    """The class of a processor, without its processor of videos: we have none, and transformers' need torchvision."""
    import transformers

    name = _class_name(checkpoint, configs, config)
    if name == "PixtralProcessor":
        from llava_cli.prompts.pixtral import PixtralProcessor

        return PixtralProcessor
    full: Any = getattr(transformers, name)
    if "video_processor" not in full.get_attributes():
        return full
    module = sys.modules[full.__module__]
    if getattr(module, "num2words", str) is None:
        module.num2words = str  # type: ignore[attr-defined]  # SmolVLM's spells out a video's number of frames
    return without_videos(full)


def without_videos(full: Any) -> Any:
    """A processor class whose processor of videos is None: it is made, saved and loaded without one."""
    from transformers import ProcessorMixin

    names: list[str] = full.get_attributes()
    parts = [name for name in names if name != "video_processor"]

    class Base(ProcessorMixin):
        """Comes between `full` and its own base, whose `__init__` accepts no None."""

        def __init__(self, *positional: Any, **options: Any) -> None:
            options |= zip(names, positional, strict=False)
            self.video_processor = options.pop("video_processor", None)
            super().__init__(**options)  # type: ignore[no-untyped-call]

        @classmethod
        def _get_arguments_from_pretrained(cls, *positional: Any, **options: Any) -> list[Any]:
            base: Any = super()
            loaded: list[Any] = base._get_arguments_from_pretrained(*positional, **options)
            loaded.insert(names.index("video_processor"), None)
            return loaded

    return type(full.__name__, (full, Base), {"get_attributes": classmethod(lambda cls: parts)})


def _class_name(checkpoint: Checkpoint, configs: Configs, config: Any) -> str:
    """The class that the checkpoint names, if it fits its model type or that has none; else its model type's."""
    from transformers.models.auto import processing_auto

    known: Any = processing_auto.PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
    model_type = configs[CONFIG]["model_type"]
    default = known.get(model_type)
    name = next((name for file in _NAMING_FILES if (name := configs.get(file, {}).get("processor_class"))), None)
    if name in (_ALTERNATIVES.get(model_type, ()) if default else known.values()):
        return str(name)
    if default is None:
        words = f"{model_type} models have no processor of their own, and its files name none"
        raise ModelUnusable(checkpoint.name, words, "llava models lists others")
    if not name and _is_pixtral(checkpoint, config):
        return "PixtralProcessor"
    return str(default)


def _is_pixtral(checkpoint: Checkpoint, config: Any) -> bool:
    """Whether a model has Pixtral's vision tower, and its token for the end of a row of patches."""
    if getattr(getattr(config, "vision_config", None), "model_type", "") != "pixtral":
        return False
    with suppress(OSError):
        return b'"[IMG_BREAK]"' in regular_files.read(checkpoint.folder / "tokenizer.json", limits.TOKENIZER_BYTES)
    return False


def sync_processor_to_model(processor: Any, config: Any) -> None:
    """Replaces the processor's copies of the model's values by the model's own."""
    for name, value in _model_values(config).items():
        if value is not None and hasattr(processor, name):
            setattr(processor, name, value)
    image_processor, pinpoints = processor.image_processor, getattr(config, "image_grid_pinpoints", None)
    if pinpoints and hasattr(image_processor, "image_grid_pinpoints"):
        image_processor.image_grid_pinpoints = pinpoints
    _sync_image_size(image_processor, getattr(config, "vision_config", None))


def _model_values(config: Any) -> dict[str, Any]:
    """The values that processors have copies of, by their names there; None if unknown."""
    vision = getattr(config, "vision_config", None)
    image_size, patch_size = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    patches = (image_size // patch_size) ** 2 if isinstance(image_size, int) and isinstance(patch_size, int) else None
    pixel_shuffle = getattr(config, "scale_factor", None)  # Idefics3 joins scale_factor x scale_factor patches
    return {
        # Aya Vision's counts tokens in squares of downsample_factor x downsample_factor patches.
        "patch_size": patch_size * getattr(config, "downsample_factor", 1) if isinstance(patch_size, int) else None,
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        "num_additional_image_tokens": _class_tokens(vision, patches),
        "num_image_tokens": patches if getattr(vision, "model_type", None) in _CLASS_TOKENS else None,
        "image_seq_len": patches // pixel_shuffle**2 if patches and isinstance(pixel_shuffle, int) else None,
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
        "spatial_merge_size": getattr(config, "spatial_merge_size", None),
    }


def _class_tokens(vision: Any, patches: int | None) -> int | None:
    """The number of vectors that a vision tower makes besides those of the patches; None if unknown."""
    model_type = getattr(vision, "model_type", None)
    if model_type in _CLASS_TOKENS or patches is None:
        return _CLASS_TOKENS.get(str(model_type))
    import torch
    from transformers import AutoModel

    with suppress(Exception), torch.inference_mode(), torch.device("meta"):  # shapes alone
        pixels = torch.zeros(1, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
        return int(AutoModel.from_config(vision)(pixel_values=pixels).last_hidden_state.shape[1]) - patches
    return None


def _sync_image_size(image_processor: Any, vision: Any) -> None:
    """Sets the size that pictures are resized to, if the tower's position embeddings allow only one."""
    image_size = getattr(vision, "image_size", None)
    model_type = getattr(vision, "model_type", "")
    if not isinstance(image_size, int):
        return
    if hasattr(image_processor, "max_image_size"):  # of a tile
        image_processor.max_image_size = {"longest_edge": image_size}
    if model_type == "pixtral" and (image_processor.size.longest_edge or 0) > image_size:
        image_processor.size = {"longest_edge": image_size}
    if model_type not in _CLASS_TOKENS:
        return
    crop = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", False) else None
    final = crop or image_processor.size
    if (final.height, final.width) == (image_size, image_size) or (final.longest_edge or final.max_height):
        return
    square = {"height": image_size, "width": image_size}
    if crop:
        image_processor.crop_size = type(crop)(**square)
        shortest = {"shortest_edge": image_size}
        image_processor.size = type(crop)(**(shortest if image_processor.size.shortest_edge else square))
    elif final.height:
        image_processor.size = type(final)(**square)


def image_placeholder(processor: Any) -> str:
    """What stands for a picture in a prompt until the processor replaces it."""
    named = getattr(processor, "image_placeholder_token", None) or getattr(processor, "image_token", None)
    return str(named or "<image>")


def image_token_id(processor: Any) -> int:
    """The token whose embedding is replaced by a feature of a picture.

    In some families the prompt has another token for the whole picture (`processor.image_token`): Gemma 3 writes
    "<start_of_image>", and 256 of "<image_soft_token>" follow it. -1 where the vocabulary has none.
    """
    ids = getattr(processor, "image_token_ids", None)
    if ids and isinstance(ids[0], int):
        return ids[0]
    known = processor.tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", None) or "<image>")
    return -1 if known is None else int(known)


def _check_image_token(checkpoint: Checkpoint, processor: Any, config: Any) -> None:
    """Raises `ModelUnusable` if config and tokenizer disagree on the image token, or it has no embedding."""
    image_id, image_token = getattr(config, "image_token_id", None), getattr(processor, "image_token", None)
    if not isinstance(image_id, int) or not isinstance(image_token, str):
        return
    tokenizer = processor.tokenizer
    hint = pull_command(checkpoint.name) or "take config.json and the tokenizer's files of one model"
    if image_token_id(processor) != image_id and _stands_for(processor, image_id):
        processor.image_token_ids = [image_id]
    if (tokenizer_id := image_token_id(processor)) != image_id:
        token = tokenizer.convert_ids_to_tokens(image_id) if 0 <= image_id < len(tokenizer) else None
        is_there = image_token in tokenizer.get_vocab() and tokenizer_id not in (-1, tokenizer.unk_token_id)
        theirs = f"has {tokenizer_id}" if is_there else "has none"
        words = f"config.json has {image_id} for the image token"
        words += f" ({one_line(token)!r} in the tokenizer)" if token else " (which the tokenizer does not have)"
        raise ModelUnusable(checkpoint.name, f"{words}, the tokenizer {theirs} for {one_line(image_token)}", hint)
    vocab_size = embedded_tokens(config)
    if vocab_size is not None and image_id >= vocab_size:
        words = f"config.json has {vocab_size} tokens (vocab_size), and {image_id} for the image token"
        raise ModelUnusable(checkpoint.name, words, hint)


def _stands_for(processor: Any, token_id: int) -> bool:
    """Whether a processor replaces its image token by others, this one among them, as Ovis2's does.

    Its image token, `<image>`, need not be in the vocabulary.
    """
    from PIL import Image

    tokenizer = processor.tokenizer
    token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
    with suppress(Exception):  # not every processor replaces tokens one picture at a time
        inputs = processor.image_processor([Image.new("RGB", (60, 40))], return_tensors="pt")
        return bool(token) and token in processor.replace_image_token(inputs, 0)
    return False


def embedded_tokens(config: Any) -> int | None:
    """The number of tokens that a model has embeddings of; None if unknown.

    Mllama's has 8 more than its head knows, the image token among them.
    """
    text = config.get_text_config()
    vocab_size = getattr(text, "vocab_size", None)
    if not isinstance(vocab_size, int):
        return None
    return vocab_size + _EXTRA_EMBEDDINGS.get(text.model_type, 0)
