"""A checkpoint -> transformers' model with its weights, quantised once, and made fast.

safetensors only; code of a checkpoint is never run.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli.errors import ModelUnusable, OutOfMemory, UsageError, model_errors
from llava_cli.files import quoted
from llava_cli.models import adapters
from llava_cli.models.registry import Checkpoint
from llava_cli.models.untrusted_config import description
from llava_cli.models.validate import CONFIG, Weights, again, read_json
from llava_cli.settings import QUANTISED, Precision, Settings

if TYPE_CHECKING:
    import torch

    from llava_cli.hardware.device import Plan
    from llava_cli.models.quantized_cache import Copy


@contextmanager
def nothing_is_fetched() -> Iterator[None]:
    """Within, the Hub is out of reach, and `kernels`, which runs code from there, is as good as not installed.

    transformers and bitsandbytes ask for both on their own, where a model's type or a processor has a kernel there.
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
def load_config(checkpoint: Checkpoint) -> Any:
    """transformers' config, of what the checkpoint's says about the model. Raises `ModelUnusable`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    content = description(read_json(checkpoint, CONFIG))
    with model_errors(checkpoint.name, "its config cannot be loaded", again(checkpoint.name)):
        config = CONFIG_MAPPING[content["model_type"]].from_dict(content)
        config.get_text_config()  # which is asked for again and again; there may be several
    return config


@nothing_is_fetched()
def empty_model(checkpoint: Checkpoint, config: Any) -> Any:
    """The model that a config describes, with shapes and without numbers. Raises `ModelUnusable`."""
    import torch
    from transformers import AutoModelForImageTextToText

    words = "its config describes no model"
    with model_errors(checkpoint.name, words, again(checkpoint.name)), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def without_quantization(config: Any) -> bool:
    """Takes out of a config that weights are stored quantized, and says whether it was there.

    It is left over where somebody has merged what was trained on quantized weights into whole ones.
    """
    parts = [part for part in (config, config.get_text_config()) if getattr(part, "quantization_config", None)]
    for part in parts:
        del part.quantization_config
    return bool(parts)


def check_size(checkpoint: Checkpoint, empty: Any, weights: Weights) -> None:
    """Raises `ModelUnusable` where a config describes far more than the files hold: what is missing would be made."""
    described = sum(weight.numel() for weight in empty.parameters())
    if described > _ROOM * weights.numbers:
        if weights.are_of_mlx:
            raise _of_mlx(checkpoint.name)
        words = f"config.json describes {described:,} weights, its files hold {weights.numbers:,}"
        raise ModelUnusable(checkpoint.name, words, again(checkpoint.name) or _ITS_CONFIG)


def _of_mlx(name: str) -> ModelUnusable:
    return ModelUnusable(name, "its weights are in MLX's format", "take the checkpoint that they were made of")


_ITS_CONFIG = "take the config.json that these weights were saved with"


_ROOM = 1.5
"""Embeddings that stand for a head, too, are in the files once."""


@nothing_is_fetched()
def load_model(
    checkpoint: Checkpoint, config: Any, how: Plan, weights: Weights, settings: Settings
) -> tuple[Any, Plan]:
    """transformers' model in eval mode, and how it is run. Raises `ModelUnusable`, `OutOfMemory` or `UsageError`."""
    from llava_cli.models import quantized_cache

    if stored := _stored_quantization(config):
        _refuse_adapter(checkpoint)
        how = replace(how, precision=_stored_precision(checkpoint.name, stored, settings.precision))
    copy = quantized_cache.copy_of(checkpoint, _how(how, settings.double_quant)) if how.precision in QUANTISED else None
    if stored or copy is None:
        kept = copy.path if copy and quantized_cache.claim(copy) else None
        return _ready(checkpoint, _read(checkpoint, config, how, weights), kept), how
    model = _from_copy(checkpoint, how, copy) or _quantised(checkpoint, config, how, weights, settings, copy)
    return model, how


def _quantised(checkpoint: Checkpoint, config: Any, how: Plan, weights: Weights, settings: Settings, copy: Copy) -> Any:
    """The model, quantised, and read from the copy that is then there: all starts answer alike."""
    from llava_cli.hardware.memory import give_back_memory, read_once
    from llava_cli.models import quantized_cache

    with read_once(weights):
        model = _read(checkpoint, config, how, weights, settings.double_quant)
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if spread or not quantized_cache.keep(model, copy):
        return _ready(checkpoint, model, None)
    del model
    gc.collect()
    give_back_memory()  # as much as the model takes that is read now
    with read_once(copy.path.glob("*.safetensors")):  # of which what is arranged is made
        if model := _from_copy(checkpoint, how, copy):
            return model
    raise ModelUnusable(checkpoint.name, "its quantised copy is gone", again(checkpoint.name))


def _from_copy(checkpoint: Checkpoint, how: Plan, copy: Copy) -> Any:
    """The model, from its quantised copy; None where there is none."""
    from llava_cli.models import quantized_cache

    if (found := quantized_cache.find(checkpoint, copy)) is None:
        return None
    its, weights = found
    return _ready(checkpoint, _read(its, load_config(its), how, weights), copy.path)


def _ready(checkpoint: Checkpoint, model: Any, folder: Path | None) -> Any:
    """The model with all that makes it fast; weights are arranged for that in a copy's folder."""
    from llava_cli.engine.cpu.packed_weights import Arranged
    from llava_cli.engine.cpu.patch import speed_up

    with model_errors(checkpoint.name, "its weights cannot be arranged", again(checkpoint.name)):
        speed_up(model, Arranged(folder))
        return model.eval()


def _read(checkpoint: Checkpoint, config: Any, how: Plan, weights: Weights, double_quant: bool = False) -> Any:
    """The model with its weights; those of one that is not stored quantised are, if `how` says so, on their way."""
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    from llava_cli.engine.cpu.patch import compile_ahead
    from llava_cli.hardware.device import native
    from llava_cli.models.stored_quantization import leave_unpacked, misfit

    name, stored = checkpoint.name, _stored_quantization(config)
    if how.precision in QUANTISED:
        for part in _CHATTY:
            logging.getLogger(part).setLevel(logging.ERROR)
    merged = None  # before it is quantized, for what is quantized cannot be changed exactly
    if checkpoint.adapter and how.precision in QUANTISED:
        whole = replace(how, precision=native(how.device)[0], device="cpu")
        merged = _read(checkpoint, config, whole, weights)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(how.precision) or dtypes[native(how.device)[0]]
    if how.device == "cpu":
        compile_ahead(config, how.precision, dtype == torch.bfloat16)
    with model_errors(name, "its weights cannot be loaded", again(name)):
        options: dict[str, Any] = {
            "config": config,
            "dtype": dtype,
            "device_map": "auto" if _check_memory(name, how, weights, bool(stored)) else {"": how.device},
            "use_safetensors": True,
            "local_files_only": True,
            "trust_remote_code": False,
            "output_loading_info": True,
            "generation_config": GenerationConfig(),  # `generation` reads the checkpoint's
            "ignore_mismatched_sizes": True,  # of which `_check_fit` tells more than transformers does
        }
        if how.attention == "flash_attention_2":  # torch's own is the default, for the models that can take it
            options["attn_implementation"] = how.attention
        if how.precision in QUANTISED and not stored:
            options["quantization_config"] = _quantization(name, how, config, dtype, double_quant)
        loaded: Any
        if merged:
            options["config"] = merged.config  # where an adapter has embeddings and head part company
            loaded = type(merged).from_pretrained(None, state_dict=merged.state_dict(), **options)
        else:
            loaded = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, **options)
    model, info = loaded
    _check_fit(name, info, weights)
    if merged:
        model.generation_config = merged.generation_config
    elif checkpoint.adapter:
        model = adapters.merge(model, checkpoint)
    if stored and (wrong := misfit(model)):  # before anything reads as much of it as there should be
        raise ModelUnusable(name, f"damaged: {wrong}", again(name))
    leave_unpacked(model)
    for weight in model.parameters():  # of a quantised one transformers leaves some as they were saved elsewhere
        packed = hasattr(weight, "quant_state")  # whose bytes may be called numbers
        if weight.is_floating_point() and weight.dtype != dtype and how.precision in QUANTISED and not packed:
            weight.data = weight.data.to(dtype)
    return model


_CHATTY = ("bitsandbytes.autograd._functions", "bitsandbytes.nn.modules")
"""Loggers that warn of every layer in every forward pass: that it casts to another dtype."""


def _refuse_adapter(checkpoint: Checkpoint) -> None:
    """Raises `ModelUnusable` where an adapter is to be merged into weights that are stored quantized."""
    if checkpoint.adapter:
        words = "stored quantized: an adapter cannot be merged into its weights exactly"
        hint = f"llava ask -m BASE -p 4bit --adapter {quoted(checkpoint.adapter)} …, with its BASE in 16 bits"
        raise ModelUnusable(checkpoint.name, words, hint)


def _check_fit(name: str, info: Any, weights: Weights) -> None:
    """Raises `ModelUnusable` where there is not of everything what the config says.

    transformers would go on with random numbers in its place.
    """
    if wrong := sorted(info["mismatched_keys"]):
        tensor, found, wanted = wrong[0]
        if weights.are_of_mlx:  # which has some axes in another order
            raise _of_mlx(name)
        words = f"{tensor} is {list(found)} in its files, and {list(wanted)} by its config.json"
        raise ModelUnusable(name, words, again(name) or _ITS_CONFIG)
    if missing := sorted(info["missing_keys"]):
        raise ModelUnusable(name, f"lacks {len(missing)} tensors, {missing[0]} first", again(name))


def _how(how: Plan, double: bool) -> str:
    """What a quantised model depends on besides its weights."""
    return f"{how.precision}{'-double' * (double and how.precision == '4bit')}-{how.device}"


def _check_memory(name: str, how: Plan, weights: Weights, stored: bool) -> bool:
    """Whether a model must be spread over several GPUs; `OutOfMemory` where it fits nowhere."""
    import torch

    from llava_cli.hardware.memory import BYTES_PER_WEIGHT, free_memory

    size, free = sum(path.stat().st_size for path in weights), free_memory(how.device)
    parameters = size / weights.bytes_per_weight
    needed = size if stored else parameters * BYTES_PER_WEIGHT.get(how.precision, 2.0)
    if needed > free:
        smaller = next((p for p in ("bf16", "8bit", "4bit") if parameters * BYTES_PER_WEIGHT[p] <= free), None)
        hint = f"llava ask -m {name} -p {smaller}" if smaller else "llava models lists what fits this machine"
        raise OutOfMemory(name, f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", hint)
    return how.device == "cuda" and torch.cuda.device_count() > 1 and needed * 1.2 > torch.cuda.mem_get_info()[0]


def _stored_quantization(config: Any) -> Any:
    """What a config, or its language model's, says of weights that are stored quantised; None of others."""
    parts = (config, config.get_text_config())
    return next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)


def _stored_precision(name: str, stored: Any, asked: Precision) -> str:
    """What a checkpoint that was saved quantised is in; it cannot be had in another precision."""
    how: dict[str, Any] = stored if isinstance(stored, dict) else vars(stored)
    precision = "4bit" if how.get("load_in_4bit") else "8bit"
    if asked not in ("auto", precision):
        raise UsageError(f"--precision {asked}", f"{name} is stored as {precision}", f"llava ask -m {name}")
    return precision


def _quantization(name: str, how: Plan, config: Any, dtype: torch.dtype, double: bool) -> Any:
    """bitsandbytes on the language model's inner layers alone.

    The vision tower, the projector and the output head lose more than they save; naming modules drops
    transformers' own guess at what to keep, so all of them are named here, from the model's structure.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is model:
        raise ModelUnusable(name, f"cannot be loaded in {how.precision}: its language model is not apart")
    inner = set(decoder.modules())
    # On a CPU products take whole blocks of 64 weights a row.
    blocks = 64 if how.precision == "4bit" and how.device == "cpu" else 1
    kept = [
        layer
        for layer, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and (m not in inner or m is head or m.in_features % blocks)
    ]
    return BitsAndBytesConfig(
        load_in_8bit=how.precision == "8bit",
        load_in_4bit=how.precision == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=kept,
    )
