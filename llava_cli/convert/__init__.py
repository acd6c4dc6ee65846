"""`llava models convert`: a folder of LLaVA's original code becomes a checkpoint of transformers' format.

    tensors.py       files -> tensors by their original names, one at a time; a LoRA merged into its base
    description.py   the original config -> transformers' config, and its processor's files
    tokenizer.py     the tokenizer, with tokens that stand for pictures
    this file        puts tower, projector and decoder together, and writes them, whole or not at all

Nothing of the folder is run: pickles are read by torch's reader of weights, and no tokenizer or template is used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli import files, limits
from llava_cli.convert.description import (
    Original,
    Tower,
    decoder_config,
    processor_files,
    read_original,
    read_tower,
    whole_config,
)
from llava_cli.convert.tensors import Stored, Tensors, computed, shards_of, tensors_of, tensors_of_file, with_lora
from llava_cli.convert.tokenizer import TOKENIZERS, Tokenizer, read_tokenizer
from llava_cli.errors import ModelUnusable, OutputTaken, model_errors, plainly
from llava_cli.files import quoted
from llava_cli.models.families import format_of, recognise
from llava_cli.models.original_format import is_original
from llava_cli.models.registry import Checkpoint, is_commit, is_folder, repo_cache
from llava_cli.models.validate import ADAPTER_CONFIG, read_json
from llava_cli.paths import expanded, scratch_folder
from llava_cli.prompts.chat_template import read_template
from llava_cli.regular_files import read
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    import torch

SHARD = 2 << 30
"""Bytes of a file of weights: as much is in memory at a time."""
_PROJECTOR = "mm_projector.bin"
_ROWS = 64
"""Of embeddings that grow, a multiple of which they then have: as transformers' own converters make them."""
_NAMES = (
    (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(.+)", r"vision_tower.\1"),
    (r"(?:model\.)?mm_projector\.0\.(.+)", r"multi_modal_projector.linear_1.\1"),
    (r"(?:model\.)?mm_projector\.2\.(.+)", r"multi_modal_projector.linear_2.\1"),
    (r"(?:model\.)?mm_projector\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"(?:model\.)?image_newline", "image_newline"),
    (r"lm_head\.(.+)", r"language_model.lm_head.\1"),
    (r"model\.((?:embed_tokens|layers|norm)\..+)", r"language_model.model.\1"),
)
"""Of tensors: what the original calls them, and what transformers' checkpoints do."""
_NOT_STORED = re.compile(r".*\.(inv_freq|position_ids|masked_bias)")
_EMBEDDINGS, _HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def convert(
    name: str,
    out: Path,
    tower: str | None = None,
    base: str | None = None,
    meter: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Converts the folder `name` into `out`, a new folder, and returns what the next question may need besides.

    `tower` is a folder with its vision tower, `base` one with the language model of a projector or LoRA that is alone.
    Raises `ModelUnusable` where something of it is missing or cannot be had in transformers, `OutputTaken` where `out`
    cannot be written.
    """
    checkpoint = Checkpoint(name, _folder(name))
    if os.path.lexists(out):
        raise OutputTaken(str(out), "is there already", "-o names a new folder")
    config = read_json(checkpoint, "config.json")
    if not is_original(config):
        words = f"not in LLaVA's original format, but a {one_line(str(config.get('model_type')))} model"
        raise ModelUnusable(name, words, f'llava ask -m {quoted(name)} img.jpg "what is this?"')
    original = read_original(checkpoint)
    with model_errors(name, "cannot be converted"):
        conversion = _Conversion(checkpoint, original, tower, base)
    with _new_folder(out) as folder:
        conversion.write(folder, meter)
    return "" if original.kind != "llava" or original.pads else "--fit crop"


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that is at `out` once all is in it. Raises `OutputTaken` where it cannot be written."""
    new = out.with_name(f".{out.name[:200]}.{os.urandom(4).hex()}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.make_new_folder(new)
        yield new
        os.rename(new, out)
        files.sync_folder(out.parent)
    except OSError as error:
        raise OutputTaken(str(out), plainly(error), "-o names another folder") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


class _Conversion:
    """What is made of one folder; nothing of it is written yet."""

    def __init__(self, checkpoint: Checkpoint, original: Original, tower: str | None, base: str | None) -> None:
        self.checkpoint, self.name, self.original, self._base = checkpoint, checkpoint.name, original, base
        self._tower_folder = self._find_tower(tower)
        self.tensors = self._renamed(self._tensors())
        self.tokenizer, tokens = self._read_tokenizer()
        self.tower = self._add_tower(read_tower(checkpoint, original, self._tower_folder))
        if original.projector == "linear":
            self.tensors |= _identity(self.tensors)
        tied = self._tie()
        decoder = decoder_config(checkpoint, original, self._make_rows(), tied)
        bias = "multi_modal_projector.linear_1.bias" in self.tensors
        self.config = whole_config(checkpoint, original, decoder, self.tower, tokens, bias)
        self._check()

    def write(self, folder: Path, meter: Callable[[int, int], None]) -> None:
        """Writes all files. Raises `OSError`, and `OutputTaken` where there is no room for them."""
        size, free = sum(tensor.bytes for tensor in self.tensors.values()), shutil.disk_usage(folder).free
        if size > free:
            words = f"needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there"
            raise OutputTaken(str(folder.parent), words, "-o names a folder on another disk")
        self._put_texts(folder)
        _put_weights(folder, self.tensors, meter)

    # Where tensors come from.

    def _tensors(self) -> Tensors:
        """The folder's own tensors over those of its base, by their original names."""
        folder = self.checkpoint.folder
        own = tensors_of(self.checkpoint)
        if (folder / _PROJECTOR).exists() and not own:
            own = tensors_of_file(self.name, folder / _PROJECTOR)
        is_lora = (folder / ADAPTER_CONFIG).exists()
        if any(name.startswith("model.layers.") for name in own) and not is_lora:
            return own
        what = "a LoRA" if is_lora else "a projector" if own else "a config"
        if self._base is None:
            named = self.original.content.get("_name_or_path")
            words = f"{what} without its language model" + (f" {one_line(str(named))}" if named else "")
            raise ModelUnusable(self.name, words, f"llava models convert {quoted(self.name)} --base FOLDER -o OUT")
        base = tensors_of(Checkpoint(self._base, _folder(self._base)))
        return with_lora(self.checkpoint, base) if is_lora else {**base, **own}

    def _renamed(self, tensors: Tensors) -> Tensors:
        """By the names of transformers' checkpoints. Raises `ModelUnusable` for one that has none there."""
        renamed: Tensors = {}
        for name, tensor in tensors.items():
            if _NOT_STORED.fullmatch(name) or name.startswith("model.vision_tower.vision_tower.vision_model.head."):
                continue
            new = next((re.sub(f"^{old}$", new, name) for old, new in _NAMES if re.fullmatch(old, name)), None)
            if new is None:
                words = f"transformers' LLaVA has no place for its {one_line(name)}"
                raise ModelUnusable(self.name, words, "llava models lists what needs no conversion")
            renamed[new] = tensor
        if self.original.kind == "llava":
            renamed.pop("image_newline", None)  # which is trained, and used for tiles alone
        return renamed

    def _find_tower(self, given: str | None) -> Path | None:
        """The folder of the vision tower: the one that was given, or the one that the config names."""
        if given is not None:
            return _folder(given)
        named = self.original.tower
        for path in (Path(named), self.checkpoint.folder / named):
            if (path.is_absolute() or ".." not in path.parts) and os.path.isfile(path / "config.json"):
                return path
        return _snapshot(named)

    def _add_tower(self, tower: Tower) -> Tower:
        """Sees that there are a vision tower's tensors, and returns the tower as the language model sees it."""
        if not any(name.startswith("vision_tower.") for name in self.tensors):
            self.tensors |= self._tower_from_elsewhere()
        if tower.is_clip:
            return tower
        # As the original does, SigLIP without its last layer and head.
        layers, depth = _layers(self.tensors), int(tower.config["num_hidden_layers"])
        kept = layers - 1 if layers == depth else layers
        for name in [name for name in self.tensors if (found := _LAYER.match(name)) and int(found[1]) >= kept]:
            del self.tensors[name]
        return Tower({**tower.config, "num_hidden_layers": kept, "vision_use_head": False}, tower.pixels)

    def _tower_from_elsewhere(self) -> Tensors:
        named, folder = self.original.tower, self._tower_folder
        if folder is None:
            words = f"its vision tower {one_line(named)} is not in it, and not on this machine"
            again = f"llava models convert {quoted(self.name)} --vision-tower FOLDER -o OUT"
            hub = f"hf download {quoted(named)}; then again, or " if _REPO.fullmatch(named) else ""
            raise ModelUnusable(self.name, words, hub + again)
        found = tensors_of(Checkpoint(str(folder), folder))
        whole = any(name.startswith("vision_model.") for name in found)
        towers = r"vision_model\.(?!head\.).+" if whole else r"(embeddings|encoder|pre_layrnorm|post_layernorm)\..+"
        return {
            f"vision_tower.{name}": tensor
            for name, tensor in found.items()
            if re.fullmatch(towers, name) and not _NOT_STORED.fullmatch(name)
        }

    def _tie(self) -> bool:
        """Whether one tensor is both embeddings and head, which is then there once."""
        tied = bool(self.original.content.get("tie_word_embeddings")) or _HEAD not in self.tensors
        if tied:
            self.tensors.pop(_HEAD, None)
        return tied

    def _make_rows(self) -> int:
        """How many rows embeddings and head have: as many as there are tokens, at least."""
        rows = self.tensors[_EMBEDDINGS].shape[0] if _EMBEDDINGS in self.tensors else 0
        if self.tokenizer.size <= rows:
            return rows
        wanted = -(-self.tokenizer.size // _ROWS) * _ROWS
        for name in {_EMBEDDINGS, _HEAD} & self.tensors.keys():
            self.tensors[name] = _with_rows(self.tensors[name], wanted)
        return wanted

    # What is beside them.

    def _read_tokenizer(self) -> tuple[Tokenizer, dict[str, int]]:
        """The tokenizer, and the ids of its tokens for pictures."""
        own = any((self.checkpoint.folder / file).exists() for file in TOKENIZERS)
        source = self.checkpoint if own or self._base is None else Checkpoint(self._base, _folder(self._base))
        with scratch_folder() as scratch:
            tokenizer = read_tokenizer(source, scratch)
        wanted = ["<image>", "<video>"] if self.original.kind == "llava_onevision" else ["<image>"]
        tokens = {token: tokenizer.add(token) for token in wanted}
        if self.original.decoder != "qwen2" or not isinstance(tokenizer.config.get("pad_token"), str):
            tokenizer.add("<pad>")
            tokenizer.config["pad_token"] = "<pad>"
        return tokenizer, tokens

    def _put_texts(self, folder: Path) -> None:
        """Config, processor, tokenizer, template and generation config."""
        from transformers import AutoModelForImageTextToText

        config, tokenizer = self.config, self.tokenizer
        pad_id = tokenizer.added.get(tokenizer.config["pad_token"])
        made: Any = AutoModelForImageTextToText._model_mapping[type(config)]
        described = {**config.to_dict(), "architectures": [made.__name__], "pad_token_id": pad_id}
        processors = processor_files(self.original, config, self.tower)
        texts = {
            "config.json": described,
            "generation_config.json": self._generation(pad_id),
            **processors,
            **tokenizer.files(processors["processor_config.json"]["processor_class"]),
        }
        for file, content in texts.items():
            files.put(folder / file, [json.dumps(content, indent=2).encode()])
        family = recognise(config.model_type, config.text_config.model_type, tokenizer.added)
        template = (family and family.template) or format_of(tokenizer.added) or "llava-1.5"
        files.put(folder / "chat_template.jinja", [read_template(template).encode()])

    def _generation(self, pad_id: int | None) -> dict[str, Any]:
        """The folder's own generation config, with the new token that fills."""
        own = {}
        if (self.checkpoint.folder / "generation_config.json").exists():
            own = read_json(self.checkpoint, "generation_config.json")
        ends = {key: getattr(self.config.text_config, key) for key in ("bos_token_id", "eos_token_id")}
        return {**{key: value for key, value in ends.items() if value is not None}, **own, "pad_token_id": pad_id}

    # Whether it is right.

    def _check(self) -> None:
        """Raises `ModelUnusable` unless these are the very tensors that transformers' model of that config has."""
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        config = self.config
        with model_errors(self.name, "its config.json describes no model"), torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            expected.pop("lm_head.weight", None)
        found = {rename_source_key(name, renamings, [])[0]: tensor.shape for name, tensor in self.tensors.items()}
        if missing := sorted(expected.keys() - found.keys()):
            words = f"lacks {len(missing)} tensors, {missing[0]} first"
            raise ModelUnusable(self.name, words, "copy or download it again")
        if unknown := sorted(found.keys() - expected.keys()):
            raise ModelUnusable(self.name, f"transformers' LLaVA has no place for its {one_line(unknown[0])}")
        for name, shape in found.items():
            if shape != expected[name]:
                raise ModelUnusable(self.name, f"{name} is {list(shape)}, by its config {list(expected[name])}")


_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LAYER = re.compile(r"vision_tower\.(?:vision_model\.)?encoder\.layers\.(\d+)\.")


def _layers(tensors: Tensors) -> int:
    return 1 + max((int(found[1]) for name in tensors if (found := _LAYER.match(name))), default=-1)


def _folder(name: str) -> Path:
    """The folder that a name means, or that a Hub repo is in; `ModelUnusable` where there is none."""
    path = expanded(name)
    if os.path.isdir(path):
        return path
    if is_folder(name) or not (found := _snapshot(name)):
        hint = "" if is_folder(name) or "/" not in name else f"hf download {quoted(name)}"
        raise ModelUnusable(name, "no such folder", hint)
    return found


def _snapshot(repo: str) -> Path | None:
    """Where the Hub's cache has a repo, in whatever format; None where it has not."""
    if not _REPO.fullmatch(repo):
        return None
    cache = repo_cache(repo)
    try:
        commit = read(cache / "refs" / "main", limits.COMMIT_BYTES).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    folder = cache / "snapshots" / commit
    return folder if is_commit(commit) and folder.is_dir() else None


def _with_rows(tensor: Stored, rows: int) -> Stored:
    """Embeddings with more rows: the mean of the others, which is never the likeliest token."""

    def grow() -> torch.Tensor:
        import torch

        before = tensor.read()
        mean = before.float().mean(0, keepdim=True).to(before.dtype)
        return torch.cat([before, mean.expand(rows - before.shape[0], -1)])

    return computed(tensor, grow, (rows, *tensor.shape[1:]))


def _identity(tensors: Tensors) -> Tensors:
    """A second layer that changes nothing, behind a projector of one."""
    first = "multi_modal_projector.linear_1"
    if f"{first}.weight" not in tensors:
        return {}
    weight = tensors[f"{first}.weight"]
    size = weight.shape[0]

    def square() -> torch.Tensor:
        import torch

        return torch.eye(size, dtype=weight.read().dtype)

    second: Tensors = {"multi_modal_projector.linear_2.weight": computed(weight, square, (size, size))}
    if (bias := tensors.get(f"{first}.bias")) is not None:
        second["multi_modal_projector.linear_2.bias"] = computed(bias, lambda: bias.read() * 0)
    return second


def _put_weights(folder: Path, tensors: Tensors, meter: Callable[[int, int], None]) -> None:
    """Writes all tensors, a file at a time, and the index of several files. Raises `OSError`."""
    shards = list(shards_of(tensors, SHARD))
    total, done = sum(tensor.bytes for tensor in tensors.values()), 0
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _put_shard(folder / file, {name: tensors[name].read() for name in names})
        index |= dict.fromkeys(names, file)
        done += sum(tensors[name].bytes for name in names)
        meter(done, total)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        files.put(folder / "model.safetensors.index.json", [json.dumps(content, indent=2).encode()])


def _put_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # A copy of what is a part of something else: safetensors takes no tensors that share memory.
    alone: dict[str, torch.Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        is_alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in used
        alone[name] = tensor.contiguous() if is_alone else tensor.clone().contiguous()
        used.add(storage.data_ptr())
    try:
        save_file(alone, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(plainly(error)) from None
    with open(path, "rb") as written:
        os.fsync(written.fileno())
