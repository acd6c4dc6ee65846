"""Tiny checkpoints in the format of LLaVA's original code, made of transformers' ones by giving all another name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from helpers import families
from safetensors.torch import load_file, save_file

KINDS = {
    "llava-llama": ("llava_llama", "LlavaLlamaForCausalLM", "pad"),
    "llava-full": ("llava_llama", "LlavaLlamaForCausalLM", "pad"),
    "llava-mistral": ("llava_mistral", "LlavaMistralForCausalLM", "pad"),
    "llava-interleave": ("llava_qwen", "LlavaQwenForCausalLM", "pad"),
    "llava-next-vicuna": ("llava_llama", "LlavaLlamaForCausalLM", "anyres"),
    "llava-next-34b": ("llava_llama", "LlavaLlamaForCausalLM", "anyres"),
    "llava-next-llama3": ("llava_llama", "LlavaLlamaForCausalLM", "anyres"),
    "llava-next-mistral": ("llava_mistral", "LlavaMistralForCausalLM", "anyres"),
    "llava-next-qwen": ("llava_qwen", "LlavaQwenForCausalLM", "anyres"),
    "llava-onevision": ("llava_qwen", "LlavaQwenForCausalLM", "anyres_max_9"),
}
"""What the original calls a family: its model type, class and aspect ratio."""
NAMES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head", "lm_head"),
    ("multi_modal_projector.linear_1", "model.mm_projector.0"),
    ("multi_modal_projector.linear_2", "model.mm_projector.2"),
    ("image_newline", "model.image_newline"),
)
Weights = dict[str, torch.Tensor]


class Original(NamedTuple):
    """An original checkpoint's folder, its vision tower's, and that of the same model as transformers has it."""

    folder: Path
    tower: Path
    reference: Path


def original(family: str, root: Path, pickled: bool = False, with_tower: bool = True, shards: int = 1) -> Original:
    """Writes the family's tiny checkpoint in the original format; its tower beside it, and in it if `with_tower`."""
    made = Original(root / "original", root / "tower", families.save(family, root / "reference"))
    config = read(made.reference / "config.json")
    weights, tower = _renamed(load_file(made.reference / "model.safetensors"))
    vision = config["vision_config"]
    if vision["model_type"].startswith("siglip"):  # whose last layer the original does not use
        tower |= {name.replace(".layers.2.", ".layers.3."): tensor.clone() for name, tensor in tower.items()}
        vision["num_hidden_layers"] += 1
    own = {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()} if with_tower else {}
    put_weights(made.folder, {**weights, **own}, pickled, shards)
    put_weights(made.tower, {**tower, "text_model.final_layer_norm.weight": torch.ones(3)}, pickled)
    write(made.tower / "config.json", vision)
    write(made.tower / "preprocessor_config.json", _pixels(made.reference))
    write(made.folder / "config.json", _config(family, config, made.tower))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made.reference / file, made.folder / file)
    return made


def _renamed(weights: Weights) -> tuple[Weights, Weights]:
    """A checkpoint's tensors by their original names: those of language model and projector, and the tower's."""
    found: Weights = {}
    tower: Weights = {}
    for name, tensor in weights.items():
        if name.startswith("vision_tower."):
            tower["vision_model." + name.removeprefix("vision_tower.").removeprefix("vision_model.")] = tensor
            continue
        for ours, theirs in NAMES:
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        found[name] = tensor
    return found, tower


def _config(family: str, config: dict[str, Any], tower: Path) -> dict[str, Any]:
    kind, made, aspect = KINDS[family]
    tiles = aspect.startswith("anyres")
    return {
        **config["text_config"],
        "model_type": kind,
        "architectures": [made],
        "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_select_feature": "cls_patch" if family == "llava-full" else "patch",
        "mm_patch_merge_type": "spatial_unpad" if tiles else "flat",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": aspect,
        "image_grid_pinpoints": [[width, height] for height, width in config.get("image_grid_pinpoints") or []],
    }


def _pixels(reference: Path) -> dict[str, Any]:
    pixels = read(reference / "processor_config.json")["image_processor"]
    return {key: pixels[key] for key in ("image_mean", "image_std", "resample", "rescale_factor")}


def put_weights(folder: Path, weights: Weights, pickled: bool = False, shards: int = 1) -> None:
    """Writes them as training code does: as one file, or as shards with an index."""
    folder.mkdir(exist_ok=True)
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    index = {}
    for number in range(shards):
        file = f"{stem}.{ending}" if shards == 1 else f"{stem}-{number + 1:05}-of-{shards:05}.{ending}"
        part = {name: tensor.contiguous() for name, tensor in list(weights.items())[number::shards]}
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    if shards > 1:
        write(folder / f"{stem}.{ending}.index.json", {"weight_map": index})


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def change(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file; None takes them out."""
    content = {**read(path), **values}
    write(path, {key: value for key, value in content.items() if value is not None})
