"""PEFT adapters: found on disk, judged, and merged into a model's weights before anything else is done with them.

An adapter is a folder with `adapter_config.json` and its tensors. Its config is a stranger's: the name of its base is
looked up on this machine and never fetched, its regular expressions are not run, and its tensors alone say which
modules it changes. Each tensor has to land in the model, and what cannot be merged exactly is refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_cli import limits
from llava_cli.errors import InputMissing, ModelUnusable, UsageError, model_errors
from llava_cli.files import quoted
from llava_cli.models import registry
from llava_cli.models.registry import ALIASES, Checkpoint, default_name, is_folder, on_disk
from llava_cli.models.validate import ADAPTER_CONFIG, CONFIG, adapter_weights, read_json
from llava_cli.paths import expanded
from llava_cli.safetensors_header import BadHeader, read_header
from llava_cli.settings import Settings
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

_WHOLE_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*")
"""Names of files that hold all of a model."""
_ORIGINAL = "non_lora_trainables.bin"
"""What LLaVA's original training code writes beside an adapter: the projector."""


# Which checkpoint, and which adapter.


def find(settings: Settings) -> Checkpoint:
    """The checkpoint that the settings ask for, with the adapter that is merged into it.

    Raises `ModelUnusable` as `registry.find` does, and where an adapter's base is not on this machine; `InputMissing`
    where there is no such adapter; `UsageError` where there are two.
    """
    name, adapter = settings.model, settings.adapter
    if name and (own := _adapter_folder(name)):
        _refuse_original(name, own)
        if adapter:
            raise UsageError(f"--adapter {adapter}", f"{name} is an adapter itself", f"-m BASE --adapter {adapter}")
        return Checkpoint(name, _base(name, own).folder, own)
    if not adapter:
        return registry.find(default_name(settings))
    folder = _existing(adapter)
    _refuse_original(adapter, folder)
    base = registry.find(name) if name else _base(adapter, folder)
    return Checkpoint(base.name, base.folder, folder)


def find_named(name: str) -> Checkpoint:
    """As `find`, for a model's name alone."""
    return find(Settings(model=name))


def _adapter_folder(name: str) -> Path | None:
    """The folder of that name where it is an adapter's; `ModelUnusable` where it is a whole model's, too."""
    if not is_folder(name) or not os.path.isfile((folder := expanded(name)) / ADAPTER_CONFIG):
        return None
    if any(next(folder.glob(pattern), None) for pattern in _WHOLE_WEIGHTS):
        words = f"{ADAPTER_CONFIG} holds an adapter, and other files a whole model"
        raise ModelUnusable(name, words, f"-m BASE --adapter {quoted(name)}; or take {ADAPTER_CONFIG} out of it")
    return folder


def _existing(adapter: str) -> Path:
    """The folder that `--adapter` names."""
    folder = expanded(adapter)
    thing = f"--adapter {adapter}"
    if not os.path.isdir(folder):
        raise InputMissing(thing, "no such folder", f"--adapter takes a folder with {ADAPTER_CONFIG}")
    if not os.path.isfile(folder / ADAPTER_CONFIG):
        inside = sorted((path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")), key=_step)
        hint = f"--adapter {quoted(inside[-1])}" if inside else f"--adapter takes a folder with {ADAPTER_CONFIG}"
        raise ModelUnusable(thing, f"no {ADAPTER_CONFIG} in it: not an adapter", hint)
    return folder


def _step(folder: Path) -> tuple[int, str]:
    """A key by which `checkpoint-100` comes after `checkpoint-20`."""
    return len(folder.name), folder.name


def _refuse_original(name: str, folder: Path) -> None:
    if (folder / _ORIGINAL).exists():
        words = "a LoRA in LLaVA's original format"
        raise ModelUnusable(name, words, f"llava models convert {quoted(name)} --base BASE -o OUT; then -m OUT")


def _base(name: str, folder: Path) -> Checkpoint:
    """The checkpoint that an adapter was trained on, found by what its config calls it."""
    named = _base_name(name, folder)
    by_hand = f"llava ask -m BASE --adapter {quoted(name)} …"
    if not named:
        raise ModelUnusable(name, "an adapter that does not say of which model", by_hand)
    for candidate in _candidates(named):
        for path in _places(candidate, folder):
            if os.path.isfile(path / CONFIG):
                return Checkpoint(candidate, path)
    repo = next(filter(_is_repo, _candidates(named)), None)
    alias = next((alias for alias, known in ALIASES.items() if known.repo == repo), None)
    hint = f"llava models pull {alias or repo}" if repo else by_hand
    raise ModelUnusable(name, f"an adapter of {one_line(named)}, which is not on this machine", hint)


def _base_name(name: str, folder: Path) -> str:
    named = read_json(Checkpoint(name, folder), ADAPTER_CONFIG).get("base_model_name_or_path")
    return named.rstrip("/\\") if isinstance(named, str) and len(named) <= limits.PATH_CHARACTERS else ""


def _candidates(named: str) -> Iterator[str]:
    """What a base may be called here: as its adapter says, but whole where that is a quantized copy of it."""
    if found := re.search(r"(?:^|[/\\])models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]", named + "/"):
        named = f"{found[1]}/{found[2]}"  # in somebody's cache of the Hub
    whole = re.sub(r"(-unsloth)?-bnb-[48]bit$|-(4|8)bit$", "", named)
    last = re.split(r"[/\\]", whole)[-1]
    yield from (known.repo for known in ALIASES.values() if known.repo.split("/")[-1] == last)
    yield from dict.fromkeys((whole, named, last))


def _is_repo(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def _places(name: str, adapter: Path) -> Iterator[Path]:
    """Where a base of that name may be: in the Hub's cache, at its path, or near its adapter."""
    if (_is_repo(name) or name in ALIASES) and (cached := on_disk(name)):
        yield cached
    path = Path(name)
    if path.is_absolute():
        yield path
    elif ".." not in path.parts:
        here = adapter.resolve()
        yield from (folder / name for folder in (Path(), here, here.parent, here.parent.parent))


# What may be merged.


class _Method(NamedTuple):
    """A kind of adapter that is merged exactly."""

    prefix: str
    """Begins the names of its tensors, behind the names of their modules."""
    options: tuple[str, ...] = ()
    """Of its config, those that change an answer."""
    alpha: str = "alpha"
    """What its config calls the factor by which it is scaled."""


_METHODS = {
    "LORA": _Method("lora_", ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias"), "lora_alpha"),
    "LOHA": _Method("hada_", ("r", "alpha", "use_effective_conv2d")),
    "LOKR": _Method("lokr_", ("r", "alpha", "use_effective_conv2d", "decompose_both", "decompose_factor")),
    "IA3": _Method("ia3_"),
}
_NO_MATTER = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "megatron_core", "ensure_weight_tying", "fan_in_fan_out"),
    *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "init_ia3_weights", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of beginnings, which are judged by their names
    # Which modules it has: its tensors say so.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "feedforward_modules"),
    *("modules_to_save", "bias"),
}
"""Keys of a config that change no answer."""
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Of training (`init_lora_weights`), those that leave the base's own weights alone."""
_PATTERNS = ("rank_pattern", "alpha_pattern")


class _Recipe(NamedTuple):
    """What an adapter's config says, as far as it matters."""

    method: _Method
    peft_type: str
    options: dict[str, Any]
    patterns: dict[str, dict[str, float]]
    """Ranks and factors of modules that differ from the others, by the ends of their names."""

    def of_modules(self, pattern: str, stored: Mapping[str, str]) -> dict[str, float]:
        """A pattern's values by the names of modules in the model; `stored` has what the adapter calls each."""
        found = {}
        for module, its in stored.items():
            for end, value in self.patterns[pattern].items():
                if its == end.removeprefix("^") or (not end.startswith("^") and its.endswith("." + end)):
                    found[rf"^{re.escape(module)}"] = value
                    break
        return found


def _recipe(name: str, config: dict[str, Any]) -> _Recipe:
    """Raises `ModelUnusable` where a config asks for what is not merged, or not exactly."""

    def refuse(words: str) -> ModelUnusable:
        return ModelUnusable(name, f"{ADAPTER_CONFIG} {words}", "merge it with PEFT, and give the folder as -m")

    kind = config.get("peft_type")
    if not isinstance(kind, str) or not (method := _METHODS.get(kind)):
        raise refuse(f"is of the kind {one_line(str(kind))}; merged are {', '.join(_METHODS)}")
    for key in ("init_lora_weights", "init_weights"):
        if (beginning := config.get(key)) not in _PLAIN_BEGINNINGS:
            raise refuse(f"has {key} {one_line(str(beginning))}, for which the base's weights were changed, too")
    known = {*_NO_MATTER, *_PATTERNS, *method.options, "init_lora_weights", "init_weights"}
    if unknown := next((key for key in config if key not in known and config[key] not in (None, False, [], {})), None):
        raise refuse(f"sets {one_line(unknown)}, which is not merged")
    options = {key: config[key] for key in method.options if config.get(key) is not None}
    if wrong := next((key for key, value in options.items() if not _is_number(value)), None):
        raise refuse(f"has a {wrong} that is not a number")
    patterns = {key: config.get(key) or {} for key in _PATTERNS}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
            raise refuse(f"has a {key} that does not map names to numbers")
        if expression := next((end for end in pattern if not re.fullmatch(r"\^?[\w.]+", end)), None):
            raise refuse(f"has a regular expression in its {key}, which is not run ({one_line(expression)})")
    return _Recipe(method, kind, options, patterns)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and math.isfinite(value) and abs(value) < 1e6


# Its tensors, and the model.


def check(checkpoint: Checkpoint) -> None:
    """Judges a checkpoint's adapter before a weight is read: `ModelUnusable` where it cannot be merged."""
    if (folder := checkpoint.adapter) is None:
        return
    name = str(folder)
    _recipe(name, read_json(Checkpoint(name, folder), ADAPTER_CONFIG))
    path = adapter_weights(folder)
    if path is None:
        raise ModelUnusable(name, "no adapter_model.safetensors in it: its tensors are missing", "copy it again")
    if path.suffix == ".safetensors":
        try:
            read_header(path)
        except (OSError, BadHeader):
            raise ModelUnusable(name, f"{path.name} is damaged or cut off", "copy it again") from None
    _require_peft(name)


def _require_peft(name: str) -> None:
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise ModelUnusable(name, "adapters need PEFT, which is not installed", "pip install 'llava-cli[adapters]'")


def merge(model: Any, checkpoint: Checkpoint) -> Any:
    """transformers' model with the checkpoint's adapter merged into its weights, in their number type.

    Raises `ModelUnusable` where a tensor of it lands nowhere in the model, or has another shape.
    """
    assert checkpoint.adapter is not None
    name = str(checkpoint.adapter)
    recipe = _recipe(name, read_json(Checkpoint(name, checkpoint.adapter), ADAPTER_CONFIG))
    with model_errors(name, "its adapter cannot be merged"):
        tensors = _read(name, checkpoint.adapter)
        return _Merger(model, checkpoint, recipe).merged(tensors)


def _read(name: str, folder: Path) -> Tensors:
    """An adapter's tensors, by the names that it gives them."""
    path = adapter_weights(folder)
    assert path is not None
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    from llava_cli.models.pickled_tensors import read_tensors

    return read_tensors(name, path)


class _Merger:
    """Merges one adapter into one model."""

    def __init__(self, model: Any, checkpoint: Checkpoint, recipe: _Recipe) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        self.model, self.recipe = model, recipe
        self._adapter, self._base = str(checkpoint.adapter), checkpoint.name
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._modules = dict(model.named_modules())
        # As transformers renames what older versions of it have saved.
        renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
        self._rename = partial(rename_source_key, weight_renamings=renamings, weight_converters=[])

    def merged(self, tensors: Tensors) -> Any:
        changes: Tensors = {}
        stored: dict[str, str] = {}
        whole: Tensors = {}
        for key, tensor in tensors.items():
            its, found, end = key.partition(f".{self.recipe.method.prefix}")
            its = its.removeprefix("base_model.model.")
            if found:
                module = self._module(its, key)
                stored[module] = its
                changes[f"{module}{found}{end}"] = tensor
            else:
                whole[self._parameter(its, key)] = tensor
        for parameter, tensor in whole.items():
            self._replace(parameter, tensor)
        return self._with_changes(changes, stored) if changes else self.model

    def _module(self, its: str, key: str) -> str:
        """The model's name of a module that an adapter calls so."""
        module = self._rename(f"{its}.weight")[0].removesuffix(".weight")
        if module not in self._modules:
            raise self._lands_nowhere(key)
        return module

    def _parameter(self, its: str, key: str) -> str:
        """The model's name of a parameter that an adapter has whole: a bias, or one of a module that was trained."""
        plain = its.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        parameter = self._rename(plain)[0]
        if parameter not in self._parameters:
            raise self._lands_nowhere(key)
        return parameter

    def _lands_nowhere(self, key: str) -> ModelUnusable:
        return ModelUnusable(self._adapter, f"{one_line(key)} fits nothing in {self._base}", self._hint())

    def _hint(self) -> str:
        named = _base_name(self._adapter, Path(self._adapter))
        return f"it was trained on {one_line(named)}" if named else ""

    def _replace(self, parameter: str, tensor: torch.Tensor) -> None:
        """Puts a whole parameter in the place of the model's; another that shared its numbers keeps them."""
        import torch

        before = self._parameters[parameter]
        self._check_shape(parameter, tensor.shape, before.shape)
        path, _, attribute = parameter.rpartition(".")
        new = torch.nn.Parameter(tensor.to(before.device, before.dtype), requires_grad=False)
        if sum(other is before for other in self._parameters.values()) > 1:
            self.model.config.tie_word_embeddings = False
            self.model.config.get_text_config().tie_word_embeddings = False
        setattr(self._modules[path], attribute, new)

    def _check_shape(self, tensor: str, its: tuple[int, ...], models: tuple[int, ...]) -> None:
        if tuple(its) != tuple(models):
            words = f"{one_line(tensor)} is {_shape(its)}, in {self._base} it has to be {_shape(models)}"
            raise ModelUnusable(self._adapter, words, self._hint())

    def _with_changes(self, changes: Tensors, stored: dict[str, str]) -> Any:
        """The model with changes of its modules merged into their weights: in 32 bits, and rounded once."""
        tuner = self._tuner(changes, stored)
        places = {module: next(self._modules[module].parameters()).device for module in stored}
        waiting = {_plain(key): key for key, tensor in tuner.model.state_dict().items() if tensor.is_meta}
        shapes = {key: tensor.shape for key, tensor in tuner.model.state_dict().items() if tensor.is_meta}
        values: Tensors = {}
        for key, tensor in changes.items():
            if (name := waiting.pop(_plain(key), None)) is None:
                raise self._lands_nowhere(key)
            self._check_shape(key, tensor.shape, shapes[name])
            values[name] = tensor.float().to(places[key.partition(f".{self.recipe.method.prefix}")[0]])
        if waiting:
            raise ModelUnusable(self._adapter, f"lacks {len(waiting)} tensors, {min(waiting)} first", "copy it again")
        tuner.model.load_state_dict(values, strict=False, assign=True)
        model = tuner.merge_and_unload()
        for module in stored:
            if not all(weight.isfinite().all() for weight in model.get_submodule(module).parameters()):
                raise ModelUnusable(self._adapter, f"makes of {module} what is no number", self._hint())
        return model

    def _tuner(self, changes: Tensors, stored: dict[str, str]) -> Any:
        """PEFT's wrapper of the model, with room for the changes and nothing in it yet."""
        from peft import PeftType, mapping

        kind = PeftType(self.recipe.peft_type)
        options = {**self.recipe.options, "target_modules": list(stored)}
        if kind is PeftType.IA3:
            inputs = [key for key, tensor in changes.items() if tensor.shape[0] == 1]
            options["feedforward_modules"] = [key.partition(".ia3_")[0] for key in inputs]
        else:
            options |= {pattern: self.recipe.of_modules(pattern, stored) for pattern in _PATTERNS}
        config = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options)
        made: Any = mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind]
        return made(self.model, config, "default", low_cpu_mem_usage=True, state_dict=changes)


def _plain(key: str) -> str:
    """A tensor's name without its adapter's; DoRA's magnitudes have been saved under two."""
    return key.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes)) or "one number"
