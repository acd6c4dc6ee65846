"""A checkpoint -> transformers' model with its weights, which are quantized once and then read from a copy.

safetensors only; code of a checkpoint is never run.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli.errors import ModelUnusable, OutOfMemory, UsageError, model_errors
from llava_cli.files import quoted
from llava_cli.hardware import memory
from llava_cli.models import adapter_merge
from llava_cli.models.checkpoint_files import CONFIG, pull_command, read_json
from llava_cli.models.footprint import BYTES, Sizes, footprint
from llava_cli.models.precision import OTHER_MODELS, best_fit, candidates, gigabytes, recipe
from llava_cli.models.registry import BUILTIN, Checkpoint
from llava_cli.models.untrusted_config import without_preferences
from llava_cli.models.weight_files import Weights
from llava_cli.settings import QUANTIZED, LoadOptions, Precision

if TYPE_CHECKING:
    import torch

    from llava_cli.hardware.device import Plan
    from llava_cli.models.quantized_cache import QuantizedCopy

_SIZE_TOLERANCE = 1.5
"""How many times the weights of its files a config may describe: embeddings that serve as the head are stored once."""
_CONFIG_HINT = "take the config.json that these weights were saved with"
_STORED_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""Precisions -> safetensors' names of their dtypes."""
_CHATTY = ("bitsandbytes.autograd._functions", "bitsandbytes.nn.modules")
"""Loggers that warn of every layer in every forward pass: that it casts to another dtype."""


@contextmanager
def nothing_is_fetched() -> Iterator[None]:
    """Within, the Hub is out of reach, and the package `kernels`, which runs code from there, seems not installed.

    transformers and bitsandbytes use both unasked where the Hub has a kernel for a model's type or a processor.
    """
    from huggingface_hub import constants

    offline, has_kernels = constants.HF_HUB_OFFLINE, "kernels" in sys.modules
    constants.HF_HUB_OFFLINE = True
    if not has_kernels:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # what makes its import fail
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        if not has_kernels:
            del sys.modules["kernels"]


@nothing_is_fetched()
def load_config(checkpoint: Checkpoint, content: dict[str, Any]) -> Any:
    """transformers' config, from what a checkpoint's config.json describes of the model. Raises `ModelUnusable`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    content = without_preferences(content)
    with model_errors(checkpoint.name, "its config cannot be loaded", pull_command(checkpoint.name)):
        config = CONFIG_MAPPING[content["model_type"]].from_dict(content)
        _ = config.get_text_config().model_type  # raises here, not later, where a config has several, or what is none
    return config


@nothing_is_fetched()
def empty_model(checkpoint: Checkpoint, config: Any) -> Any:
    """The model that a config describes, on the meta device: shapes without values. Raises `ModelUnusable`."""
    import torch
    from transformers import AutoModelForImageTextToText

    words = "its config describes no model"
    with model_errors(checkpoint.name, words, pull_command(checkpoint.name)), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def without_quantization(config: Any) -> bool:
    """Removes from a config the claim that weights are stored quantized, and says whether it was there.

    It stays behind where somebody has merged what was trained on quantized weights into full ones.
    """
    parts = [part for part in (config, config.get_text_config()) if getattr(part, "quantization_config", None)]
    for part in parts:
        del part.quantization_config
    return bool(parts)


def check_size(checkpoint: Checkpoint, empty: Any, weights: Weights) -> None:
    """Raises `ModelUnusable` where a config describes far more weights than the files hold.

    transformers would make up the missing ones, and could run out of memory over it.
    """
    described = sum(weight.numel() for weight in empty.parameters())
    if described > _SIZE_TOLERANCE * weights.numbers:
        if weights.are_of_mlx:
            raise _mlx_format(checkpoint.name)
        words = f"config.json describes {described:,} weights, its files hold {weights.numbers:,}"
        raise ModelUnusable(checkpoint.name, words, pull_command(checkpoint.name) or _CONFIG_HINT)


def _mlx_format(name: str) -> ModelUnusable:
    return ModelUnusable(name, "its weights are in MLX's format", "take the checkpoint that they were made of")


@dataclass(frozen=True)
class LoadedModel:
    """transformers' model in eval mode, and where what is derived from its weights may be kept."""

    network: Any
    folder: Path | None
    """The quantized copy's; None where there is none."""
    is_new_copy: bool = False
    """Whether the copy was made just now. Then nothing of its files is needed in memory once they have been packed."""


def settle_precision(checkpoint: Checkpoint, config: Any, plan: Plan, options: LoadOptions) -> Plan:
    """The plan, with the precision of weights that are stored quantized, which no option can change.

    Raises `UsageError` where another precision was asked for, `ModelUnusable` where an adapter was.
    """
    if (stored := _stored_quantization(config)) is None:
        return plan
    _refuse_adapter(checkpoint)
    return replace(plan, precision=_stored_precision(checkpoint.name, stored, options.precision))


@nothing_is_fetched()
def load_model(checkpoint: Checkpoint, config: Any, plan: Plan, weights: Weights, options: LoadOptions) -> LoadedModel:
    """Loads as `plan`, which has gone through `settle_precision`, says.

    Raises `ModelUnusable` or `OutOfMemory`.
    """
    from llava_cli.models import quantized_cache

    if plan.precision not in QUANTIZED:
        return LoadedModel(_read_plain(checkpoint, config, plan, weights), None)
    copy = quantized_cache.copy_of(checkpoint, recipe(plan, options.double_quant))
    if _stored_quantization(config):
        folder = copy.path if quantized_cache.claim(copy) else None
        return LoadedModel(_read(checkpoint, config, plan, weights), folder)
    if model := _read_copy(checkpoint, plan, copy):
        return LoadedModel(model, copy.path)
    return _quantize(checkpoint, config, plan, weights, options, copy)


def _read_plain(checkpoint: Checkpoint, config: Any, plan: Plan, weights: Weights) -> Any:
    """The model in 16 or 32 bits. What has other bits in its files is not needed there once it has been read."""
    if checkpoint.name == BUILTIN or weights.float_dtypes == {
        _STORED_DTYPES[plan.precision]
    }:  # small, or mapped as it is
        return _read(checkpoint, config, plan, weights)
    from llava_cli.hardware.allocator import read_once

    with read_once(weights):
        return _read(checkpoint, config, plan, weights)


def _quantize(
    checkpoint: Checkpoint, config: Any, plan: Plan, weights: Weights, options: LoadOptions, copy: QuantizedCopy
) -> LoadedModel:
    """Quantizes the model, and reads it from the copy that then exists, so that all starts answer alike."""
    from llava_cli.hardware.allocator import empty_device_cache, read_once, trim_heap
    from llava_cli.models import quantized_cache

    geometry, computed = weights.geometry, BYTES[plan.compute_precision]
    size = round(geometry.inner * BYTES[plan.precision] + geometry.unquantized * computed)
    stored_dtype = _mappable_dtype(plan, weights) if quantized_cache.has_space(copy, size) else None
    with read_once(weights):
        model = _read(checkpoint, config, plan, weights, options.double_quant, stored_dtype)
        spans_gpus = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        is_kept = not spans_gpus and quantized_cache.keep(model, copy, _compute_dtype(plan))
    if not is_kept:
        if stored_dtype:  # the space is gone
            del model
            model = _read(checkpoint, config, plan, weights, options.double_quant)
        return LoadedModel(model, None)
    del model
    gc.collect()
    trim_heap()  # as much as the model takes that is read next
    empty_device_cache(plan.device)
    with read_once(copy.path.glob("*.safetensors")):
        if model := _read_copy(checkpoint, plan, copy):
            return LoadedModel(model, copy.path, is_new_copy=True)
    raise ModelUnusable(checkpoint.name, "its quantized copy is gone", pull_command(checkpoint.name))


def _read_copy(checkpoint: Checkpoint, plan: Plan, copy: QuantizedCopy) -> Any:
    """The model from its quantized copy; None where there is none."""
    from llava_cli.models import quantized_cache

    if (found := quantized_cache.find(checkpoint, copy)) is None:
        return None
    stored, weights = found
    return _read(stored, load_config(stored, read_json(stored, CONFIG)), plan, weights)


def _compute_dtype(plan: Plan) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[plan.compute_precision]


def _mappable_dtype(plan: Plan, weights: Weights) -> torch.dtype | None:
    """The 16 bits that all weights are stored in, where a model that is to be quantized computes in 32; else None.

    Read in these, the weights that are not quantized stay in the mapped file: in 32 bits a 1B has 1.7 GB of them. What
    is quantized has the same bits either way.
    """
    import torch

    mappable = {"BF16": torch.bfloat16, "F16": torch.float16}
    widens = plan.compute_precision == "fp32" and len(weights.float_dtypes) == 1
    return mappable.get(next(iter(weights.float_dtypes))) if widens else None


def _read(
    checkpoint: Checkpoint,
    config: Any,
    plan: Plan,
    weights: Weights,
    double_quant: bool = False,
    stored_dtype: torch.dtype | None = None,
) -> Any:
    """The model with its weights; quantized on the way where the plan says so and they are not stored like that.

    With `stored_dtype` those that are not quantized are in it, else in the plan's.
    """
    from transformers import AutoModelForImageTextToText, GenerationConfig

    from llava_cli.models.stored_quantization import leave_unpacked, misfit

    name, stored, quantized = checkpoint.name, _stored_quantization(config), plan.precision in QUANTIZED
    if quantized:
        for logger in _CHATTY:
            logging.getLogger(logger).setLevel(logging.ERROR)
    merged = None  # before quantization: quantized weights cannot be changed exactly
    if checkpoint.adapter and quantized:
        merged = _read(checkpoint, config, replace(plan, precision=plan.compute_precision, device="cpu"), weights)
    compute_dtype = _compute_dtype(plan)
    dtype = stored_dtype or compute_dtype
    with model_errors(name, "its weights cannot be loaded", pull_command(name)):
        options: dict[str, Any] = {
            "config": config,
            "dtype": dtype,
            "device_map": "auto" if _check_memory(checkpoint, plan, weights, bool(stored)) else {"": plan.device},
            "use_safetensors": True,
            "local_files_only": True,
            "trust_remote_code": False,
            "output_loading_info": True,
            "generation_config": GenerationConfig(),  # `generation_config.py` reads the checkpoint's
            "ignore_mismatched_sizes": True,  # `_check_fit` says more about them than transformers does
        }
        if plan.attention == "flash_attention_2":  # torch's own is the default, for the models that can use it
            options["attn_implementation"] = plan.attention
        if quantized and not stored:
            options["quantization_config"] = _quantization_config(name, plan, config, compute_dtype, double_quant)
        loaded: Any
        if merged:
            options["config"] = merged.config  # in which embeddings and head may have been untied by the adapter
            loaded = type(merged).from_pretrained(None, state_dict=merged.state_dict(), **options)
        else:
            loaded = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, **options)
    model, info = loaded
    _check_fit(name, info, weights)
    if merged:
        model.generation_config = merged.generation_config
    elif checkpoint.adapter:
        model = adapter_merge.merge(model, checkpoint)
    if stored and (problem := misfit(model)):  # before anything reads as many bytes as the shapes promise
        raise ModelUnusable(name, f"damaged: {problem}", pull_command(name))
    if quantized:
        leave_unpacked(model)
        _cast_unquantized(model, dtype)
    if stored_dtype:
        for weight in model.parameters():
            if state := getattr(weight, "quant_state", None):
                state.dtype = compute_dtype
    return model.eval()


def _cast_unquantized(model: Any, dtype: torch.dtype) -> None:
    """transformers leaves some of a quantized model's other weights in the dtype that they were saved in elsewhere."""
    for weight in model.parameters():
        is_packed = hasattr(weight, "quant_state")  # bytes in a tensor that may have a floating-point dtype
        if weight.is_floating_point() and weight.dtype != dtype and not is_packed:
            weight.data = weight.data.to(dtype)


def _refuse_adapter(checkpoint: Checkpoint) -> None:
    """Raises `ModelUnusable` where an adapter is to be merged into weights that are stored quantized."""
    if checkpoint.adapter:
        words = "stored quantized: an adapter cannot be merged into its weights exactly"
        hint = f"llava ask -m BASE -p 4bit --adapter {quoted(checkpoint.adapter)} …, with its BASE in 16 bits"
        raise ModelUnusable(checkpoint.name, words, hint)


def _check_fit(name: str, info: Any, weights: Weights) -> None:
    """Raises `ModelUnusable` where a tensor is missing or shaped otherwise than the config says.

    transformers would go on with random numbers in its place.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        tensor, stored_shape, config_shape = mismatched[0]
        if weights.are_of_mlx:  # which stores some axes in another order
            raise _mlx_format(name)
        words = f"{tensor} is {list(stored_shape)} in its files, and {list(config_shape)} by its config.json"
        raise ModelUnusable(name, words, pull_command(name) or _CONFIG_HINT)
    if missing := sorted(info["missing_keys"]):
        raise ModelUnusable(name, f"lacks {len(missing)} tensors, {missing[0]} first", pull_command(name))


def _check_memory(checkpoint: Checkpoint, plan: Plan, weights: Weights, stored: bool) -> bool:
    """Whether a model must be spread over several GPUs. Raises `OutOfMemory` where its weights fit nowhere."""
    import torch

    sizes = Sizes(weights.geometry)
    free, need = memory.free_memory(plan.device), footprint(sizes, plan)
    size = sum(path.stat().st_size for path in weights) if stored else need.weights
    if size > free:
        total = size + need.cache + need.workspace
        # An adapter is merged in 16 or 32 bits, whatever is made of them then.
        is_fixed = stored or checkpoint.adapter
        smaller = None if is_fixed else best_fit(sizes, candidates(plan), free)
        hint = f"llava ask -m {quoted(checkpoint.name)} -p {smaller.precision}" if smaller else OTHER_MODELS
        needs = "needs" if not checkpoint.adapter else "with its adapter to merge, needs"
        raise OutOfMemory(checkpoint.name, f"{needs} {gigabytes(total)}, {gigabytes(free)} are free", hint)
    return plan.device == "cuda" and torch.cuda.device_count() > 1 and size * 1.2 > torch.cuda.mem_get_info()[0]


def _stored_quantization(config: Any) -> Any:
    """The quantization config that a checkpoint, or its language model, is stored with; None of others."""
    parts = (config, config.get_text_config())
    return next((stored for part in parts if (stored := getattr(part, "quantization_config", None))), None)


def _stored_precision(name: str, stored: Any, requested: Precision) -> str:
    """The precision of weights that are stored quantized. Raises `UsageError` where another one is requested."""
    fields: dict[str, Any] = stored if isinstance(stored, dict) else vars(stored)
    precision = "4bit" if fields.get("load_in_4bit") else "8bit"
    if requested not in ("auto", precision):
        raise UsageError(f"--precision {requested}", f"{name} is stored as {precision}", f"llava ask -m {name}")
    return precision


def _quantization_config(name: str, plan: Plan, config: Any, dtype: torch.dtype, double_quant: bool) -> Any:
    """bitsandbytes on the language model's inner layers alone.

    The vision tower, the projector and the output head lose more accuracy than they save memory. Naming modules turns
    off transformers' own guess at what to skip, so all of them are named here, from the model's structure.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is model:
        raise ModelUnusable(name, f"cannot be loaded in {plan.precision}: its language model is not apart")
    inner = set(decoder.modules())
    # Rows that are not whole blocks of 64 weights: a CPU cannot multiply them, a GPU is slow, with a warning each time.
    block = 64 if plan.precision == "4bit" else 1
    skipped = [
        path
        for path, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and (m not in inner or m is head or m.in_features % block)
    ]
    return BitsAndBytesConfig(
        load_in_8bit=plan.precision == "8bit",
        load_in_4bit=plan.precision == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
        llm_int8_skip_modules=skipped,
    )
