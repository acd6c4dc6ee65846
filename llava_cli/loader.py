"""Settings -> Engine: the only place that makes one."""

from __future__ import annotations

import gc
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llava_cli import __version__
from llava_cli.errors import ModelUnusable, UsageError
from llava_cli.models import adapters
from llava_cli.models.families import Family, named, recognise
from llava_cli.models.registry import BUILTIN, Checkpoint
from llava_cli.models.validate import again, check_files, check_weights, fingerprint, read_json
from llava_cli.prompts.sandbox import Refused, TextSandbox
from llava_cli.settings import Device, Fit, Precision, Settings

if TYPE_CHECKING:
    from llava_cli.engine import Engine
    from llava_cli.engine.local import LocalEngine
    from llava_cli.prompts.prompter import Prompter


def load(
    model: str | None = None,
    precision: Precision | None = None,
    device: Device | None = None,
    template: str | None = None,
    fit: Fit | None = None,
    visual_tokens: int | None = None,
    adapter: str | None = None,
) -> LocalEngine:
    """Loads a model: `load("llava-1.5-7b", precision="4bit")`.

    `model` is an alias, a Hub repo that is on disk, or a folder; None is the default model, or the one that
    `adapter`, the folder of a PEFT adapter, was trained on. What is None comes from the environment, else the config
    file. Raises `ModelUnusable`, `OutOfMemory` or `UsageError`.
    """
    given = {"model": model, "precision": precision, "device": device, "template": template, "fit": fit}
    return load_engine(Settings.resolve(**given, visual_tokens=visual_tokens, adapter=adapter))


def open_engine(settings: Settings, tell: Callable[[str], None]) -> Engine:
    """The server that the settings name; else the user's own, where it holds the model that they ask for; else that
    model, loaded here.

    `tell` gets one line where a server is gone before all is answered, and what `load_engine` has to say.
    """
    if settings.server:
        from llava_cli.engine.remote.remote_engine import RemoteEngine

        return RemoteEngine(settings.server, settings.api_key, settings.model, settings.concurrency, tell)
    from llava_cli.engine.remote import local_socket
    from llava_cli.engine.remote.local_server_engine import holder

    path = local_socket.socket_path()
    if local_socket.is_ours(path) and (
        engine := holder(wanted(settings), lambda: load_engine(settings, tell), tell, path)
    ):
        return engine
    return load_engine(settings, tell)


def wanted(settings: Settings) -> dict[str, Any]:
    """What two engines have in common whose answers are the same. Needs no torch."""
    checkpoint = adapters.find(settings)
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
def load_engine(settings: Settings, tell: Callable[[str], None] = lambda line: None) -> LocalEngine:
    """The engine that the settings ask for; `tell` gets a line for what of the checkpoint is not done as it says."""
    begin = time.perf_counter()
    checkpoint = adapters.find(settings)
    sandbox = _text_sandbox(checkpoint)
    kind, weights = check_files(checkpoint), check_weights(checkpoint)
    adapters.check(checkpoint)
    from llava_cli.engine.generate.generation_config import check_generation_config, load_generation_config
    from llava_cli.engine.local import LocalEngine
    from llava_cli.engine.visual_tokens import choose_tokens
    from llava_cli.hardware.device import plan
    from llava_cli.models.weights import check_size, empty_model, load_config, load_model, without_quantization
    from llava_cli.prompts.processor import check_image_tokens

    how = plan(settings.device, settings.precision)
    with quiet():
        config = load_config(checkpoint)
        if not weights.are_quantized and without_quantization(config):
            words = "config.json says that bitsandbytes has quantized its weights; they are not, and read as they are"
            tell(f"llava: {checkpoint.name}: {words}")
        prompter = _prompter(checkpoint, kind, config, settings, sandbox)
        generation_config = load_generation_config(checkpoint)
        if checkpoint.name != BUILTIN:
            empty = empty_model(checkpoint, config)
            check_size(checkpoint, empty, weights)
            check_generation_config(checkpoint, generation_config, empty)
            check_image_tokens(checkpoint, prompter, empty)
        model, how = load_model(checkpoint, config, how, weights, settings)
        model.generation_config = generation_config
    if settings.visual_tokens:
        choose_tokens(model, settings.visual_tokens)
    return LocalEngine(checkpoint.name, model, prompter, how.precision, time.perf_counter() - begin)


def identify(settings: Settings) -> dict[str, str]:
    """What answers will depend on besides what is asked: the very model, and how it is run. Loads no weights."""
    if settings.server:
        engine = open_engine(settings, lambda line: None)
        return {"model": engine.model, "server": engine.where}
    from llava_cli.hardware.device import plan
    from llava_cli.prompts.chat_template import read_template

    checkpoint = adapters.find(settings)
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
    checkpoint = adapters.find(settings)
    sandbox = _text_sandbox(checkpoint)
    kind = check_files(checkpoint)
    from llava_cli.models.weights import load_config

    with quiet():
        return _prompter(checkpoint, kind, load_config(checkpoint), settings, sandbox)


def _text_sandbox(checkpoint: Checkpoint) -> TextSandbox:
    """Where a checkpoint's template and tokenizer run; it gets ready while libraries are imported."""
    file = checkpoint.folder / "tokenizer.json"
    sandbox = TextSandbox(file if checkpoint.name != BUILTIN and file.exists() else None)
    sandbox.begin()
    return sandbox


def _prompter(checkpoint: Checkpoint, kind: str, config: Any, settings: Settings, sandbox: TextSandbox) -> Prompter:
    from llava_cli.prompts.processor import load_processor
    from llava_cli.prompts.prompter import Prompter

    _check_visual_tokens(checkpoint, kind, settings)
    try:
        sandbox.check_tokenizer()
    except Refused as error:
        raise ModelUnusable(checkpoint.name, f"its tokenizer.json {error}", again(checkpoint.name)) from None
    processor = load_processor(checkpoint, kind, config)
    family = _family(checkpoint, config, processor.tokenizer)
    text = config.get_text_config()
    return Prompter(
        processor,
        settings.template,
        settings.fit,
        family,
        settings.visual_tokens,
        sandbox,
        context=getattr(text, "max_position_embeddings", None),
        vocabulary=getattr(text, "vocab_size", None),
    )


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
    vocabulary = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return recognise(config.model_type, config.get_text_config().model_type, vocabulary)


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
