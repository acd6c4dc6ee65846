"""Converts a checkpoint: puts vision tower, projector, language model, tokenizer and configs together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli import files
from llava_cli.convert.configs import Original, Tower, decoder_config, llava_config, read_original, read_tower
from llava_cli.convert.locate import find_folder, hub_snapshot, is_repo
from llava_cli.convert.lora import merge_lora
from llava_cli.convert.output import check_space, new_folder, write_json, write_weights
from llava_cli.convert.processor import processor_files
from llava_cli.convert.rename import EMBEDDINGS, HEAD, PROJECTOR, SECOND_PROJECTOR, rename_tensors, rename_tower_tensors
from llava_cli.convert.tensors import StoredTensor, Tensors, computed_tensor, tensors_of, tensors_of_file
from llava_cli.convert.tokenizer import TOKENIZER_FILES, Tokenizer, read_tokenizer
from llava_cli.errors import ModelUnusable, OutputTaken, model_errors
from llava_cli.files import quoted
from llava_cli.models.checkpoint_files import ADAPTER_CONFIG, read_json
from llava_cli.models.families import recognize, template_for
from llava_cli.models.original_format import is_original
from llava_cli.models.registry import Checkpoint
from llava_cli.paths import scratch_folder
from llava_cli.prompts.chat_template import read_template
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    import torch

_PROJECTOR_FILE = "mm_projector.bin"
_EMBEDDINGS_MULTIPLE = 64
"""Embeddings that need more rows get a multiple of this many, as transformers' own converters do."""
_TOWER_LAYER = re.compile(r"vision_tower\.(?:vision_model\.)?encoder\.layers\.(\d+)\.")


def convert(
    name: str,
    out: Path,
    tower: str | None = None,
    base: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Converts the folder `name` into the new folder `out`; returns options that questions to it may need.

    `tower` is a folder with its vision tower, `base` one with the language model of a folder that has only a projector
    or a LoRA. `progress` is called with (bytes written, bytes in all). Raises `ModelUnusable` if a part is missing or
    transformers does not have it, `OutputTaken` if `out` cannot be written.
    """
    checkpoint = Checkpoint(name, find_folder(name))
    if os.path.lexists(out):
        raise OutputTaken(str(out), "is there already", "-o names a new folder")
    config = read_json(checkpoint, "config.json")
    if not is_original(config):
        words = f"not in LLaVA's original format, but a {one_line(str(config.get('model_type')))} model"
        raise ModelUnusable(name, words, f'llava ask -m {quoted(name)} img.jpg "what is this?"')
    original = read_original(checkpoint)
    with model_errors(name, "cannot be converted"):
        conversion = _Conversion(checkpoint, original, tower, base)
    with new_folder(out) as folder:
        conversion.write(folder, progress)
    return "" if original.model_type != "llava" or original.pads else "--fit crop"


class _Conversion:
    """The parts of the new checkpoint; nothing is written yet."""

    def __init__(self, checkpoint: Checkpoint, original: Original, tower: str | None, base: str | None) -> None:
        self.checkpoint, self.name, self.original, self._base = checkpoint, checkpoint.name, original, base
        self._tower_folder = self._find_tower(tower)
        self.tensors = rename_tensors(self.name, self._original_tensors())
        if original.model_type == "llava":
            self.tensors.pop("image_newline", None)  # trained, but used only for tiles
        self.tokenizer, image_tokens = self._read_tokenizer()
        self.tower = self._add_tower(read_tower(checkpoint, original, self._tower_folder))
        if original.projector == "linear":
            self.tensors |= _identity_layer(self.tensors)
        is_tied = self._tie_embeddings()
        decoder = decoder_config(checkpoint, original, self._resize_embeddings(), is_tied)
        has_bias = f"{PROJECTOR}.bias" in self.tensors
        self.config = llava_config(checkpoint, original, decoder, self.tower, image_tokens, has_bias)
        self._check_tensors()

    def write(self, folder: Path, progress: Callable[[int, int], None]) -> None:
        """Writes all files. Raises `OSError`, and `OutputTaken` if there is too little space."""
        check_space(folder, self.tensors)
        self._write_configs(folder)
        write_weights(folder, self.tensors, progress)

    def _original_tensors(self) -> Tensors:
        """The folder's own tensors over those of its base, by their original names."""
        folder = self.checkpoint.folder
        own = tensors_of(self.checkpoint)
        if (folder / _PROJECTOR_FILE).exists() and not own:
            own = tensors_of_file(self.name, folder / _PROJECTOR_FILE)
        is_lora = (folder / ADAPTER_CONFIG).exists()
        if any(name.startswith("model.layers.") for name in own) and not is_lora:
            return own
        if self._base is None:
            part = "a LoRA" if is_lora else "a projector" if own else "a config"
            base_name = self.original.content.get("_name_or_path")
            words = f"{part} without its language model" + (f" {one_line(str(base_name))}" if base_name else "")
            raise ModelUnusable(self.name, words, f"llava models convert {quoted(self.name)} --base FOLDER -o OUT")
        base = tensors_of(Checkpoint(self._base, find_folder(self._base)))
        return merge_lora(self.checkpoint, base) if is_lora else {**base, **own}

    def _find_tower(self, folder: str | None) -> Path | None:
        """The folder of the vision tower: the one that the user names, else the one in the config; None if absent."""
        if folder is not None:
            return find_folder(folder)
        name = self.original.tower
        for path in (Path(name), self.checkpoint.folder / name):
            if (path.is_absolute() or ".." not in path.parts) and os.path.isfile(path / "config.json"):
                return path
        return hub_snapshot(name)

    def _add_tower(self, tower: Tower) -> Tower:
        """Adds the vision tower's tensors if the folder has none; returns the tower as the language model uses it."""
        if not any(name.startswith("vision_tower.") for name in self.tensors):
            self.tensors |= rename_tower_tensors(self._separate_tower_tensors())
        if tower.is_clip:
            return tower
        # Like the original code: SigLIP without its last layer and its pooling head.
        layers = 1 + max((int(match[1]) for name in self.tensors if (match := _TOWER_LAYER.match(name))), default=-1)
        kept = layers - 1 if layers == int(tower.config["num_hidden_layers"]) else layers
        for name in list(self.tensors):
            if (match := _TOWER_LAYER.match(name)) and int(match[1]) >= kept:
                del self.tensors[name]
        return Tower({**tower.config, "num_hidden_layers": kept, "vision_use_head": False}, tower.preprocessing)

    def _separate_tower_tensors(self) -> Tensors:
        name, folder = self.original.tower, self._tower_folder
        if folder is None:
            words = f"its vision tower {one_line(name)} is not in it, and not on this machine"
            command = f"llava models convert {quoted(self.name)} --vision-tower FOLDER -o OUT"
            download = f"hf download {quoted(name)}; then again, or " if is_repo(name) else ""
            raise ModelUnusable(self.name, words, download + command)
        return tensors_of(Checkpoint(str(folder), folder))

    def _tie_embeddings(self) -> bool:
        """Whether embeddings and head are one tensor; if so, removes the head."""
        is_tied = bool(self.original.content.get("tie_word_embeddings")) or HEAD not in self.tensors
        if is_tied:
            self.tensors.pop(HEAD, None)
        return is_tied

    def _resize_embeddings(self) -> int:
        """Gives embeddings and head a row for each token, and returns their number of rows."""
        rows = self.tensors[EMBEDDINGS].shape[0] if EMBEDDINGS in self.tensors else 0
        if self.tokenizer.size <= rows:
            return rows
        rows = -(-self.tokenizer.size // _EMBEDDINGS_MULTIPLE) * _EMBEDDINGS_MULTIPLE
        for name in {EMBEDDINGS, HEAD} & self.tensors.keys():
            self.tensors[name] = _grow_rows(self.tensors[name], rows)
        return rows

    def _read_tokenizer(self) -> tuple[Tokenizer, dict[str, int]]:
        """The tokenizer, and the ids of its tokens for pictures."""
        has_own = any((self.checkpoint.folder / file).exists() for file in TOKENIZER_FILES)
        use_own = has_own or self._base is None
        checkpoint = self.checkpoint if use_own else Checkpoint(str(self._base), find_folder(str(self._base)))
        with scratch_folder() as scratch:
            tokenizer = read_tokenizer(checkpoint, scratch)
        image_tokens = ["<image>", "<video>"] if self.original.model_type == "llava_onevision" else ["<image>"]
        ids = {token: tokenizer.add(token) for token in image_tokens}
        if self.original.decoder != "qwen2" or not isinstance(tokenizer.config.get("pad_token"), str):
            tokenizer.add("<pad>")
            tokenizer.config["pad_token"] = "<pad>"
        return tokenizer, ids

    def _write_configs(self, folder: Path) -> None:
        """Writes the config, processor, tokenizer, template and generation config."""
        from transformers import AutoModelForImageTextToText

        config, tokenizer = self.config, self.tokenizer
        pad_id = tokenizer.added.get(tokenizer.config["pad_token"])
        model_class: Any = AutoModelForImageTextToText._model_mapping[type(config)]
        processors = processor_files(self.original, config, self.tower)
        contents = {
            "config.json": {**config.to_dict(), "architectures": [model_class.__name__], "pad_token_id": pad_id},
            "generation_config.json": self._generation_config(pad_id),
            **processors,
            **tokenizer.files(processors["processor_config.json"]["processor_class"]),
        }
        for file, content in contents.items():
            write_json(folder / file, content)
        family = recognize(config.model_type, config.text_config.model_type, tokenizer.added)
        template = (family and family.template) or template_for(tokenizer.added) or "llava-1.5"
        files.atomic_write(folder / "chat_template.jinja", [read_template(template).encode()])

    def _generation_config(self, pad_id: int | None) -> dict[str, Any]:
        """The folder's own generation config, with the new padding token."""
        own = {}
        if (self.checkpoint.folder / "generation_config.json").exists():
            own = read_json(self.checkpoint, "generation_config.json")
        ids = {key: getattr(self.config.text_config, key) for key in ("bos_token_id", "eos_token_id")}
        return {**{key: value for key, value in ids.items() if value is not None}, **own, "pad_token_id": pad_id}

    def _check_tensors(self) -> None:
        """Raises `ModelUnusable` unless transformers' model with this config has exactly these tensors."""
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
        shapes = {rename_source_key(name, renamings, [])[0]: tensor.shape for name, tensor in self.tensors.items()}
        if missing := sorted(expected.keys() - shapes.keys()):
            words = f"lacks {len(missing)} tensors, {missing[0]} first"
            raise ModelUnusable(self.name, words, "copy or download it again")
        if unknown := sorted(shapes.keys() - expected.keys()):
            raise ModelUnusable(self.name, f"transformers' LLaVA has no place for its {one_line(unknown[0])}")
        for name, shape in shapes.items():
            if shape != expected[name]:
                raise ModelUnusable(self.name, f"{name} is {list(shape)}, by its config {list(expected[name])}")


def _grow_rows(tensor: StoredTensor, rows: int) -> StoredTensor:
    """Embeddings with more rows; the new ones are the mean of the others, which is never the likeliest token."""

    def grow() -> torch.Tensor:
        import torch

        before = tensor.read()
        mean = before.float().mean(0, keepdim=True).to(before.dtype)
        return torch.cat([before, mean.expand(rows - before.shape[0], -1)])

    return computed_tensor(tensor, grow, (rows, *tensor.shape[1:]))


def _identity_layer(tensors: Tensors) -> Tensors:
    """A second layer that changes nothing, for a projector that has only one."""
    if f"{PROJECTOR}.weight" not in tensors:
        return {}
    weight = tensors[f"{PROJECTOR}.weight"]
    size = weight.shape[0]

    def identity() -> torch.Tensor:
        import torch

        return torch.eye(size, dtype=weight.read().dtype)

    layer: Tensors = {f"{SECOND_PROJECTOR}.weight": computed_tensor(weight, identity, (size, size))}
    if (bias := tensors.get(f"{PROJECTOR}.bias")) is not None:
        layer[f"{SECOND_PROJECTOR}.bias"] = computed_tensor(bias, lambda: bias.read() * 0)
    return layer
