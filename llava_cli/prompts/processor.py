"""A checkpoint's processor: which class it is of, and what it has to know of the model.

A processor counts image tokens by copies of what config and vision tower know. Files of older transformers lack some of
them, and others are wrong; the model's own facts go into the processor, and what then does not fit is refused.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from llava_cli import limits, regular_files
from llava_cli.errors import ModelUnusable, brief, model_errors
from llava_cli.models.registry import Checkpoint
from llava_cli.models.validate import again, read_json
from llava_cli.models.weights import nothing_is_fetched
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    from llava_cli.prompts.prompter import Prompter

_NAMING = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
"""Files that may name the processor's class, in transformers' order."""
_OTHERS = {"llava": ("PixtralProcessor",)}
"""Classes that a checkpoint may name beside the one of its model type; all are transformers', or ours."""
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Vectors that a vision tower makes besides one of each patch."""


def load_processor(checkpoint: Checkpoint, kind: str, config: Any) -> Any:
    """The processor of a checkpoint of a model type, in agreement with its config. Raises `ModelUnusable`."""
    name, hint = checkpoint.name, again(checkpoint.name)
    with model_errors(name, "its processor cannot be loaded", hint):
        # PIL's resizing everywhere: torchvision's differs, and pixels should not depend on what is installed.
        made, absent = _class(checkpoint, kind, config)
        with nothing_is_fetched():
            processor = made.from_pretrained(
                checkpoint.folder, local_files_only=True, trust_remote_code=False, backend="pil", **absent
            )
        if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
            _agree(processor, config)
            _check_image_token(checkpoint, processor, config)
            return processor
    raise ModelUnusable(name, "its processor does not take pictures and text")


def _class(checkpoint: Checkpoint, kind: str, config: Any) -> tuple[Any, dict[str, None]]:
    """A processor's class, and what to make it without.

    Its part for videos is left out: we have none, and it needs torchvision.
    """
    import transformers

    name = _class_name(checkpoint, kind, config)
    if name == "PixtralProcessor":
        from llava_cli.prompts.pixtral import PixtralProcessor

        return PixtralProcessor, {}
    whole: Any = getattr(transformers, name)
    parts = [part for part in whole.get_attributes() if part != "video_processor"]
    if len(parts) == len(whole.get_attributes()):
        return whole, {}
    module = sys.modules[whole.__module__]
    if getattr(module, "num2words", str) is None:
        module.num2words = str  # type: ignore[attr-defined]  # SmolVLM's spells out how many frames a video has
    still = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda cls: parts)})
    return still, {"video_processor": None} if "video_processor" in signature(whole.__init__).parameters else {}


def _class_name(checkpoint: Checkpoint, kind: str, config: Any) -> str:
    """What the checkpoint names, where its model type goes with that or has no processor; else its model type's."""
    from transformers.models.auto import processing_auto

    known: Any = processing_auto.PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
    own = known.get(kind)
    files = [read_json(checkpoint, file) for file in _NAMING if (checkpoint.folder / file).exists()]
    named = next((found for file in files if (found := file.get("processor_class"))), None)
    if named in (_OTHERS.get(kind, ()) if own else known.values()):
        return str(named)
    if own is None:
        words = f"{kind} models have no processor of their own, and its files name none"
        raise ModelUnusable(checkpoint.name, words, "llava models lists others")
    if not named and _is_pixtral(checkpoint, config):
        return "PixtralProcessor"
    return str(own)


def _is_pixtral(checkpoint: Checkpoint, config: Any) -> bool:
    """Whether a model has Pixtral's tower, and tokens for the ends of its rows."""
    if getattr(getattr(config, "vision_config", None), "model_type", "") != "pixtral":
        return False
    with suppress(OSError):
        return b'"[IMG_BREAK]"' in regular_files.read(checkpoint.folder / "tokenizer.json", limits.TOKENIZER_BYTES)
    return False


def _agree(processor: Any, config: Any) -> None:
    """The model's facts go for the processor's copies of them."""
    for name, value in _facts(config).items():
        if value is not None and hasattr(processor, name):
            setattr(processor, name, value)
    pictures, pinpoints = processor.image_processor, getattr(config, "image_grid_pinpoints", None)
    if pinpoints and hasattr(pictures, "image_grid_pinpoints"):
        pictures.image_grid_pinpoints = pinpoints
    _agree_on_size(pictures, getattr(config, "vision_config", None))


def _facts(config: Any) -> dict[str, Any]:
    """What processors have copies of, by their names for it; None is not known."""
    vision = getattr(config, "vision_config", None)
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    patches = (side // patch) ** 2 if isinstance(side, int) and isinstance(patch, int) else None
    shuffled = getattr(config, "scale_factor", None)  # Idefics3 joins so many patches of each row and column
    return {
        "patch_size": patch if isinstance(patch, int) else None,
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        "num_additional_image_tokens": _class_tokens(vision, patches),
        "num_image_tokens": patches,
        "image_seq_len": patches // shuffled**2 if patches and isinstance(shuffled, int) else None,
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
        "spatial_merge_size": getattr(config, "spatial_merge_size", None),
    }


def _class_tokens(vision: Any, patches: int | None) -> int | None:
    """How many vectors a tower makes besides those of the patches; None where that cannot be seen."""
    kind = getattr(vision, "model_type", None)
    if kind in _CLASS_TOKENS or patches is None:
        return _CLASS_TOKENS.get(str(kind))
    import torch
    from transformers import AutoModel

    with suppress(Exception), torch.inference_mode(), torch.device("meta"):  # shapes alone
        pixels = torch.zeros(1, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
        return int(AutoModel.from_config(vision)(pixel_values=pixels).last_hidden_state.shape[1]) - patches
    return None


def _agree_on_size(pictures: Any, vision: Any) -> None:
    """Pictures of another size than a tower with a table of places takes become of that size."""
    side = getattr(vision, "image_size", None)
    if isinstance(side, int) and hasattr(pictures, "max_image_size"):  # of a tile
        pictures.max_image_size = {"longest_edge": side}
    kind = getattr(vision, "model_type", "")
    if isinstance(side, int) and kind == "pixtral" and (pictures.size.longest_edge or 0) > side:
        pictures.size = {"longest_edge": side}
    if not isinstance(side, int) or kind not in _CLASS_TOKENS:
        return
    crop = getattr(pictures, "crop_size", None) if getattr(pictures, "do_center_crop", False) else None
    seen = crop or pictures.size
    if (seen.height, seen.width) == (side, side) or (seen.longest_edge or seen.max_height):
        return
    square = {"height": side, "width": side}
    if crop:
        pictures.crop_size = type(crop)(**square)
        pictures.size = type(crop)(**({"shortest_edge": side} if pictures.size.shortest_edge else square))
    elif seen.height:
        pictures.size = type(seen)(**square)


def _check_image_token(checkpoint: Checkpoint, processor: Any, config: Any) -> None:
    """Raises `ModelUnusable` where config and tokenizer mean different tokens, or one that has no embedding."""
    image, word = getattr(config, "image_token_id", None), getattr(processor, "image_token", None)
    if not isinstance(image, int) or not isinstance(word, str):
        return
    tokenizer = processor.tokenizer
    hint = again(checkpoint.name) or "take config.json and tokenizer.json of one model"
    if (known := tokenizer.convert_tokens_to_ids(word)) != image:
        meant = tokenizer.convert_ids_to_tokens(image) if 0 <= image < len(tokenizer) else None
        theirs = "has none" if known in (None, tokenizer.unk_token_id) else f"has {known}"
        words = f"config.json has {image} for the token of a picture"
        words += f" ({one_line(meant)!r} in the tokenizer)" if meant else " (which the tokenizer does not have)"
        raise ModelUnusable(checkpoint.name, f"{words}, tokenizer.json {theirs} for {one_line(word)}", hint)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(vocabulary, int) and image >= vocabulary:
        words = f"config.json has {vocabulary} tokens (vocab_size), and {image} for the one of a picture"
        raise ModelUnusable(checkpoint.name, words, hint)


def check_image_tokens(checkpoint: Checkpoint, prompter: Prompter, empty: Any) -> None:
    """Raises `ModelUnusable` where a prompt has not as many image tokens as the model makes features of a picture.

    `empty` is the model without numbers: shapes are enough. What cannot be run so is left to the model's own check.
    """
    inputs = prompter.rehearse()
    try:
        features = _features(empty, inputs)
    except Exception as error:
        if isinstance(error, ValueError) and empty.config.model_type in _WITHOUT_NUMBERS:
            words = f"its processor does not go with its vision tower ({brief(error)})"
            raise ModelUnusable(
                checkpoint.name, words, again(checkpoint.name) or f"llava doctor {checkpoint.name}"
            ) from None
        return
    _, tokens = prompter.count(inputs)
    if tokens != features:
        words = f"a picture has {tokens} tokens in its prompts, {features} features from its vision tower"
        raise ModelUnusable(checkpoint.name, words, again(checkpoint.name) or f"llava doctor {checkpoint.name}")


_WITHOUT_NUMBERS = ("llava", "vipllava", "llava_next", "llava_onevision")
"""Model types that can be run with shapes alone: what one of them raises then is of the shapes."""


def _features(empty: Any, inputs: dict[str, Any]) -> int:
    """How many feature vectors a model without numbers makes of the pictures. Raises whatever a model type may."""
    import torch

    with torch.inference_mode(), torch.device("meta"):
        takes = signature(empty.get_image_features).parameters
        more = any(one.kind is Parameter.VAR_KEYWORD for one in takes.values())
        given = {name: inputs[name] for name in inputs if name in takes or (more and name == "image_sizes")}
        out = empty.get_image_features(
            **{name: value.to("meta") if value.is_floating_point() else value for name, value in given.items()}
        )
        found = getattr(out, "pooler_output", out)
        parts = found if isinstance(found, (list, tuple)) else [found]
        return sum(int(part.numel()) // int(part.shape[-1]) for part in parts)
