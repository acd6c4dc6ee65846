"""Merges a PEFT adapter into a model's weights before anything else is done with them.

Every tensor of the adapter has to match a part of the model: an adapter that was trained on another model is refused.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli.errors import ModelUnusable, model_errors
from llava_cli.models.adapter_config import PATTERNS, AdapterConfig, read_adapter_config
from llava_cli.models.adapters import base_name
from llava_cli.models.checkpoint_files import adapter_weights
from llava_cli.models.registry import Checkpoint
from llava_cli.untrusted_text import one_line

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


def merge(model: Any, checkpoint: Checkpoint) -> Any:
    """transformers' model with the checkpoint's adapter merged into its weights, in their dtype.

    Raises `ModelUnusable` if a tensor of the adapter matches nothing in the model, or has another shape.
    """
    assert checkpoint.adapter is not None
    config = read_adapter_config(checkpoint.adapter)
    with model_errors(str(checkpoint.adapter), "its adapter cannot be merged"):
        return _Merger(model, checkpoint.name, checkpoint.adapter, config).merge(_read_tensors(checkpoint.adapter))


def _read_tensors(folder: Path) -> Tensors:
    """An adapter's tensors, by the names in its file."""
    path = adapter_weights(folder)
    assert path is not None
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    from llava_cli.models.pickled_tensors import read_tensors

    return read_tensors(str(folder), path)


class _Merger:
    """Merges one adapter into one model."""

    def __init__(self, model: Any, base: str, adapter: Path, config: AdapterConfig) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        self.model, self.config = model, config
        self._base, self._adapter = base, adapter
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._modules = dict(model.named_modules())
        # transformers' own renaming of what its older versions have saved.
        renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
        self._rename = partial(rename_source_key, weight_renamings=renamings, weight_converters=[])

    def merge(self, tensors: Tensors) -> Any:
        deltas: Tensors = {}  # by the model's module names
        stored_names: dict[str, str] = {}  # the adapter's names of these modules
        replacements: Tensors = {}  # whole parameters: a bias, or a module that was trained in full
        for key, tensor in tensors.items():
            stored, separator, suffix = key.partition(f".{self.config.method.prefix}")
            stored = stored.removeprefix("base_model.model.")
            if separator:
                module = self._module(stored, key)
                stored_names[module] = stored
                deltas[f"{module}{separator}{suffix}"] = tensor
            else:
                replacements[self._parameter(stored, key)] = tensor
        for parameter, tensor in replacements.items():
            self._replace(parameter, tensor)
        return self._merge_deltas(deltas, stored_names) if deltas else self.model

    def _module(self, stored: str, key: str) -> str:
        """The model's name of the module that an adapter stores under this name."""
        module = self._rename(f"{stored}.weight")[0].removesuffix(".weight")
        if module not in self._modules:
            raise self._unmatched(key)
        return module

    def _parameter(self, stored: str, key: str) -> str:
        """The model's name of the parameter that an adapter stores under this name."""
        parameter = self._rename(stored.replace(".base_layer.", ".").replace(".modules_to_save.", "."))[0]
        if parameter not in self._parameters:
            raise self._unmatched(key)
        return parameter

    def _unmatched(self, key: str) -> ModelUnusable:
        return self._error(f"{one_line(key)} matches nothing in {self._base}")

    def _error(self, words: str) -> ModelUnusable:
        base = base_name(str(self._adapter), self._adapter)
        return ModelUnusable(str(self._adapter), words, f"it was trained on {one_line(base)}" if base else "")

    def _replace(self, parameter: str, tensor: torch.Tensor) -> None:
        """Replaces a whole parameter; another one that was tied to it keeps its values."""
        import torch

        before = self._parameters[parameter]
        self._check_shape(parameter, tensor.shape, before.shape)
        path, _, attribute = parameter.rpartition(".")
        new = torch.nn.Parameter(tensor.to(before.device, before.dtype), requires_grad=False)
        if sum(other is before for other in self._parameters.values()) > 1:
            self.model.config.tie_word_embeddings = False
            self.model.config.get_text_config().tie_word_embeddings = False
        setattr(self._modules[path], attribute, new)

    def _check_shape(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(shape) != tuple(expected):
            words = f"{one_line(name)} is {_shown(shape)}, in {self._base} it has to be {_shown(expected)}"
            raise self._error(words)

    def _merge_deltas(self, deltas: Tensors, stored_names: dict[str, str]) -> Any:
        """The model with the modules' deltas merged into their weights: in 32 bits, and rounded once."""
        tuner = self._tuner(deltas, stored_names)
        devices = {module: next(self._modules[module].parameters()).device for module in stored_names}
        empty = {key: tensor.shape for key, tensor in tuner.model.state_dict().items() if tensor.is_meta}
        unfilled = {_without_adapter_name(key): key for key in empty}
        values: Tensors = {}
        for key, tensor in deltas.items():
            if (name := unfilled.pop(_without_adapter_name(key), None)) is None:
                raise self._unmatched(key)
            self._check_shape(key, tensor.shape, empty[name])
            values[name] = tensor.float().to(devices[key.partition(f".{self.config.method.prefix}")[0]])
        if unfilled:
            words = f"lacks {len(unfilled)} tensors, {min(unfilled)} first"
            raise ModelUnusable(str(self._adapter), words, "copy it again")
        tuner.model.load_state_dict(values, strict=False, assign=True)
        model = tuner.merge_and_unload()
        for module in stored_names:
            if not all(weight.isfinite().all() for weight in model.get_submodule(module).parameters()):
                raise self._error(f"gives {module} values that are not numbers")
        return model

    def _tuner(self, deltas: Tensors, stored_names: dict[str, str]) -> Any:
        """PEFT's wrapper of the model, with meta tensors for the deltas."""
        from peft import PeftType, mapping

        peft_type = PeftType(self.config.peft_type)
        options = {**self.config.options, "target_modules": list(stored_names)}
        if peft_type is PeftType.IA3:
            scales_input = [key for key, tensor in deltas.items() if tensor.shape[0] == 1]
            options["feedforward_modules"] = [key.partition(".ia3_")[0] for key in scales_input]
        else:
            options |= {pattern: self.config.pattern_by_module(pattern, stored_names) for pattern in PATTERNS}
        config = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**options)
        tuner_class: Any = mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type]
        return tuner_class(self.model, config, "default", low_cpu_mem_usage=True, state_dict=deltas)


def _without_adapter_name(key: str) -> str:
    """A tensor's name without its adapter's; DoRA's magnitudes have been saved under two names."""
    return key.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
