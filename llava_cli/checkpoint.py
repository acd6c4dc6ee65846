"""Judges a checkpoint from its files, before a weight is read.

A folder that is no LLaVA, lacks a shard, holds pickles or would have something else loaded is refused at once, by name.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_cli import digests, limits
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import ModelUnusable, brief, plainly
from llava_cli.registry import ALIASES, Checkpoint, hub_cache, is_commit
from llava_cli.regular_files import NotRegular, TooLarge, read
from llava_cli.safetensors_header import BadHeader, StoredTensor, read_header
from llava_cli.untrusted_config import refusal
from llava_cli.untrusted_text import one_line

CONFIG = "config.json"
_CONFIGS = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
"""What else transformers takes options from."""
_FOREIGN = {
    "adapter_config.json": "holds an adapter, which is not loaded",
    "audio_tokenizer_config.json": "asks for an audio tokenizer from the Hub",
}
"""Files that make transformers load something else."""
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""One process' part of a training run: where there are such, transformers loads them in place of the others."""


def check_files(checkpoint: Checkpoint) -> str:
    """Config and processor: there, readable, of a model that takes pictures and text. Returns its type."""
    name, folder = checkpoint.name, checkpoint.folder
    config = read_json(checkpoint, CONFIG)
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelUnusable(name, "its config.json names no model type", "llava models lists others")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        if "auto_map" in config:
            raise ModelUnusable(name, "needs its own code, which is never run", "llava models lists others")
        words = f"{one_line(kind)} models do not load as picture-and-text models"
        raise ModelUnusable(name, words, "llava models lists others")
    if config.get("is_encoder_decoder"):
        raise ModelUnusable(name, f"{kind} models are encoder-decoders, which are not supported", "llava models")
    _refuse(checkpoint, CONFIG, refusal(config))
    for file in _files(checkpoint):
        _refuse(checkpoint, file, _FOREIGN.get(file) or (_DISTRIBUTED.fullmatch(file) and "is part of a training run"))
        if file in _CONFIGS:  # transformers ignores a damaged one of them, end tokens and all
            _refuse(checkpoint, file, refusal(read_json(checkpoint, file)))
    if not any((folder / f).exists() for f in ("processor_config.json", "preprocessor_config.json")):
        raise ModelUnusable(name, "no processor_config.json or preprocessor_config.json", again(name))
    if not any((folder / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelUnusable(name, "no tokenizer.json", again(name))
    return kind


def _refuse(checkpoint: Checkpoint, file: str, reason: str | None) -> None:
    if reason:
        raise ModelUnusable(checkpoint.name, f"{file} {reason}", "llava models lists others")


class Weights(list[Path]):
    """The files of a checkpoint's weights, and what their headers say."""

    def __init__(self, paths: Iterable[Path], tensors: Iterable[StoredTensor]) -> None:
        super().__init__(paths)
        self.bytes_per_weight = 4.0 if {tensor.dtype for tensor in tensors} == {"F32"} else 2.0
        """In the files."""


def check_weights(checkpoint: Checkpoint) -> Weights:
    """The weight files of a checkpoint, all there and whole; `ModelUnusable` names the one that is not."""
    paths = _weights(checkpoint)
    return Weights(paths, [tensor for path in paths for tensor in _header(checkpoint, path).values()])


def _header(checkpoint: Checkpoint, path: Path) -> dict[str, StoredTensor]:
    try:
        return read_header(path)
    except NotRegular as error:
        raise _unreadable(checkpoint, path.name, error) from None
    except (OSError, BadHeader):
        raise ModelUnusable(checkpoint.name, f"{path.name} is damaged or cut off", again(checkpoint.name)) from None


def _weights(checkpoint: Checkpoint) -> list[Path]:
    """Where transformers looks for them: a whole file comes before shards."""
    name, folder = checkpoint.name, checkpoint.folder
    paths = [folder / "model.safetensors"]
    if not paths[0].exists() and (folder / _INDEX).exists():
        shards = read_json(checkpoint, _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
            raise ModelUnusable(name, f"{_INDEX} is damaged", again(name))
        paths = [folder / _shard(checkpoint, shard) for shard in sorted(set(shards.values()))]
    for path in paths:
        if not path.exists():
            pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
            if pickles and len(paths) == 1:
                hint = "convert it to safetensors, or take another model"
                raise ModelUnusable(name, f"{pickles[0].name} is a pickle, which is never loaded", hint)
            raise ModelUnusable(name, f"{one_line(path.name)} is missing", again(name))
    return paths


_INDEX = "model.safetensors.index.json"


def _shard(checkpoint: Checkpoint, name: str) -> str:
    """The name of a weight file of the folder; an index could name any file on this machine."""
    plain = len(name) <= limits.NAME_CHARACTERS and not any(sign in name for sign in "/\\\0")
    if not plain or name.startswith(".") or not name.endswith(".safetensors"):
        words = f"{_INDEX} names {one_line(name)!r}, which is no safetensors file of its folder"
        raise ModelUnusable(checkpoint.name, words, again(checkpoint.name))
    return name


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    """What an answer may depend on: the files that somebody may open, and their sizes, in an order of their own.

    Raises `ModelUnusable` where the folder cannot be read, or one of them is no regular file.
    """
    sizes = {}
    for name in _names(checkpoint):
        try:
            status = os.stat(checkpoint.folder / name)
            if stat.S_ISREG(status.st_mode):
                sizes[name] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise NotRegular(checkpoint.folder / name)
        except FileNotFoundError:  # a link to nothing
            continue
        except OSError as error:
            raise _unreadable(checkpoint, name, error) from None
    return sizes


def _names(checkpoint: Checkpoint) -> list[str]:
    """Of all but hidden files and those that are never opened; of subfolders texts alone: templates, and tokenizers."""
    folder = checkpoint.folder
    try:
        names = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
        for subfolder in [name for name in names if os.path.isdir(folder / name)]:
            names += [
                f"{subfolder}/{name}" for name in sorted(os.listdir(folder / subfolder)) if _ending(name) in _TEXTS
            ]
    except OSError as error:
        raise ModelUnusable(checkpoint.name, f"cannot be read ({plainly(error)})") from None
    return [name for name in names if _ending(name) not in _NEVER_OPENED]


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


_TEXTS = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
_NEVER_OPENED = {
    *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".py", ".md", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4"),
}
"""Pickles and weights in other formats, code, and what is for people."""


def _unreadable(checkpoint: Checkpoint, file: str, error: OSError) -> ModelUnusable:
    words = error.strerror if isinstance(error, (NotRegular, TooLarge)) else f"cannot be read ({plainly(error)})"
    return ModelUnusable(checkpoint.name, f"{one_line(file)} {words}", again(checkpoint.name))


def fingerprint(checkpoint: Checkpoint) -> str:
    """What tells a checkpoint from any other: a hash of its files' names, sizes and contents.

    In the Hub's own cache the commit stands for the contents. Raises `ModelUnusable` where they cannot be read.
    """
    sizes, commit = _files(checkpoint), _commit(checkpoint.folder)
    try:
        contents = [commit] * len(sizes) if commit else digests.sha256([checkpoint.folder / name for name in sizes])
    except OSError as error:
        raise _unreadable(checkpoint, os.path.basename(str(error.filename)), error) from None
    digest = hashlib.sha256()
    for (name, size), content in zip(sizes.items(), contents, strict=True):
        for field in (os.fsencode(name), str(size).encode(), content.encode()):
            digest.update(len(field).to_bytes(8, "little") + field)
    return digest.hexdigest()


def _commit(folder: Path) -> str | None:
    """The repo and commit that a folder holds; None outside the Hub's own cache, where anybody gives names."""
    folder = folder.resolve()
    snapshots, repo = folder.parent, folder.parent.parent
    known = snapshots.name == "snapshots" and repo.name.startswith("models--") and is_commit(folder.name)
    return f"{repo.name} {folder.name}" if known and repo.parent == hub_cache().resolve() else None


def read_json(checkpoint: Checkpoint, file: str) -> dict[str, Any]:
    """A JSON object of the checkpoint's folder; `ModelUnusable` where it is none."""
    bounds = Bounds(limits.CONFIG_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)
    try:
        data = read(checkpoint.folder / file, limits.CONFIG_BYTES)
        data.decode("utf-8")  # the parser takes UTF-16, too, which transformers does not
        found = loads(data, bounds)
    except FileNotFoundError:
        raise ModelUnusable(
            checkpoint.name, f"no {file} in it: not a checkpoint", "llava models lists what there is"
        ) from None
    except OSError as error:
        raise _unreadable(checkpoint, file, error) from None
    except ValueError as error:
        words = f"{file} cannot be read ({brief(error)})"
        raise ModelUnusable(checkpoint.name, words, again(checkpoint.name)) from None
    if not isinstance(found, dict):
        raise ModelUnusable(checkpoint.name, f"{file} is damaged", again(checkpoint.name))
    return found


def again(name: str) -> str:
    """The command that fetches a damaged model anew; none for a folder of the user's."""
    return f"llava models pull {name}" if name in ALIASES or ("/" in name and not Path(name).exists()) else ""
