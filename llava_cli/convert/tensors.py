"""The tensors of files, read one at a time: safetensors and torch's own, whole, sharded, or laid over each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_cli.errors import ModelUnusable
from llava_cli.models.pickled_tensors import read_tensors
from llava_cli.models.registry import Checkpoint
from llava_cli.models.validate import ADAPTER_CONFIG, read_json
from llava_cli.safetensors_header import BadHeader, read_header
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    import torch

WHOLE = ("model.safetensors", "pytorch_model.bin", "model_state_dict.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILE = re.compile(r"[\w-][\w.-]{0,200}\.(safetensors|bin)")


class Stored(NamedTuple):
    """One tensor that is not in memory yet."""

    shape: tuple[int, ...]
    bytes: int
    read: Callable[[], torch.Tensor]


Tensors = dict[str, Stored]


def tensors_of(checkpoint: Checkpoint) -> Tensors:
    """All tensors of a folder's weights by name; none where it has no weights.

    Raises `ModelUnusable` for a file that is missing, damaged, or more than tensors.
    """
    return merged(tensors_of_file(checkpoint.name, path) for path in _files(checkpoint))


def merged(parts: Iterable[Tensors]) -> Tensors:
    """Those of all parts; of one that is in several, the last."""
    return {name: tensor for part in parts for name, tensor in part.items()}


def _files(checkpoint: Checkpoint) -> list[Path]:
    """A whole file comes before shards, and safetensors before pickles."""
    folder = checkpoint.folder
    for whole, index in zip(WHOLE, (*INDEXES, None), strict=True):
        if (folder / whole).exists():
            return [folder / whole]
        if index and (folder / index).exists():
            return [folder / shard for shard in _shards(checkpoint, index)]
    return []


def _shards(checkpoint: Checkpoint, index: str) -> list[str]:
    """The files that an index names: those of its folder, for it could name any on this machine."""
    found = read_json(checkpoint, index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ModelUnusable(checkpoint.name, f"{index} is damaged")
    shards = sorted({str(shard) for shard in found.values()})
    for shard in shards:
        if not _FILE.fullmatch(shard):
            raise ModelUnusable(checkpoint.name, f"{index} names {one_line(shard)!r}, which is no file of weights")
        if not (checkpoint.folder / shard).exists():
            raise ModelUnusable(checkpoint.name, f"{shard} is missing", "copy or download it again")
    return shards


def tensors_of_file(name: str, path: Path) -> Tensors:
    """The tensors of one file of the checkpoint of that name."""
    if path.suffix == ".bin":
        found = read_tensors(name, path)
        return {key: Stored(tuple(one.shape), one.nbytes, lambda one=one: one) for key, one in found.items()}  # type: ignore[misc]
    try:
        header = read_header(path)
    except (OSError, BadHeader):
        raise ModelUnusable(name, f"{path.name} is damaged or cut off", "copy or download it again") from None
    from safetensors import safe_open

    file: Any = safe_open(path, framework="pt")
    return {
        key: Stored(its.shape, its.end - its.begin, lambda key=key: file.get_tensor(key))  # type: ignore[misc]
        for key, its in header.items()
    }


def computed(like: Stored, make: Callable[[], torch.Tensor], shape: tuple[int, ...] | None = None) -> Stored:
    """A tensor that is made when it is wanted, in the number type of another."""
    numbers, its = _product(like.shape), shape or like.shape
    return Stored(its, like.bytes * _product(its) // max(numbers, 1), make)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


# A LoRA as LLaVA's original training code leaves it.


def with_lora(checkpoint: Checkpoint, base: Tensors) -> Tensors:
    """A base's tensors with a folder's LoRA merged into them, and with what was trained whole in their place.

    Raises `ModelUnusable` where one of its tensors fits nothing in the base, or it is no plain LoRA.
    """
    name, folder = checkpoint.name, checkpoint.folder
    scale = _scale(checkpoint)
    files = [folder / file for file in ("adapter_model.safetensors", "adapter_model.bin") if (folder / file).exists()]
    if not files:
        raise ModelUnusable(name, "no adapter_model.safetensors or adapter_model.bin in it", "copy it again")
    lora = {_plain(key): tensor for key, tensor in tensors_of_file(name, files[0]).items()}
    whole = {_plain(key): one for key, one in tensors_of_file(name, folder / "non_lora_trainables.bin").items()}
    result = {**base, **whole}
    for module in sorted({_module(name, key) for key in lora}):
        weight, low, high = f"{module}.weight", f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if weight not in base or low not in lora or high not in lora:
            raise ModelUnusable(
                name, f"its LoRA of {one_line(module)} fits nothing in the base", "--base names another"
            )
        if base[weight].shape != (lora[high].shape[0], lora[low].shape[-1]):
            raise ModelUnusable(name, f"its LoRA of {one_line(module)} has other sizes", "--base names another")
        result[weight] = computed(base[weight], _adding(base[weight], lora[low], lora[high], scale))
    return result


def _adding(weight: Stored, low: Stored, high: Stored, scale: float) -> Callable[[], torch.Tensor]:
    def add() -> torch.Tensor:
        before = weight.read()
        return (before.float() + scale * (high.read().float() @ low.read().float())).to(before.dtype)

    return add


def _scale(checkpoint: Checkpoint) -> float:
    config = read_json(checkpoint, ADAPTER_CONFIG)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    plain = config.get("peft_type") == "LORA" and not any(config.get(key) for key in ("use_dora", "rank_pattern"))
    if not plain or type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
        raise ModelUnusable(checkpoint.name, "its adapter is no plain LoRA", "merge it with LLaVA's merge_lora_weights")
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _module(name: str, key: str) -> str:
    module, found, _ = key.partition(".lora_")
    if not found:
        raise ModelUnusable(name, f"its adapter has {one_line(key)}, which is no part of a LoRA")
    return module


def _plain(key: str) -> str:
    """A tensor's name in the base, which PEFT's wrappers put one or two words before."""
    key = key.removeprefix("base_model.")
    return key.removeprefix("model.") if key.startswith(("model.model.", "model.lm_head.")) else key


def shards_of(tensors: Tensors, most: int) -> Iterator[list[str]]:
    """Names of tensors, in their order, that make files of no more than `most` bytes; a larger tensor is alone."""
    shard: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.bytes > most:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.bytes
    yield shard
