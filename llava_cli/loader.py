"""Options -> checkpoint -> plan -> weights -> engine: the only place that makes one."""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llava_cli._version import __version__
from llava_cli.errors import model_errors
from llava_cli.models import adapters
from llava_cli.models.checkpoint_files import CONFIG, Configs, is_adapter, pull_command
from llava_cli.models.families import TESTED
from llava_cli.models.fingerprint import fingerprint
from llava_cli.models.quiet import quiet
from llava_cli.models.registry import BUILTIN, Checkpoint, default_name, find
from llava_cli.models.validate import check_files
from llava_cli.models.weight_files import Weights, check_weights
from llava_cli.paths import socket_path
from llava_cli.prompts.sandbox import TextSandbox
from llava_cli.settings import Attention, Device, Fit, LoadOptions, Precision, Settings, is_fast

if TYPE_CHECKING:
    from llava_cli.checking import Check
    from llava_cli.conversation import Picture
    from llava_cli.engine import Engine
    from llava_cli.engine.local import LocalEngine
    from llava_cli.engine.model_patch import ModelPatch
    from llava_cli.hardware.device import Plan
    from llava_cli.images.reader import Source
    from llava_cli.models.weights import LoadedModel
    from llava_cli.prompts.prompter import Prompter


def load(
    model: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    template: str | None = None,
    fit: Fit | None = None,
    visual_tokens: int | None = None,
    adapter: str | None = None,
    double_quant: bool | None = None,
    attention: Attention | None = None,
) -> LocalEngine:
    """Loads a model: `load("llava-1.5-7b", precision="4bit")`.

    `model` is an alias, a Hub repo that is on disk, or a folder; None is the default model, or the one that
    `adapter`, the folder of a PEFT adapter, was trained on. What is None comes from the environment, else the config
    file. Raises `ModelUnusable`, `OutOfMemory` or `UsageError`.
    """
    return load_engine(Settings.resolve(**locals()).load)


@cache
def default_engine() -> Engine:
    """The engine of the user's own settings, opened once a process: `llava serve`'s, or a model that is loaded here."""
    return open_engine(Settings.resolve(), lambda line: warnings.warn(line, stacklevel=2))


def check(images: Source | Sequence[Source], statement: str, at_least: float = 0.5) -> Check:
    """Whether a statement about pictures is true, by the `default_engine`: `if check("page.png", "it is empty"): …`

    Raises what `Engine.check` raises.
    """
    return default_engine().check(images, statement, at_least)


Tell = Callable[[str], None]


def _ignore(line: str) -> None:
    """Tells nobody."""


def open_engine(settings: Settings, tell: Tell, hint: Tell = _ignore, pictures: Sequence[Picture] = ()) -> Engine:
    """The server that the settings name; else the user's own, where it holds the model that they ask for; else that
    model, loaded here.

    `tell` gets one line where a server is gone before all is answered; the others are `load_engine`'s.
    """
    remote = settings.remote
    if remote.server:
        from llava_cli.engine.generate.form_sandbox import FormSandbox
        from llava_cli.engine.remote.remote_engine import RemoteEngine

        return RemoteEngine(
            remote.server, remote.api_key, settings.load.model, remote.concurrency, tell, FormSandbox().fits
        )
    path = socket_path()
    engine = _server_at(path, settings.load, tell, hint) if os.path.lexists(path) else None
    return engine or load_engine(settings.load, tell, hint, pictures)


def _server_at(path: Path, options: LoadOptions, tell: Tell, hint: Tell) -> Engine | None:
    """The user's own server at a socket, where it holds the model that the options ask for."""
    from llava_cli.engine.remote import local_socket
    from llava_cli.engine.remote.local_server_engine import matching_server

    if not local_socket.is_trusted_socket(path):
        return None
    return matching_server(engine_identity(options), lambda: load_engine(options, tell, hint), tell, path)


def find_checkpoint(options: LoadOptions) -> Checkpoint:
    """The checkpoint that the options ask for, with the adapter to merge into it. Raises as `adapters.find`."""
    if options.adapter:
        return adapters.find(options.adapter, options.model)
    name = default_name(options)
    return adapters.find_by_name(name) if is_adapter(name) else find(name)


def engine_identity(options: LoadOptions) -> dict[str, Any]:
    """What is equal in two engines that give the same answers. Imports no torch."""
    checkpoint = find_checkpoint(options)
    names = [name for name in LoadOptions.names() if name not in ("model", "adapter")]  # the checkpoint has those
    return {
        "llava": __version__,
        "model": checkpoint.name,
        "checkpoint": fingerprint(checkpoint),
        "fast": is_fast(),
        **{name: getattr(options, name) for name in names},
    }


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Imports make many objects that stay; looking for garbage among them takes a tenth of a start."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_gc_paused()
def load_engine(
    options: LoadOptions, tell: Tell = _ignore, hint: Tell = _ignore, pictures: Sequence[Picture] = ()
) -> LocalEngine:
    """The engine that the options ask for; `tell` gets a line for each thing that is not done as one would expect.

    `hint` gets one where `auto` has taken fewer bits than are best here, which a user may not want to hear of.
    `pictures` are those of the first question, which are processed while weights are read.
    """
    begin = time.perf_counter()
    checkpoint = find_checkpoint(options)
    sandbox = _text_sandbox(checkpoint, options)
    configs, weights = _checked_files(checkpoint, tell)
    from llava_cli.engine.generate.generation_config import load_generation_config
    from llava_cli.engine.local import LocalEngine
    from llava_cli.engine.visual_tokens import choose_tokens
    from llava_cli.hardware.device import choose_plan
    from llava_cli.models.footprint import sizes_of
    from llava_cli.models.precision import fit_to_memory
    from llava_cli.models.weights import load_config, load_model, settle_precision
    from llava_cli.prompts import loading

    plan = choose_plan(options.device, options.precision, options.attention)
    with quiet():
        config = load_config(checkpoint, configs[CONFIG])
        _drop_false_quantization(checkpoint, config, weights, tell)
        prompter = loading.load_prompter(checkpoint, configs, config, options, sandbox)
        generation_config = load_generation_config(checkpoint, configs)
        if checkpoint.name != BUILTIN:
            _hold_to_model(checkpoint, configs, config, weights, prompter, generation_config)
        plan = settle_precision(checkpoint, config, plan, options)
        plan = fit_to_memory(checkpoint, sizes_of(checkpoint, weights, configs[CONFIG]), plan, options, hint)
        prompter.prepare(pictures)
        if cpu := cpu_wing(plan):
            cpu.compile_ahead(config, plan)
        model = load_model(checkpoint, config, plan, weights, options)
        model.network.generation_config = generation_config
        patch = _speed_up(checkpoint, model, cpu, tell)
    if options.visual_tokens:
        choose_tokens(model.network, options.visual_tokens)
    seconds = time.perf_counter() - begin
    engine = LocalEngine(checkpoint.name, model.network, prompter, plan.precision, seconds, patch)
    engine.has_new_copy = model.is_new_copy
    return engine


def _checked_files(checkpoint: Checkpoint, tell: Tell) -> tuple[Configs, Weights]:
    """What config, processor, weights and adapter have in their files, as far as it can be checked unread."""
    configs, weights = check_files(checkpoint), check_weights(checkpoint)
    if checkpoint.adapter:
        adapters.check(checkpoint.adapter)
    if (kind := configs[CONFIG]["model_type"]) not in TESTED and checkpoint.name != BUILTIN:
        tell(f"llava: {kind} models are untested; llava doctor {checkpoint.name} checks this one")
    return configs, weights


def _drop_false_quantization(checkpoint: Checkpoint, config: Any, weights: Weights, tell: Tell) -> None:
    from llava_cli.models.weights import without_quantization

    if not weights.are_quantized and without_quantization(config):
        words = "config.json says that bitsandbytes has quantized its weights; they are not, and read as they are"
        tell(f"llava: {checkpoint.name}: {words}")


def _hold_to_model(
    checkpoint: Checkpoint, configs: Configs, config: Any, weights: Weights, prompter: Prompter, generation_config: Any
) -> None:
    """Holds a checkpoint's files against the model that its config describes, before a weight is read."""
    from llava_cli.engine.generate.generation_config import check_generation_config
    from llava_cli.models.weights import check_size, empty_model
    from llava_cli.prompts.image_token_check import check_image_tokens

    empty = empty_model(checkpoint, config)
    check_size(checkpoint, empty, weights)
    check_generation_config(checkpoint, configs, generation_config, empty)
    check_image_tokens(checkpoint, prompter, empty)


def has_cpu_wing(plan: Plan) -> bool:
    """Whether there is a `cpu_wing`. Does not import it."""
    return plan.device == "cpu" and is_fast() and find_spec("llava_cli.engine.cpu") is not None


def cpu_wing(plan: Plan) -> ModuleType | None:
    """`engine.cpu.patch`, the only way into that package; None where it is of no use or is not installed."""
    if not has_cpu_wing(plan):
        return None
    from llava_cli.engine.cpu import patch

    return patch


def _speed_up(checkpoint: Checkpoint, model: LoadedModel, cpu: ModuleType | None, tell: Tell) -> ModelPatch:
    """Replaces what can be computed faster; `LLAVA_FAST=0` leaves the model as transformers wrote it."""
    from llava_cli.engine.model_patch import ModelPatch
    from llava_cli.engine.unused_layers import simplify_vision_tower
    from llava_cli.hardware.allocator import read_once

    patch = ModelPatch()
    if is_fast():
        simplify_vision_tower(model.network, patch)
    if is_fast() and model.network.device.type == "cuda":
        from llava_cli.engine.gpu import patch as gpu

        gpu.accelerate(model.network, patch)
    if cpu:
        evictable = model.folder.glob("*.safetensors") if model.folder and model.is_new_copy else None
        words = "its weights cannot be packed for this CPU"
        with (
            model_errors(checkpoint.name, words, pull_command(checkpoint.name)),
            read_once(evictable) if evictable else nullcontext(),
        ):
            if problem := cpu.accelerate(model.network, cpu.PackedWeightStore(model.folder), patch):
                tell(f"llava: cpu kernels: {problem}; transformers computes without them")
    return patch


def load_prompter(options: LoadOptions) -> Prompter:
    """Processor, tokenizer and template alone: what `llava prompt` needs."""
    checkpoint = find_checkpoint(options)
    sandbox = _text_sandbox(checkpoint, options)
    configs = check_files(checkpoint)
    from llava_cli.models.weights import load_config
    from llava_cli.prompts import loading

    with quiet():
        config = load_config(checkpoint, configs[CONFIG])
        return loading.load_prompter(checkpoint, configs, config, options, sandbox)


def _text_sandbox(checkpoint: Checkpoint, options: LoadOptions) -> TextSandbox | None:
    """Where a stranger's template and tokenizer run; it gets ready while libraries are imported."""
    if checkpoint.name == BUILTIN:
        return TextSandbox(None) if options.template else None
    files = [checkpoint.folder / name for name in ("tokenizer.json", "tokenizer.model")]
    sandbox = TextSandbox(next((file for file in files if file.exists()), None))
    sandbox.start_loading()
    return sandbox
