"""Judges a checkpoint from its files, before a weight is read.

A folder that is no LLaVA, lacks a shard or holds pickles is refused at once, by name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llava_cli.errors import ModelUnusable
from llava_cli.registry import ALIASES, Checkpoint


def check_files(checkpoint: Checkpoint) -> str:
    """Config and processor: there, readable, of a model that takes pictures and text. Returns its type."""
    name, folder = checkpoint.name, checkpoint.folder
    config = read_json(checkpoint, "config.json")
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelUnusable(name, "its config.json names no model type", "llava models lists others")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        if "auto_map" in config:
            raise ModelUnusable(name, "needs its own code, which is never run", "llava models lists others")
        raise ModelUnusable(name, f"{kind} models do not load as picture-and-text models", "llava models lists others")
    if config.get("is_encoder_decoder"):
        raise ModelUnusable(name, f"{kind} models are encoder-decoders, which are not supported", "llava models")
    if (folder / "generation_config.json").exists():
        read_json(checkpoint, "generation_config.json")  # transformers ignores a damaged one, end tokens and all
    if not any((folder / f).exists() for f in ("processor_config.json", "preprocessor_config.json")):
        raise ModelUnusable(name, "no processor_config.json or preprocessor_config.json", again(name))
    if not any((folder / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelUnusable(name, "no tokenizer.json", again(name))
    return kind


def check_weights(checkpoint: Checkpoint) -> list[Path]:
    """The weight files of a checkpoint, all there and whole; `ModelUnusable` names the one that is not."""
    weights = _weights(checkpoint)
    for path in weights:
        _check_shard(checkpoint, path)
    return weights


def _weights(checkpoint: Checkpoint) -> list[Path]:
    name, folder = checkpoint.name, checkpoint.folder
    if (folder / "model.safetensors.index.json").exists():
        shards = read_json(checkpoint, "model.safetensors.index.json").get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
            raise ModelUnusable(name, "model.safetensors.index.json is damaged", again(name))
        paths = [folder / shard for shard in sorted(set(shards.values()))]
    else:
        paths = [folder / "model.safetensors"]
    for path in paths:
        if not path.exists():
            pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
            if pickles and len(paths) == 1:
                hint = "convert it to safetensors, or take another model"
                raise ModelUnusable(name, f"{pickles[0].name} is a pickle, which is never loaded", hint)
            raise ModelUnusable(name, f"{path.name} is missing", again(name))
    return paths


def _check_shard(checkpoint: Checkpoint, path: Path) -> None:
    try:
        header(path)
    except (OSError, ValueError):
        raise ModelUnusable(checkpoint.name, f"{path.name} is damaged or cut off", again(checkpoint.name)) from None


def header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and at which byte their numbers begin.

    Raises `OSError`, and `ValueError` where that is no such header, or the file does not end with the last number.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 100_000_000:
            raise ValueError("no safetensors header")
        text = file.read(length)
    try:
        tensors = {name: its for name, its in json.loads(text).items() if name != "__metadata__"}
        end = max((its["data_offsets"][1] for its in tensors.values()), default=0)
        whole = path.stat().st_size == 8 + length + end
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("no safetensors header") from error
    if not whole:
        raise ValueError("cut off")
    return tensors, 8 + length


def stored_bytes(path: Path) -> float:
    """Bytes a weight takes in the file."""
    kinds = {tensor.get("dtype") for tensor in header(path)[0].values()}
    return 4.0 if kinds == {"F32"} else 2.0


def fingerprint(checkpoint: Checkpoint) -> str:
    """What tells a checkpoint from another: the Hub's commit, else a hash of its files and of its weights' ends."""
    if checkpoint.folder.parent.name == "snapshots":
        return checkpoint.folder.name
    digest = hashlib.sha256()
    for path in sorted(checkpoint.folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt", ".safetensors"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_END))
                file.seek(max(size - _END, 0))
                digest.update(file.read(_END))
    return digest.hexdigest()[:40]


_END = 1 << 22


def read_json(checkpoint: Checkpoint, file: str) -> dict[str, Any]:
    """A JSON object of the checkpoint's folder; `ModelUnusable` where it is none."""
    try:
        found = json.loads((checkpoint.folder / file).read_text("utf-8"))
    except FileNotFoundError:
        raise ModelUnusable(
            checkpoint.name, f"no {file} in it: not a checkpoint", "llava models lists what there is"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnusable(checkpoint.name, f"{file} cannot be read ({error})", again(checkpoint.name)) from None
    if not isinstance(found, dict):
        raise ModelUnusable(checkpoint.name, f"{file} is damaged", again(checkpoint.name))
    return found


def again(name: str) -> str:
    """The command that fetches a damaged model anew; none for a folder of the user's."""
    return f"llava models pull {name}" if name in ALIASES or ("/" in name and not Path(name).exists()) else ""
