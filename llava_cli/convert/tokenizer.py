"""Converts the tokenizer of an original checkpoint, and adds transformers' tokens for pictures."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava_cli import files, limits
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import ModelUnusable, message_line, model_errors
from llava_cli.models.checkpoint_files import read_json
from llava_cli.models.registry import Checkpoint
from llava_cli.models.untrusted_config import refusal
from llava_cli.prompts.sandbox import TextSandbox
from llava_cli.regular_files import read

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (FILE, "tokenizer.model", "vocab.json")
"""Every tokenizer has one of these files."""
_DROPPED = ("auto_map", "chat_template", "added_tokens_decoder", "processor_class", "is_local", "local_files_only")
"""Keys of a tokenizer's config for code, a template without pictures, its origin, and what `tokenizer.json` has."""


class Tokenizer:
    """A tokenizer's `tokenizer.json` and `tokenizer_config.json`, in memory."""

    def __init__(self, content: dict[str, Any], config: dict[str, Any]) -> None:
        self.content, self.config = content, config

    @property
    def added(self) -> dict[str, int]:
        """The ids of tokens that are not in the model's vocabulary proper."""
        return {token["content"]: token["id"] for token in self.content["added_tokens"]}

    @property
    def size(self) -> int:
        """The largest id plus one."""
        vocabulary = self.content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return 1 + max((*ids, *self.added.values()), default=-1)

    def add(self, token: str) -> int:
        """The id of a special token, which is added if there is none."""
        if token in self.added:
            return self.added[token]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        self.content["added_tokens"].append({"id": self.size, "content": token, **flags, "special": True})
        return self.added[token]

    def files(self, processor_class: str) -> dict[str, dict[str, Any]]:
        """The contents of both files by name, for a processor of this class."""
        config = {key: value for key, value in self.config.items() if key not in _DROPPED}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config |= {"processor_class": processor_class, "extra_special_tokens": {"image_token": "<image>"}}
        return {FILE: self.content, CONFIG: config | {"image_token": "<image>", "padding_side": "left"}}


def read_tokenizer(checkpoint: Checkpoint, scratch: Path) -> Tokenizer:
    """A folder's tokenizer; one without `tokenizer.json` is converted in the folder `scratch`.

    Raises `ModelUnusable` if there is none, it cannot be read, or a library for it is not installed.
    """
    folder, config = checkpoint.folder, {}
    if (folder / CONFIG).exists():
        config = read_json(checkpoint, CONFIG)
        if reason := refusal({key: value for key, value in config.items() if key not in _DROPPED}):
            raise ModelUnusable(checkpoint.name, f"its {CONFIG} {reason}")
    if not (folder / FILE).exists():
        config = _convert(checkpoint, config, scratch)
        folder = scratch
    try:
        bounds = Bounds(limits.TOKENIZER_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)
        content = loads(read(folder / FILE, bounds.bytes), bounds)
        tokenizer = Tokenizer(content, config)
        assert tokenizer.size > 0 and all(type(number) is int for number in tokenizer.added.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ModelUnusable(checkpoint.name, f"its {FILE} cannot be read ({message_line(error)})") from None
    return tokenizer


def _convert(checkpoint: Checkpoint, config: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Writes `tokenizer.json` from a sentencepiece model, or a vocabulary and merges; returns its config."""
    names = ("tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
    present = [name for name in names if (checkpoint.folder / name).exists()]
    if not {"tokenizer.model", "vocab.json"} & {*present}:
        raise ModelUnusable(checkpoint.name, f"no {FILE} in it", "copy that of its language model into it")
    if "tokenizer.model" in present and not all(map(find_spec, ("sentencepiece", "google.protobuf"))):
        words = "its tokenizer.model needs sentencepiece, which is not installed"
        raise ModelUnusable(checkpoint.name, words, "pip install 'llava-cli[convert]'")
    from transformers import AutoTokenizer

    for name in present:
        files.write_new(scratch / name, read(checkpoint.folder / name, limits.TOKENIZER_BYTES))
    kept = {"add_bos_token": True} if "tokenizer.model" in present else {}  # as Llama's own tokenizer does
    kept |= {key: value for key, value in config.items() if key not in _DROPPED}
    model_type = "llama" if "tokenizer.model" in present else "qwen2"
    for name, content in ((CONFIG, kept), ("config.json", {"model_type": model_type})):
        files.write_new(scratch / name, json.dumps(content).encode())
    with model_errors(checkpoint.name, "its tokenizer cannot be translated", "copy that of its language model into it"):
        tokenizer: Any = AutoTokenizer.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)
        tokenizer.save_pretrained(scratch)
        if "tokenizer.model" in present:
            _take_pipeline(scratch)
    return dict(json.loads((scratch / CONFIG).read_text()))


def _take_pipeline(folder: Path) -> None:
    """Gives `tokenizer.json` the merges of `tokenizer.model` in their order, and its way of splitting text.

    transformers orders merges by id, not by score, and puts no space before a text that follows a special token.
    """
    sandbox = TextSandbox(folder / "tokenizer.model")
    try:
        own = json.loads(sandbox.tokenizer_json())
    finally:
        sandbox.end()
    content = json.loads((folder / FILE).read_bytes())
    content["model"]["merges"] = own["model"]["merges"]
    content |= {part: own[part] for part in ("normalizer", "pre_tokenizer", "decoder")}
    (folder / FILE).unlink()
    files.write_new(folder / FILE, json.dumps(content).encode())
