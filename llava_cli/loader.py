"""Options -> engine: the only place that makes one."""

from __future__ import annotations

import gc
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast, get_args

from llava_cli._version import __version__
from llava_cli.errors import ModelUnusable, UsageError, model_errors
from llava_cli.models import adapters
from llava_cli.models.checkpoint_files import CONFIG, Configs, is_adapter, pull_command, tokenizer_hint
from llava_cli.models.families import TESTED, Family, family_named, recognize
from llava_cli.models.fingerprint import fingerprint
from llava_cli.models.registry import BUILTIN, Checkpoint, default_name, find
from llava_cli.models.validate import check_files
from llava_cli.models.weight_files import check_weights
from llava_cli.paths import socket_path
from llava_cli.prompts.sandbox import TextRefused, TextSandbox
from llava_cli.settings import Device, Fit, LoadOptions, Precision, Settings, is_fast

if TYPE_CHECKING:
    from llava_cli.engine import Engine
    from llava_cli.engine.local import LocalEngine
    from llava_cli.engine.model_patch import ModelPatch
    from llava_cli.hardware.device import Plan
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
) -> LocalEngine:
    """Loads a model: `load("llava-1.5-7b", precision="4bit")`.

    `model` is an alias, a Hub repo that is on disk, or a folder; None is the default model, or the one that
    `adapter`, the folder of a PEFT adapter, was trained on. What is None comes from the environment, else the config
    file. Raises `ModelUnusable`, `OutOfMemory` or `UsageError`.
    """
    return load_engine(Settings.resolve(**locals()).load)


Tell = Callable[[str], None]


def _ignore(line: str) -> None:
    """Tells nobody."""


def open_engine(settings: Settings, tell: Tell, hint: Tell = _ignore) -> Engine:
    """The server that the settings name; else the user's own, where it holds the model that they ask for; else that
    model, loaded here.

    `tell` gets one line where a server is gone before all is answered; `tell` and `hint` what `load_engine` has to say.
    """
    remote = settings.remote
    if remote.server:
        from llava_cli.engine.remote.remote_engine import RemoteEngine

        return RemoteEngine(remote.server, remote.api_key, settings.load.model, remote.concurrency, tell)
    path = socket_path()
    engine = _server_at(path, settings.load, tell, hint) if os.path.lexists(path) else None
    return engine or load_engine(settings.load, tell, hint)


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
def load_engine(options: LoadOptions, tell: Tell = _ignore, hint: Tell = _ignore) -> LocalEngine:
    """The engine that the options ask for; `tell` gets a line for each thing that is not done as one would expect.

    `hint` gets one where `auto` has taken fewer bits than are best here, which a user may not want to hear of.
    """
    begin = time.perf_counter()
    checkpoint = find_checkpoint(options)
    sandbox = _text_sandbox(checkpoint, options)
    configs, weights = check_files(checkpoint), check_weights(checkpoint)
    if checkpoint.adapter:
        adapters.check(checkpoint.adapter)
    if (kind := configs[CONFIG]["model_type"]) not in TESTED and checkpoint.name != BUILTIN:
        tell(f"llava: {kind} models are untested; llava doctor {checkpoint.name} checks this one")
    from llava_cli.engine.generate.generation_config import check_generation_config, load_generation_config
    from llava_cli.engine.local import LocalEngine
    from llava_cli.engine.visual_tokens import choose_tokens
    from llava_cli.hardware.device import choose_plan
    from llava_cli.models import weights as model_weights
    from llava_cli.models.precision import fit_to_memory
    from llava_cli.prompts.image_token_check import check_image_tokens

    plan = choose_plan(options.device, options.precision)
    with quiet():
        config = model_weights.load_config(checkpoint, configs[CONFIG])
        if not weights.are_quantized and model_weights.without_quantization(config):
            words = "config.json says that bitsandbytes has quantized its weights; they are not, and read as they are"
            tell(f"llava: {checkpoint.name}: {words}")
        prompter = _prompter(checkpoint, configs, config, options, sandbox, tell)
        generation_config = load_generation_config(checkpoint, configs)
        if checkpoint.name != BUILTIN:
            empty = model_weights.empty_model(checkpoint, config)
            model_weights.check_size(checkpoint, empty, weights)
            check_generation_config(checkpoint, configs, generation_config, empty)
            check_image_tokens(checkpoint, prompter, empty)
        plan = model_weights.settle_precision(checkpoint, config, plan, options)
        plan = fit_to_memory(checkpoint, weights, plan, options, hint)
        if cpu := cpu_wing(plan):
            cpu.compile_ahead(config, plan)
        model = model_weights.load_model(checkpoint, config, plan, weights, options)
        model.network.generation_config = generation_config
        patch = _speed_up(checkpoint, model, cpu, tell)
    if options.visual_tokens:
        choose_tokens(model.network, options.visual_tokens)
    seconds = time.perf_counter() - begin
    return LocalEngine(checkpoint.name, model.network, prompter, plan.precision, seconds, patch)


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


def identify(settings: Settings) -> dict[str, Any]:
    """What answers will depend on besides what is asked: the very model, and how it is run. Loads no weights."""
    if settings.remote.server:
        engine = open_engine(settings, _ignore)
        return {"model": engine.model, "server": engine.where}
    from llava_cli.hardware.device import choose_plan
    from llava_cli.prompts.chat_template import read_template

    options = settings.load
    checkpoint = find_checkpoint(options)
    configs = check_files(checkpoint)
    if options.visual_tokens:
        _check_visual_tokens(checkpoint, configs[CONFIG], options.visual_tokens)
    plan = choose_plan(options.device, options.precision)
    template = options.template or ""
    if template not in ("", "hub", "native"):  # which the checkpoint decides
        template = read_template(template)
    return {
        "model": checkpoint.name,
        "checkpoint": fingerprint(checkpoint),
        "precision": plan.precision + ", double quantised" * options.double_quant * (plan.precision == "4bit"),
        "device": plan.device,
        "template": template,
        "fast": is_fast(),
    }


def settle_precision(settings: Settings, saved: str | None, hint: Tell) -> Settings:
    """The settings of a long run, all of whose answers are in one precision: `auto` becomes the one that it stands for.

    That is the precision that a run was `saved` with; else that of the user's own server, where it would answer; else
    what fits in memory now, about which `hint` gets a line. Raises `OutOfMemory` where nothing fits.
    """
    options = settings.load
    if settings.remote.server or options.precision != "auto":
        return settings
    checkpoint = find_checkpoint(options)
    if checkpoint.name == BUILTIN or (weights := check_weights(checkpoint)).are_quantized:  # which have only one
        return settings
    precision = saved if saved in get_args(Precision) else None
    if not precision:
        from llava_cli.engine.remote.local_server_engine import serving_precision

        precision = serving_precision(engine_identity(options), socket_path())
    if not precision:
        from llava_cli.hardware.device import choose_plan
        from llava_cli.models.precision import fit_to_memory

        precision = fit_to_memory(checkpoint, weights, choose_plan(options.device, "auto"), options, hint).precision
    return replace(settings, load=replace(options, precision=cast(Precision, precision)))


def load_prompter(options: LoadOptions, tell: Tell = _ignore) -> Prompter:
    """Processor, tokenizer and template alone: what `llava prompt` needs; `tell` as in `load_engine`."""
    checkpoint = find_checkpoint(options)
    sandbox = _text_sandbox(checkpoint, options)
    configs = check_files(checkpoint)
    from llava_cli.models.weights import load_config

    with quiet():
        return _prompter(checkpoint, configs, load_config(checkpoint, configs[CONFIG]), options, sandbox, tell)


def _text_sandbox(checkpoint: Checkpoint, options: LoadOptions) -> TextSandbox | None:
    """Where a stranger's template and tokenizer run; it gets ready while libraries are imported."""
    if checkpoint.name == BUILTIN:
        return TextSandbox(None) if options.template else None
    files = [checkpoint.folder / name for name in ("tokenizer.json", "tokenizer.model")]
    sandbox = TextSandbox(next((file for file in files if file.exists()), None))
    sandbox.start_loading()
    return sandbox


def _prompter(
    checkpoint: Checkpoint,
    configs: Configs,
    config: Any,
    options: LoadOptions,
    sandbox: TextSandbox | None,
    tell: Tell,
) -> Prompter:
    from llava_cli.prompts.processor import embedded_tokens, load_processor
    from llava_cli.prompts.prompter import Prompter
    from llava_cli.prompts.tokenizer_check import hold_to_file

    if options.visual_tokens:
        _check_visual_tokens(checkpoint, configs[CONFIG], options.visual_tokens)
    if sandbox:
        try:
            sandbox.check_tokenizer()
        except TextRefused as error:
            file = sandbox.tokenizer.name if sandbox.tokenizer else "tokenizer"
            raise ModelUnusable(checkpoint.name, f"its {file} {error}", tokenizer_hint(checkpoint)) from None
    processor = load_processor(checkpoint, configs, config)
    origin = "ours"
    if sandbox:
        image_token = getattr(processor, "image_token", None) or ""
        tokenizer, origin = hold_to_file(checkpoint, processor.tokenizer, image_token, sandbox)
        if tokenizer is not processor.tokenizer:
            processor.tokenizer = tokenizer
            tell(f"llava: tokenizer: {origin}")
    family = _family(checkpoint, config, processor.tokenizer)
    prompter = Prompter(
        processor,
        options.template,
        options.fit,
        family,
        options.visual_tokens,
        sandbox,
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
        vocab_size=embedded_tokens(config),
    )
    prompter.tokenizer_origin = origin
    return prompter


def _check_visual_tokens(checkpoint: Checkpoint, config: dict[str, Any], count: int) -> None:
    """Raises `UsageError` where `count` tokens cannot be chosen: of pictures that are not one list, of one length."""
    kind, vision = config["model_type"], config.get("vision_config")
    if isinstance(vision, dict) and vision.get("model_type") == "pixtral":
        kind = "pixtral"  # whose pictures have as many tokens as their shape asks for
    if kind not in ("llava", "vipllava"):
        name, which = checkpoint.name, "only llava and vipllava models have one list of tokens a picture"
        raise UsageError(f"--visual-tokens {count}", f"{name} is a {kind} model; {which}", f"llava ask -m {name}")


def _family(checkpoint: Checkpoint, config: Any, tokenizer: Any) -> Family | None:
    if checkpoint.name == BUILTIN:
        return family_named(BUILTIN)
    vocabulary = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return recognize(config.model_type, config.get_text_config().model_type, vocabulary)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' warnings and progress bars off the user's terminal while it loads."""
    from transformers.utils import logging as log

    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    noisy = logging.getLogger("bitsandbytes")
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(before)
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
