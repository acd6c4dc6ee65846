"""Merges a LoRA, as LLaVA's original training code leaves it, into its base."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llava_cli.convert.tensors import StoredTensor, Tensors, computed_tensor, tensors_of_file
from llava_cli.errors import ModelUnusable
from llava_cli.models.checkpoint_files import ADAPTER_CONFIG, adapter_weights, read_json
from llava_cli.models.registry import Checkpoint
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    import torch


def merge_lora(checkpoint: Checkpoint, base: Tensors) -> Tensors:
    """The base's tensors with the folder's LoRA merged, and replaced where the folder has them trained in full.

    Raises `ModelUnusable` if a tensor of the LoRA matches nothing in the base, or it is not a plain LoRA.
    """
    name, folder = checkpoint.name, checkpoint.folder
    scale = _scale(checkpoint)
    if (file := adapter_weights(folder)) is None:
        raise ModelUnusable(name, "no adapter_model.safetensors or adapter_model.bin in it", "copy it again")
    lora = {_base_name(key): tensor for key, tensor in tensors_of_file(name, file).items()}
    trained = tensors_of_file(name, folder / "non_lora_trainables.bin")
    result = {**base, **{_base_name(key): tensor for key, tensor in trained.items()}}
    for module in sorted({_module(name, key) for key in lora}):
        weight, a, b = f"{module}.weight", f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if weight not in base or a not in lora or b not in lora:
            words = f"its LoRA of {one_line(module)} matches nothing in the base"
            raise ModelUnusable(name, words, "--base names another")
        if base[weight].shape != (lora[b].shape[0], lora[a].shape[-1]):
            raise ModelUnusable(name, f"its LoRA of {one_line(module)} has other sizes", "--base names another")
        result[weight] = computed_tensor(base[weight], _merged(base[weight], lora[a], lora[b], scale))
    return result


def _merged(
    weight: StoredTensor, lora_a: StoredTensor, lora_b: StoredTensor, scale: float
) -> Callable[[], torch.Tensor]:
    """Computes W + scale * B A, with W [out, in], A [rank, in], B [out, rank] (Hu et al. 2021, arXiv:2106.09685)."""

    def merge() -> torch.Tensor:
        before = weight.read()
        return (before.float() + scale * (lora_b.read().float() @ lora_a.read().float())).to(before.dtype)

    return merge


def _scale(checkpoint: Checkpoint) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA."""
    config = read_json(checkpoint, ADAPTER_CONFIG)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    is_plain = config.get("peft_type") == "LORA" and not any(config.get(key) for key in ("use_dora", "rank_pattern"))
    if not is_plain or type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
        raise ModelUnusable(
            checkpoint.name, "its adapter is not a plain LoRA", "merge it with LLaVA's merge_lora_weights"
        )
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _module(name: str, key: str) -> str:
    module, separator, _ = key.partition(".lora_")
    if not separator:
        raise ModelUnusable(name, f"its adapter has {one_line(key)}, which is not part of a LoRA")
    return module


def _base_name(key: str) -> str:
    """A tensor's name in the base, without the prefixes of PEFT's wrappers."""
    key = key.removeprefix("base_model.")
    return key.removeprefix("model.") if key.startswith(("model.model.", "model.lm_head.")) else key
