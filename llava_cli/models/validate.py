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

from llava_cli import limits
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import ModelUnusable, brief, plainly
from llava_cli.models import digests, foreign_formats, incomplete
from llava_cli.models.original_format import convert_command, is_original
from llava_cli.models.registry import ALIASES, Checkpoint, hub_cache, is_commit
from llava_cli.models.untrusted_config import refusal, unknown_quantization
from llava_cli.regular_files import NotRegular, TooLarge, read
from llava_cli.safetensors_header import BadHeader, Header, read_header
from llava_cli.untrusted_text import one_line

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_CONFIGS = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
"""What else transformers takes options from."""
_FOREIGN = {
    ADAPTER_CONFIG: "holds an adapter",
    "audio_tokenizer_config.json": "asks for an audio tokenizer from the Hub",
}
"""Files that make transformers load something else."""
_PICKLE = r"(pytorch_model|model|consolidated|weights)\b.*\.(bin|pt|pth|ckpt)"
"""Weights as torch saves them."""
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""One process' part of a training run: where there are such, transformers loads them in place of the others."""


def check_files(checkpoint: Checkpoint) -> str:
    """Config and processor: there, readable, of a model that takes pictures and text. Returns its type."""
    name, folder = checkpoint.name, checkpoint.folder
    files = _files(checkpoint)
    if not (folder / CONFIG).exists():
        raise incomplete.no_config(checkpoint)
    incomplete.check_beginnings(checkpoint, [file for file in files if _ending(file) in _STAND_INS])
    config = read_json(checkpoint, CONFIG)
    kind = _kind(checkpoint, config)
    _refuse(checkpoint, CONFIG, unknown_quantization(config), "take the model unquantized: -p 4bit quantizes it here")
    _refuse(checkpoint, CONFIG, refusal(config))
    for file in files:
        _refuse(checkpoint, file, _FOREIGN.get(file) or (_DISTRIBUTED.fullmatch(file) and "is part of a training run"))
        if file in _CONFIGS:  # transformers ignores a damaged one of them, end tokens and all
            _refuse(checkpoint, file, refusal(read_json(checkpoint, file)))
    if not any((folder / f).exists() for f in ("processor_config.json", "preprocessor_config.json")):
        words = "no processor_config.json or preprocessor_config.json"
        raise incomplete.lacks_processor(checkpoint, words, again(name))
    if not any((folder / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise incomplete.lacks_processor(checkpoint, "no tokenizer.json", again(name))
    return kind


def _kind(checkpoint: Checkpoint, config: dict[str, Any]) -> str:
    """The model type that a config names; `ModelUnusable` for one that no class of transformers answers for."""
    from transformers.models.auto import modeling_auto

    name, kind, hint = checkpoint.name, config.get("model_type"), "llava models lists others"
    if is_original(config):
        raise ModelUnusable(name, "is in LLaVA's original format, not in that of transformers", convert_command(name))
    if not isinstance(kind, str):
        raise ModelUnusable(name, "its config.json names no model type", hint)
    if kind not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        if "auto_map" in config:
            raise ModelUnusable(name, "needs its own code, which is never run", hint)
        words = f"{one_line(kind)} models do not load as picture-and-text models"
        if kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            words += ": they read text alone"
        elif kind in modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            words += ": they write no text"
        raise ModelUnusable(name, words, hint)
    if config.get("is_encoder_decoder"):
        raise ModelUnusable(name, f"{kind} models are encoder-decoders, which are not supported", "llava models")
    return kind


def _refuse(checkpoint: Checkpoint, file: str, reason: str | None, hint: str = "llava models lists others") -> None:
    if reason:
        raise ModelUnusable(checkpoint.name, f"{file} {reason}", hint)


class Weights(list[Path]):
    """The files of a checkpoint's weights, and what their headers say."""

    def __init__(self, paths: Iterable[Path], headers: Iterable[Header] = ()) -> None:
        super().__init__(paths)
        headers = list(headers)
        tensors = {name: tensor for header in headers for name, tensor in header.items()}
        dtypes = {tensor.dtype for tensor in tensors.values()}
        self.bytes_per_weight = 4.0 if dtypes == {"F32"} else 2.0
        """In the files."""
        self.are_quantized = bool(dtypes & {"U8", "I8"}) and any(name.endswith(_SCALES) for name in tensors)
        """As bitsandbytes does it."""
        self.are_of_mlx = any(header.metadata.get("format") == "mlx" for header in headers)
        """Whether MLX wrote them, which has some axes in another order."""
        packed = {name.removesuffix(_SCALES[0]) for name in tensors if name.endswith(_SCALES[0])}
        self.numbers = sum(
            2 * (tensor.end - tensor.begin) if name in packed else tensor.numbers * _PACKED.get(tensor.dtype, 1)
            for name, tensor in tensors.items()
        )
        """How many weights they are."""


_SCALES = (".absmax", ".nested_absmax", ".SCB")
"""Endings of what bitsandbytes stores beside a layer's weights."""
_PACKED = {"U8": 2, "F4": 2}
"""Weights in one number of a file: two of 4 bits in a byte."""


def check_weights(checkpoint: Checkpoint) -> Weights:
    """The weight files of a checkpoint, all there and whole; `ModelUnusable` names the one that is not."""
    paths = _weights(checkpoint)
    if unfinished := next((path.name for path in paths if path.with_name(f"{path.name}.aria2").exists()), None):
        raise ModelUnusable(checkpoint.name, f"the download of {one_line(unfinished)} has not ended", "end it first")
    return Weights(paths, [_header(checkpoint, path) for path in paths])


def _header(checkpoint: Checkpoint, path: Path) -> Header:
    try:
        return read_header(path)
    except NotRegular as error:
        raise _unreadable(checkpoint, path.name, error) from None
    except (OSError, BadHeader):
        raise ModelUnusable(checkpoint.name, f"{path.name} is damaged or cut off", again(checkpoint.name)) from None


def _weights(checkpoint: Checkpoint) -> list[Path]:
    """Where transformers looks for them: a whole file comes before shards."""
    name, folder = checkpoint.name, checkpoint.folder
    paths = [folder / _WHOLE]
    if not paths[0].exists() and (folder / _INDEX).exists():
        shards = read_json(checkpoint, _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
            raise ModelUnusable(name, f"{_INDEX} is damaged", again(name))
        paths = [folder / _shard(checkpoint, shard) for shard in sorted(set(shards.values()))]
    for path in paths:
        if not path.exists():
            raise _no_weights(checkpoint, path.name)
    return paths


def _no_weights(checkpoint: Checkpoint, missing: str) -> ModelUnusable:
    """The error for a folder without one of its weight files, with what it has in their place."""
    name, folder = checkpoint.name, checkpoint.folder
    if missing == _WHOLE:
        if shards := sorted(folder.glob("model-*-of-*.safetensors")):
            words = f"{missing} is missing, and of the shards ({one_line(shards[0].name)} …) {_INDEX}"
            return incomplete.lacks(checkpoint, words, again(name))
        if pickle := next((name for name in sorted(os.listdir(folder)) if re.fullmatch(_PICKLE, name)), None):
            hint = "convert it to safetensors, or take another model"
            return ModelUnusable(name, f"{one_line(pickle)} is a pickle, which is never loaded", hint)
        if found := foreign_formats.in_folder(os.listdir(folder), os.fspath(folder)):
            return ModelUnusable(name, *found)
    return incomplete.lacks(checkpoint, f"{one_line(missing)} is missing", again(name))


_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


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
_STAND_INS = {".json", ".model", ".safetensors"}
"""Files in whose place another may be: large ones, and those that somebody may fetch one by one."""
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
    if checkpoint.adapter:
        digest.update(_adapter_digest(checkpoint, checkpoint.adapter))
    return digest.hexdigest()


def adapter_weights(folder: Path) -> Path | None:
    """The file of an adapter's tensors; None where there is none."""
    paths = (folder / name for name in ("adapter_model.safetensors", "adapter_model.bin"))
    return next((path for path in paths if path.exists()), None)


def _adapter_digest(checkpoint: Checkpoint, adapter: Path) -> bytes:
    """What tells an adapter from any other."""
    paths = [path for path in (adapter / ADAPTER_CONFIG, adapter_weights(adapter)) if path]
    try:
        return "".join(digests.sha256(paths)).encode()
    except OSError as error:
        raise _unreadable(checkpoint, os.path.basename(str(error.filename)), error) from None


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
