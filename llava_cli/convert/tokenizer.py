"""The tokenizer of an original checkpoint, with the tokens that transformers puts in the place of pictures."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava_cli import files, limits
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import ModelUnusable, brief, model_errors
from llava_cli.models.registry import Checkpoint
from llava_cli.models.untrusted_config import refusal
from llava_cli.models.validate import read_json
from llava_cli.regular_files import read

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKENIZERS = (FILE, "tokenizer.model", "vocab.json")
"""Files, one of which every tokenizer has."""
_LEFT_OUT = ("auto_map", "chat_template", "added_tokens_decoder", "processor_class", "is_local", "local_files_only")
"""Of a tokenizer's config: code, a template of text alone, where it was, and what `tokenizer.json` says better."""


class Tokenizer:
    """The two files of a tokenizer, in memory."""

    def __init__(self, content: dict[str, Any], config: dict[str, Any]) -> None:
        self.content, self.config = content, config

    @property
    def added(self) -> dict[str, int]:
        """Tokens beside the vocabulary proper, and their ids."""
        return {token["content"]: token["id"] for token in self.content["added_tokens"]}

    @property
    def size(self) -> int:
        """One more than the largest id."""
        vocabulary = self.content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return 1 + max((*ids, *self.added.values()), default=-1)

    def add(self, token: str) -> int:
        """The id of a special token, which is made where there is none."""
        if token in self.added:
            return self.added[token]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        self.content["added_tokens"].append({"id": self.size, "content": token, **flags, "special": True})
        return self.added[token]

    def files(self, processor: str) -> dict[str, dict[str, Any]]:
        """What the two files say, for a processor of that class."""
        config = {key: value for key, value in self.config.items() if key not in _LEFT_OUT}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config |= {"processor_class": processor, "extra_special_tokens": {"image_token": "<image>"}}
        return {FILE: self.content, CONFIG: config | {"image_token": "<image>", "padding_side": "left"}}


def read_tokenizer(checkpoint: Checkpoint, scratch: Path) -> Tokenizer:
    """A folder's tokenizer; that of sentencepiece is translated, in `scratch`.

    Raises `ModelUnusable` where it has none, one that cannot be read, or what is needed for that is not installed.
    """
    folder, config = checkpoint.folder, {}
    if (folder / CONFIG).exists():
        config = read_json(checkpoint, CONFIG)
        if reason := refusal({key: value for key, value in config.items() if key not in _LEFT_OUT}):
            raise ModelUnusable(checkpoint.name, f"its {CONFIG} {reason}")
    if not (folder / FILE).exists():
        config = _translate(checkpoint, config, scratch)
        folder = scratch
    try:
        bounds = Bounds(limits.TOKENIZER_BYTES, limits.JSON_DEPTH, limits.JSON_ITEMS)
        content = loads(read(folder / FILE, bounds.bytes), bounds)
        tokenizer = Tokenizer(content, config)
        assert tokenizer.size > 0 and all(type(number) is int for number in tokenizer.added.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ModelUnusable(checkpoint.name, f"its {FILE} cannot be read ({brief(error)})") from None
    return tokenizer


def _translate(checkpoint: Checkpoint, config: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Writes `tokenizer.json` of what sentencepiece, or a vocabulary and merges, say; returns the config beside it."""
    names = ("tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
    found = [name for name in names if (checkpoint.folder / name).exists()]
    if not {"tokenizer.model", "vocab.json"} & {*found}:
        raise ModelUnusable(checkpoint.name, f"no {FILE} in it", "copy that of its language model into it")
    if "tokenizer.model" in found and not all(map(find_spec, ("sentencepiece", "google.protobuf"))):
        words = "its tokenizer.model needs sentencepiece, which is not installed"
        raise ModelUnusable(checkpoint.name, words, "pip install 'llava-cli[convert]'")
    from transformers import AutoTokenizer

    for name in found:
        files.put_new(scratch / name, read(checkpoint.folder / name, limits.TOKENIZER_BYTES))
    kept = {"add_bos_token": True} if "tokenizer.model" in found else {}  # what Llama's own does
    kept |= {key: value for key, value in config.items() if key not in _LEFT_OUT}
    model_type = "llama" if "tokenizer.model" in found else "qwen2"
    for name, content in ((CONFIG, kept), ("config.json", {"model_type": model_type})):
        files.put_new(scratch / name, json.dumps(content).encode())
    with model_errors(checkpoint.name, "its tokenizer cannot be translated", "copy that of its language model into it"):
        made: Any = AutoTokenizer.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)
        made.save_pretrained(scratch)
    return dict(json.loads((scratch / CONFIG).read_text()))
