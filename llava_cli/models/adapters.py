"""Finds the PEFT adapter that a user names, and the base model that it was trained on.

An adapter is a folder with `adapter_config.json` and its tensors. Its config comes from a stranger: the base that it
names is looked up on this machine and never downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from llava_cli import limits
from llava_cli.errors import InputMissing, ModelUnusable, UsageError
from llava_cli.files import quoted
from llava_cli.models import registry
from llava_cli.models.adapter_config import read_adapter_config
from llava_cli.models.aliases import ALIASES
from llava_cli.models.checkpoint_files import ADAPTER_CONFIG, CONFIG, adapter_weights, is_adapter, read_json
from llava_cli.models.registry import Checkpoint, on_disk
from llava_cli.paths import expand_user
from llava_cli.safetensors_header import BadHeader, read_header
from llava_cli.untrusted_text import one_line

_FULL_MODEL_FILES = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*")
"""Patterns of files that hold all of a model."""
_ORIGINAL_PROJECTOR = "non_lora_trainables.bin"
"""The projector, which LLaVA's original training code writes beside an adapter."""


def find(adapter: str, model: str | None) -> Checkpoint:
    """The checkpoint `model`, or the one that an adapter was trained on, with that adapter.

    Raises `ModelUnusable` as `registry.find` does, and if an adapter's base is not on this machine; `InputMissing` if
    there is no such adapter; `UsageError` if there are two.
    """
    if model and is_adapter(model):
        _model_folder(model)
        raise UsageError(f"--adapter {adapter}", f"{model} is an adapter itself", f"-m BASE --adapter {adapter}")
    folder = _adapter_option_folder(adapter)
    _refuse_original(adapter, folder)
    base = registry.find(model) if model else _find_base(adapter, folder)
    return Checkpoint(base.name, base.folder, folder)


def find_by_name(name: str) -> Checkpoint:
    """The checkpoint of a model's name that is an adapter's folder. Raises as `find`."""
    folder = _model_folder(name)
    return Checkpoint(name, _find_base(name, folder).folder, folder)


def check(folder: Path) -> None:
    """Checks an adapter before a weight is read. Raises `ModelUnusable` if it cannot be merged."""
    name = str(folder)
    read_adapter_config(folder)
    path = adapter_weights(folder)
    if path is None:
        raise ModelUnusable(name, "no adapter_model.safetensors in it: the tensors are missing", "copy it again")
    if path.suffix == ".safetensors":
        try:
            read_header(path)
        except (OSError, BadHeader):
            raise ModelUnusable(name, f"{path.name} is damaged or cut off", "copy it again") from None
    _require_peft(name)


def base_name(name: str, folder: Path) -> str:
    """The base model that the config of an adapter, called `name`, asks for; empty if there is none."""
    base = read_json(Checkpoint(name, folder), ADAPTER_CONFIG).get("base_model_name_or_path")
    return base.rstrip("/\\") if isinstance(base, str) and len(base) <= limits.PATH_CHARACTERS else ""


def _model_folder(name: str) -> Path:
    """The adapter's folder of that name. Raises `ModelUnusable` if it also holds a full model."""
    folder = expand_user(name)
    if any(next(folder.glob(pattern), None) for pattern in _FULL_MODEL_FILES):
        words = f"{ADAPTER_CONFIG} holds an adapter, and other files a whole model"
        raise ModelUnusable(name, words, f"-m BASE --adapter {quoted(name)}; or take {ADAPTER_CONFIG} out of it")
    _refuse_original(name, folder)
    return folder


def _adapter_option_folder(adapter: str) -> Path:
    """The folder that `--adapter` names."""
    folder = expand_user(adapter)
    thing = f"--adapter {adapter}"
    if not os.path.isdir(folder):
        raise InputMissing(thing, "no such folder", f"--adapter takes a folder with {ADAPTER_CONFIG}")
    if not os.path.isfile(folder / ADAPTER_CONFIG):
        inside = sorted((path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")), key=_by_number)
        hint = f"--adapter {quoted(inside[-1])}" if inside else f"--adapter takes a folder with {ADAPTER_CONFIG}"
        raise ModelUnusable(thing, f"no {ADAPTER_CONFIG} in it: not an adapter", hint)
    return folder


def _by_number(folder: Path) -> tuple[int, str]:
    """A sort key that puts `checkpoint-100` after `checkpoint-20`."""
    return len(folder.name), folder.name


def _refuse_original(name: str, folder: Path) -> None:
    if (folder / _ORIGINAL_PROJECTOR).exists():
        words = "a LoRA in LLaVA's original format"
        raise ModelUnusable(name, words, f"llava models convert {quoted(name)} --base BASE -o OUT; then -m OUT")


def _find_base(name: str, folder: Path) -> Checkpoint:
    """The checkpoint that an adapter was trained on, by the name in its config."""
    base = base_name(name, folder)
    by_hand = f"llava ask -m BASE --adapter {quoted(name)} …"
    if not base:
        raise ModelUnusable(name, "an adapter that does not name its base model", by_hand)
    for candidate in _candidates(base):
        for path in _places(candidate, folder):
            if os.path.isfile(path / CONFIG):
                return Checkpoint(candidate, path)
    repo = next(filter(_is_repo, _candidates(base)), None)
    alias = next((alias for alias, known in ALIASES.items() if known.repo == repo), None)
    hint = f"llava models pull {alias or repo}" if repo else by_hand
    raise ModelUnusable(name, f"an adapter of {one_line(base)}, which is not on this machine", hint)


def _candidates(base: str) -> Iterator[str]:
    """Names that a base may have here: as in the config, and without the suffix of a quantized copy."""
    if match := re.search(r"(?:^|[/\\])models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]", base + "/"):
        base = f"{match[1]}/{match[2]}"  # a path into somebody's cache of the Hub
    unquantized = re.sub(r"(-unsloth)?-bnb-[48]bit$|-(4|8)bit$", "", base)
    last = re.split(r"[/\\]", unquantized)[-1]
    yield from (known.repo for known in ALIASES.values() if known.repo.split("/")[-1] == last)
    yield from dict.fromkeys((unquantized, base, last))


def _is_repo(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def _places(name: str, adapter: Path) -> Iterator[Path]:
    """Where a base of that name may be: in the Hub's cache, at its path, or near its adapter."""
    if (_is_repo(name) or name in ALIASES) and (snapshot := on_disk(name)):
        yield snapshot
    path = Path(name)
    if path.is_absolute():
        yield path
    elif ".." not in path.parts:
        adapter = adapter.resolve()
        yield from (folder / name for folder in (Path(), adapter, adapter.parent, adapter.parent.parent))


def _require_peft(name: str) -> None:
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise ModelUnusable(name, "adapters need PEFT, which is not installed", "pip install 'llava-cli[adapters]'")
