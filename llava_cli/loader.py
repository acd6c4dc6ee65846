"""Settings -> Engine: the only place that makes one."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

from llava_cli import __version__
from llava_cli.checkpoint import again, check_files, check_weights, fingerprint, read_json
from llava_cli.errors import ModelUnusable, UsageError, model_errors
from llava_cli.families import Family, named, recognise
from llava_cli.registry import BUILTIN, Checkpoint, default_name, find
from llava_cli.sandbox.text import Refused, TextSandbox
from llava_cli.settings import Device, Fit, Precision, Settings

if TYPE_CHECKING:
    from llava_cli.engine import Engine
    from llava_cli.engine.local import LocalEngine
    from llava_cli.prompt import Prompter


def load(
    model: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    template: str | None = None,
    fit: Fit | None = None,
    visual_tokens: int | None = None,
) -> LocalEngine:
    """Loads a model: `load("llava-1.5-7b", precision="4bit")`.

    `model` is an alias, a Hub repo that is on disk, or a folder; None is the default model. What is
    None comes from the environment, else the config file. Raises `ModelUnusable`, `OutOfMemory` or
    `UsageError`.
    """
    given = {"model": model, "precision": precision, "device": device, "template": template, "fit": fit}
    return load_engine(Settings.resolve(**given, visual_tokens=visual_tokens))


def open_engine(settings: Settings, tell: Callable[[str], None]) -> Engine:
    """The server that the settings name; else the user's own, where it holds the model that they ask for; else that
    model, loaded here.

    `tell` gets one line where a server is gone before all is answered.
    """
    if settings.server:
        from llava_cli.engine.remote import RemoteEngine

        return RemoteEngine(settings.server, settings.api_key, settings.model, settings.concurrency, tell)
    from llava_cli import place
    from llava_cli.engine.warm import holder

    path = place.socket_path()
    if place.is_ours(path) and (engine := holder(wanted(settings), lambda: load_engine(settings), tell, path)):
        return engine
    return load_engine(settings)


def wanted(settings: Settings) -> dict[str, Any]:
    """What two engines have in common whose answers are the same. Needs no torch."""
    checkpoint = find(default_name(settings))
    names = ("precision", "device", "double_quant", "template", "fit", "visual_tokens")
    return {
        "llava": __version__,
        "model": checkpoint.name,
        "checkpoint": fingerprint(checkpoint),
        "fast": os.environ.get("LLAVA_FAST") != "0",
        **{name: getattr(settings, name) for name in names},
    }


@contextmanager
def _uncollected() -> Iterator[None]:
    """Looking for garbage among the objects of all that is imported, which stay, takes a tenth of a start."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def load_engine(settings: Settings) -> LocalEngine:
    """The engine that the settings ask for."""
    begin = time.perf_counter()
    checkpoint = find(default_name(settings))
    sandbox = _text_sandbox(checkpoint)
    kind, weights = check_files(checkpoint), check_weights(checkpoint)
    from llava_cli.engine.local import LocalEngine
    from llava_cli.engine.visual import choose_tokens
    from llava_cli.machine import plan
    from llava_cli.model import load_config, load_model

    how = plan(settings.device, settings.precision)
    with quiet():
        config = load_config(checkpoint)
        prompter = _prompter(checkpoint, kind, config, settings, sandbox)
        model, how = load_model(checkpoint, config, how, weights, settings)
    if settings.visual_tokens:
        choose_tokens(model, settings.visual_tokens)
    return LocalEngine(checkpoint.name, model, prompter, how.precision, time.perf_counter() - begin)


def identify(settings: Settings) -> dict[str, str]:
    """What answers will depend on besides what is asked: the very model, and how it is run. Loads no weights."""
    if settings.server:
        engine = open_engine(settings, lambda line: None)
        return {"model": engine.model, "server": engine.where}
    from llava_cli.machine import plan
    from llava_cli.prompt import read_template

    checkpoint = find(default_name(settings))
    _check_visual_tokens(checkpoint, check_files(checkpoint), settings)
    how = plan(settings.device, settings.precision)
    template = settings.template or ""
    if template not in ("", "hub", "native"):  # which the checkpoint decides
        template = read_template(template)
    return {
        "model": checkpoint.name,
        "checkpoint": fingerprint(checkpoint),
        "precision": how.precision + ", double quantised" * settings.double_quant * (how.precision == "4bit"),
        "device": how.device,
        "template": template,
    }


def load_prompter(settings: Settings) -> Prompter:
    """Processor, tokenizer and template alone: what `llava prompt` needs."""
    checkpoint = find(default_name(settings))
    sandbox = _text_sandbox(checkpoint)
    kind = check_files(checkpoint)
    from llava_cli.model import load_config

    with quiet():
        return _prompter(checkpoint, kind, load_config(checkpoint), settings, sandbox)


def _text_sandbox(checkpoint: Checkpoint) -> TextSandbox:
    """Where a checkpoint's template and tokenizer run; it gets ready while libraries are imported."""
    file = checkpoint.folder / "tokenizer.json"
    sandbox = TextSandbox(file if checkpoint.name != BUILTIN and file.exists() else None)
    sandbox.begin()
    return sandbox


def _prompter(checkpoint: Checkpoint, kind: str, config: Any, settings: Settings, sandbox: TextSandbox) -> Prompter:
    from llava_cli.model import nothing_is_fetched
    from llava_cli.prompt import Prompter

    _check_visual_tokens(checkpoint, kind, settings)
    try:
        sandbox.check_tokenizer()
    except Refused as error:
        raise ModelUnusable(checkpoint.name, f"its tokenizer.json {error}", again(checkpoint.name)) from None
    with model_errors(checkpoint.name, "its processor cannot be loaded", again(checkpoint.name)):
        # PIL's resizing everywhere: torchvision's differs, and pixels should not depend on what is installed.
        made, absent = _processor_class(kind)
        with nothing_is_fetched():
            processor = made.from_pretrained(
                checkpoint.folder, local_files_only=True, trust_remote_code=False, backend="pil", **absent
            )
        _agree(processor, config)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelUnusable(checkpoint.name, "its processor does not take pictures and text")
    family = _family(checkpoint, config, processor.tokenizer)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Prompter(processor, settings.template, settings.fit, family, settings.visual_tokens, sandbox, context)


def _check_visual_tokens(checkpoint: Checkpoint, kind: str, settings: Settings) -> None:
    """Raises `UsageError` where tokens are to be chosen of pictures that are not one list of them, of one length."""
    if settings.visual_tokens is None:
        return
    vision = read_json(checkpoint, "config.json").get("vision_config")
    if isinstance(vision, dict) and vision.get("model_type") == "pixtral":
        kind = "pixtral"  # whose pictures have as many tokens as their shape asks for
    if kind not in ("llava", "vipllava"):
        name, which = checkpoint.name, "only llava and vipllava models have one list of tokens a picture"
        raise UsageError(
            f"--visual-tokens {settings.visual_tokens}", f"{name} is a {kind} model; {which}", f"llava ask -m {name}"
        )


def _family(checkpoint: Checkpoint, config: Any, tokenizer: Any) -> Family | None:
    if checkpoint.name == BUILTIN:
        return named(BUILTIN)
    return recognise(config.model_type, config.get_text_config().model_type, tokenizer.get_added_vocab())


def _processor_class(kind: str) -> tuple[Any, dict[str, None]]:
    """A model type's processor class, and what to make it without.

    Its part for videos is left out: we have none, and it needs torchvision.
    """
    import transformers
    from transformers.models.auto import processing_auto

    whole: Any = getattr(transformers, processing_auto.PROCESSOR_MAPPING_NAMES[kind])  # type: ignore[attr-defined]
    parts = [part for part in whole.get_attributes() if part != "video_processor"]
    if len(parts) == len(whole.get_attributes()):
        return whole, {}
    module = sys.modules[whole.__module__]
    if getattr(module, "num2words", str) is None:
        module.num2words = str  # type: ignore[attr-defined]  # SmolVLM's spells out how many frames a video has
    still = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda cls: parts)})
    return still, {"video_processor": None} if "video_processor" in signature(whole.__init__).parameters else {}


def _agree(processor: Any, config: Any) -> None:
    """The model's vision options go for the processor, which counts image tokens by its own copy of them."""
    if hasattr(processor, "patch_size") and hasattr(config.vision_config, "patch_size"):
        processor.patch_size = config.vision_config.patch_size
    if hasattr(processor, "vision_feature_select_strategy") and hasattr(config, "vision_feature_select_strategy"):
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy


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
